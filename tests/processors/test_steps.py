"""The clock of attach: one step a timestep, for every scheduler and every way of calling it."""

import copy
import functools
import itertools
import pickle
import warnings

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPanoramaPipeline,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from qalign import BatchLayout, QAlign, attach
from qalign.context.timeline import Timeline, step_numbers
from tests.processors.models import PROMPTS, make_pipe, make_unet, quiet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in schedulers

STEPS = 5
X = torch.zeros(3, 4, 8, 8)


def working_schedulers() -> list[type]:
    """The classes that diffusers ships and that run a loop as StableDiffusionPipeline does."""
    found = []
    for name in sorted(each for each in dir(diffusers) if each.endswith("Scheduler")):
        kind = getattr(diffusers, name)
        try:
            scheduler = kind()
            scheduler.set_timesteps(STEPS, device="cpu")
            for timestep in scheduler.timesteps:
                scheduler.step(X, timestep, scaled(scheduler, timestep))
        except Exception:  # of other models, or without a package
            continue
        found.append(kind)
    return found


def scaled(scheduler, timestep):
    if hasattr(scheduler, "scale_model_input"):
        return scheduler.scale_model_input(X, timestep)
    return X


@functools.cache
def fake_pipe():
    """A pipeline whose UNet returns its input."""
    pipe = make_pipe("small")
    pipe.unet.forward = lambda sample, timestep, **options: sample
    return pipe


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SCHEDULERS = working_schedulers()


def expected_steps(timesteps) -> list[tuple[int, int]]:
    """(step, total) of each entry: a new step wherever the timestep changes."""
    runs = [list(group) for _, group in itertools.groupby(timesteps.tolist())]
    return [(step, len(runs)) for step, run in enumerate(runs) for _ in run]


def stock_loop(scheduler, call):
    for timestep in scheduler.timesteps:
        scaled(scheduler, timestep)
        call(timestep)
        scheduler.step(X, timestep, X)


def loop_of_views(scheduler, call):
    """As panoramas: the scheduler steps once a view, from a state of that view."""
    states = [copy.deepcopy(vars(scheduler))] * 2
    for timestep in scheduler.timesteps:
        for view in range(2):
            vars(scheduler).update(states[view])
            scaled(scheduler, timestep)
            call(timestep)
            scheduler.step(X, timestep, X)
            states[view] = copy.deepcopy(vars(scheduler))


def bare_loop(scheduler, call):
    """Without any function of the scheduler, twice."""
    for timestep in [*scheduler.timesteps, *scheduler.timesteps.tolist()]:
        call(timestep)


def test_enough_schedulers_are_tried() -> None:
    known = {kind.name for kind in diffusers.schedulers.KarrasDiffusionSchedulers}
    left_out = {"DPMSolverSDEScheduler"}  # needs torchsde
    assert known - {kind.__name__ for kind in SCHEDULERS} <= left_out
    assert all(issubclass(kind, SchedulerMixin) for kind in SCHEDULERS)


@pytest.mark.parametrize("loop", [stock_loop, loop_of_views, bare_loop])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow if kind.__name__.startswith("KDPM2") else ())
        for kind in SCHEDULERS
    ],
)
def test_a_step_is_a_timestep(kind, loop) -> None:
    pipe, seen = fake_pipe(), []
    pipe.scheduler = kind()
    before = type(pipe.scheduler)
    with attach(pipe, QAlign(), steps=(0.5, 1.0)) as control:

        def call(timestep):
            pipe.unet(X, timestep, encoder_hidden_states=None)
            seen.append((control.clock.step, control.clock.total))

        pipe.scheduler.set_timesteps(STEPS, device="cpu")
        loop(pipe.scheduler, call)
    expected = expected_steps(pipe.scheduler.timesteps)
    if loop is loop_of_views:
        expected = [each for each in expected for _ in range(2)]
    assert seen == (expected * 2 if loop is bare_loop else expected)
    assert type(pipe.scheduler) is before


def test_the_clock_needs_no_call_of_the_unet() -> None:
    """A UNet that is compiled in place shows its calls to nothing."""
    pipe, seen = fake_pipe(), []
    pipe.scheduler = HeunDiscreteScheduler()
    with attach(pipe, QAlign()) as control:
        pipe.scheduler.set_timesteps(3)
        stock_loop(pipe.scheduler, lambda timestep: seen.append(control.clock.step))
        seen.append((control.clock.step, control.clock.total))
    assert seen == [0, 1, 1, 2, 2, (3, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_steps_of_a_compiled_unet(in_place) -> None:
    torch._dynamo.reset()
    pipe, seen = make_pipe("small"), []
    compiled = [0]

    def backend(graph, inputs):
        compiled[0] += 1
        return graph.forward

    if in_place:
        pipe.unet.compile(backend=backend)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=backend)
    with attach(pipe, QAlign(), steps=(0.5, 1.0)) as control:
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *given, **options: (
            seen.append((control.clock.step, bool(control.clock.active))) or step(*given, **options)
        )
        pipe(PROMPTS, height=32, width=32, num_inference_steps=4, output_type="latent", guidance_scale=1.0)
    assert seen == [(0, False), (1, False), (2, True), (3, True)]
    assert 0 < compiled[0] <= 4


def test_panorama_steps_once_a_timestep() -> None:
    parts = {name: part for name, part in make_pipe("small").components.items() if name != "image_encoder"}
    pipe, seen = quiet(StableDiffusionPanoramaPipeline(**parts, requires_safety_checker=False)), []
    layout = BatchLayout("output", "appearance", "structure", guidance=True)
    with attach(pipe, QAlign(), layout=layout, steps=(0.5, 1.0), layers="up") as control:
        clock = control.clock
        pipe.unet.register_forward_pre_hook(
            lambda module, given: seen.append((int(given[1]), clock.step, clock.total, bool(clock.active)))
        )
        pipe(PROMPTS, height=16, width=576, num_inference_steps=4, output_type="latent")
    each = [(751, 0, 4, False), (501, 1, 4, False), (251, 2, 4, True), (1, 3, 4, True)]
    assert seen == [call for call in each for _ in range(2)]


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, HeunDiscreteScheduler])
def test_executed_part_of_repeated_timesteps(kind) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**make_pipe("small").components, requires_safety_checker=False)
    pipe.scheduler, seen = kind.from_config(pipe.scheduler.config), []
    with attach(quiet(pipe), QAlign()) as control:
        pipe.unet.register_forward_pre_hook(
            lambda module, given: seen.append((float(given[1]), control.clock.step, control.clock.total))
        )
        settings = {"num_inference_steps": 6, "strength": 0.5, "output_type": "latent"}
        pipe(PROMPTS, image=torch.zeros(3, 3, 32, 32), **settings)
    timesteps = torch.tensor([timestep for timestep, *_ in seen])
    assert [(step, total) for _, step, total in seen] == expected_steps(timesteps)
    assert len(timesteps) < len(pipe.scheduler.timesteps)


def test_copies_of_a_scheduler_are_plain_and_independent() -> None:
    pipe = fake_pipe()
    pipe.scheduler = original = PNDMScheduler(skip_prk_steps=True)
    with attach(pipe, QAlign()) as control:
        original.set_timesteps(4)
        copies = [
            copy.deepcopy(original),
            copy.copy(original),
            type(original).from_config(original.config),
            original.from_config(original.config),
            pickle.loads(pickle.dumps(original)),
        ]
        for each in copies:
            each.set_timesteps(7)
            stock_loop(each, lambda timestep: None)
            assert control.clock.step == 0 and control.clock.total == 4
    for each in copies:
        assert type(each) is PNDMScheduler and "step" not in vars(each)
        each.set_timesteps(3)
        stock_loop(each, lambda timestep: None)
        assert len(each.ets) == 3 and len(original.ets) == 0
    assert type(original) is PNDMScheduler


def test_pipelines_made_inside_a_block_are_plain(tmp_path) -> None:
    pipe = make_pipe("small")
    with attach(pipe, QAlign()):
        other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        pipe.scheduler.save_pretrained(tmp_path)
        assert other.scheduler is pipe.scheduler and type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert type(other.scheduler) is DDIMScheduler
    assert DDIMScheduler.load_config(tmp_path)["_class_name"] == "DDIMScheduler"


def test_a_copied_unet_is_plain() -> None:
    unet, timestep = make_unet("small"), torch.tensor(500)
    sample, context = torch.randn(3, 4, 16, 16), torch.randn(3, 7, 32)
    with torch.no_grad():
        stock = unet(sample, timestep, context).sample
        with attach(unet, QAlign()) as control:
            copied = copy.deepcopy(unet)
            for _ in control.track([500, 1]):
                assert torch.equal(copied(sample, timestep, context).sample, stock)
        assert torch.equal(copied(sample, timestep, context).sample, stock)
    assert {type(each).__name__ for each in copied.attn_processors.values()} == {"AttnProcessor2_0"}


@pytest.mark.parametrize(
    ("timesteps", "steps"),
    [
        (torch.tensor([9.0, 5.0, 5.0, 1.0]), [0, 1, 1, 2]),
        ([9, 5, 5, 1], [0, 1, 1, 2]),
        ([torch.tensor(9), torch.tensor(5), torch.tensor(5)], [0, 1, 1]),
        (range(3), [0, 1, 2]),
        ([("a", 1), ("b", 1)], [0, 1]),
        (torch.tensor([]), []),
    ],
)
def test_steps_of_tracked_timesteps(timesteps, steps) -> None:
    assert list(step_numbers(timesteps, len(timesteps)))[: len(timesteps)] == steps
    with attach(make_unet("small"), QAlign()) as control:
        tracked = control.track(timesteps)
        assert len(tracked) == len(steps)
        assert [control.clock.step for _ in tracked] == steps


def test_tracking_an_iterator_without_a_length() -> None:
    with attach(make_unet("small"), QAlign(), steps=(0.5, 1.0)) as control:
        seen = [(each, control.clock.idle) for each in control.track(iter([900, 600, 300, 0]))]
    assert seen == [(900, True), (600, True), (300, False), (0, False)]


@pytest.mark.parametrize(
    ("executed", "first", "expected"),
    [
        (None, 7, (0, 5)),
        (4, 5, (0, 4)),  # the last entries, though 5 stands before them too
        (5, 7, (0, 4)),  # the first entries
        (50, 3, (0, 2)),  # of an earlier loop
    ],
)
def test_executed_entries_make_the_total(executed, first, expected) -> None:
    timeline = Timeline(torch.tensor([7, 5, 5, 4, 3, 1]))
    assert timeline.move(first, executed)
    assert (timeline.step, timeline.total) == expected


def test_foreign_timesteps_move_nothing() -> None:
    timeline = Timeline(torch.tensor([9, 5, 1]))
    assert timeline.advance(5) and not timeline.move(7) and not timeline.move(torch.tensor([9, 5, 1]))
    assert (timeline.step, timeline.total) == (1, 2)


def test_timesteps_that_return_are_new_steps() -> None:
    entries = torch.tensor([9, 5, 9, 5, 1])
    timeline, seen = Timeline(entries), []
    for entry in entries:
        for _ in range(2):
            timeline.advance(entry.clone())
            seen.append(timeline.step)
    assert seen == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and timeline.restarts == 0
    timeline.move(9)
    assert timeline.step == 0 and timeline.restarts == 1
