"""attach takes out exactly what it put in: in any order, in threads, and after exceptions anywhere."""

import contextlib
import functools
import itertools
import sys
import threading
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch.utils.hooks import RemovableHandle

from qalign import CrossImage, CtrlX, QAlign, attach
from qalign.context.clock import Clock
from qalign.methods import Method
from qalign.processors import attach as attaching
from qalign.processors import following, installing
from qalign.sampling.attention_maps import MapCollector
from tests.processors.models import generate, make_pipe

LAYERS = ("down", "mid", "up")
METHODS = (QAlign(), CrossImage(), CtrlX(structure_convolutions=("mid_block.resnets.0",)))


@functools.cache
def shared_pipe():
    """A pipeline that every test leaves as it was."""
    return make_pipe("small")


def state_of(pipe) -> tuple:
    """Everything that attach touches, by identity."""
    modules = dict(pipe.unet.named_modules())
    return (
        {name: id(processor) for name, processor in pipe.unet.attn_processors.items()},
        {name: [*module._forward_hooks.values()] for name, module in modules.items()},
        {name: [*module._forward_pre_hooks.values()] for name, module in modules.items()},
        [vars(module).keys() - {"processor"} for module in modules.values()],
        type(pipe.scheduler),
        {name: id(value) for name, value in vars(pipe.scheduler).items()},
        vars(pipe).keys(),
        len(installing._HELD),
        len(following._FOLLOWERS),
    )


def blocks(pipe, count: int = 3) -> list:
    return [attach(pipe, METHODS[i], layers=LAYERS[i], steps=(0.0, 0.5)) for i in range(count)]


class Everywhere(Method):
    """A method that acts in every kind of module."""

    def hooks(self, model):
        return dict.fromkeys(("mid_block.resnets.0", "up_blocks.0.resnets.0"), lambda *given: given[2])

    def cross_layers(self, names):
        return names[:2]


def whole_block(pipe):
    return attach(pipe, Everywhere(), layers=["mid", "up"])


def leave(control) -> None:
    control.__exit__(None, None, None)


@pytest.mark.parametrize("count", [2, 3])
def test_blocks_may_end_in_any_order(count) -> None:
    pipe = shared_pipe()
    before = state_of(pipe)
    for entered, left in itertools.product(itertools.permutations(range(count)), repeat=2):
        controls = blocks(pipe, count)
        for number in entered:
            controls[number].__enter__()
        for number in left:
            pipe.scheduler.set_timesteps(2)
            leave(controls[number])
            assert controls[number].clock.step is None
            assert all(controls[other].clock.total == 2 for other in left[left.index(number) + 1 :])
            before_and_timesteps = state_of(pipe)
        assert before_and_timesteps[:5] == before[:5] and before_and_timesteps[6:] == before[6:]


def test_pictures_are_stock_after_any_order() -> None:
    pipe = make_pipe("small")
    stock = generate(pipe)
    first, second, _ = blocks(pipe)
    first.__enter__(), second.__enter__(), leave(first)
    assert not torch.equal(generate(pipe), stock)
    leave(second)
    assert torch.equal(generate(pipe), stock)


def test_blocks_in_threads_restore_everything() -> None:
    pipe, problems = shared_pipe(), []
    before = state_of(pipe)
    start = threading.Barrier(4)

    def run(number: int) -> None:
        start.wait()
        for _ in range(30):
            try:
                with attach(pipe, METHODS[number % 2], layers=LAYERS[number % 3]):
                    pass
            except RuntimeError as error:  # the layers of numbers 0 and 3 are the same
                problems.extend([] if "attached twice" in str(error) else [error])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and state_of(pipe) == before


def test_a_common_layer_is_refused_and_nothing_changes() -> None:
    pipe = shared_pipe()
    before = state_of(pipe)
    with attach(pipe, QAlign(), layers="mid"):
        within = state_of(pipe)
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())
        for layers in ("mid", ["down", "mid", "up"]):  # also while another's processor is in its place
            with pytest.raises(RuntimeError, match="expected . without a processor of this library, got 1"):
                attach(pipe, CrossImage(), layers=layers).__enter__()
        assert state_of(pipe)[1:] == within[1:]
    assert state_of(pipe) == before


def test_leaving_twice_is_harmless() -> None:
    pipe = shared_pipe()
    before, (first, second, _) = state_of(pipe), blocks(pipe)
    with first:
        leave(first)
        with second:
            leave(first)
            assert (
                pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor.method is METHODS[1]
            )
    leave(second)
    leave(attach(pipe, QAlign()))  # never entered
    assert state_of(pipe) == before
    with first, pytest.raises(RuntimeError, match="attached twice"):
        first.__enter__()
    assert state_of(pipe) == before


class Injected(BaseException):
    """As KeyboardInterrupt: no `except Exception` sees it."""


SETTERS = [
    (Attention, "set_processor"),
    (torch.nn.Module, "register_forward_hook"),
    (torch.nn.Module, "register_forward_pre_hook"),
    (RemovableHandle, "remove"),
    (Clock, "reset"),
    (attaching, "follow"),
    (attaching, "unfollow"),
    (attaching, "hold"),
    (attaching, "release"),
]


def drop_inert_hooks(unet) -> None:
    """A hook whose handle an exception kept from us stays, and does nothing."""
    for module in unet.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            assert all(hook.function is None for hook in hooks.values())
            hooks.clear()


@pytest.mark.parametrize(("place", "name"), SETTERS, ids=[name for _, name in SETTERS])
@pytest.mark.parametrize("when", ["before", "after"])
def test_everything_is_restored_where_a_setter_raises(monkeypatch, place, name, when) -> None:
    pipe = shared_pipe()
    before, function = state_of(pipe), getattr(place, name)
    for fatal in itertools.count():
        calls = itertools.count()

        def setter(*arguments, calls=calls, fatal=fatal, **options):
            raises = next(calls) == fatal
            if raises and when == "before":
                raise Injected
            result = function(*arguments, **options)
            if raises:
                raise Injected
            return result

        control, raised = whole_block(pipe), False
        with monkeypatch.context() as patch:
            patch.setattr(place, name, setter)
            try:
                with control:
                    pass
            except Injected:
                raised = True
        if when == "after" and name.startswith("register"):
            drop_inert_hooks(pipe.unet)
        assert state_of(pipe) == before
        if not raised:
            break
    assert fatal > 0


def raise_at_line(number: int, folder: str):
    """A trace function that raises at the `number`-th line that runs in a folder."""
    lines = itertools.count()

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line" and next(lines) == number:
            sys.settrace(None)
            raise Injected
        return trace

    return trace


@pytest.mark.slow
def test_an_exception_at_any_line_leaves_nothing() -> None:
    """Where the exception hits `__exit__` before it has begun, calling it again restores the rest."""
    pipe, folder = shared_pipe(), str(Path(attaching.__file__).parent)
    before = state_of(pipe)
    for number in itertools.count():
        control, raised = whole_block(pipe), False
        sys.settrace(raise_at_line(number, folder))
        try:
            with control:
                pass
        except Injected:
            raised = True
        finally:
            sys.settrace(None)
        leave(control)
        assert state_of(pipe) == before, f"line {number}"
        with control:
            pass
        assert state_of(pipe) == before, f"line {number}"
        if not raised:
            break
    assert number > 100


@pytest.mark.parametrize("fatal", range(5))
def test_a_collector_of_maps_leaves_no_hook(monkeypatch, fatal) -> None:
    pipe, calls, register = shared_pipe(), itertools.count(), torch.nn.Module.register_forward_pre_hook
    before = state_of(pipe)

    def setter(*arguments, **options):
        if next(calls) == fatal:
            raise Injected
        return register(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "register_forward_pre_hook", setter)
        with pytest.raises(Injected):
            MapCollector(pipe).__enter__()
    assert state_of(pipe) == before


def test_a_lasting_error_leaves_the_other_layers_restored(monkeypatch) -> None:
    pipe = make_pipe("small")
    control = attach(pipe, QAlign(), layers=["mid", "up"])
    original, stubborn = Attention.set_processor, next(iter(control.layers.values()))

    def setter(attn, processor):
        if attn is stubborn:
            raise OSError("no")
        original(attn, processor)

    control.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "set_processor", setter)
        with contextlib.suppress(OSError):
            leave(control)
    left = [
        name
        for name, attn in control.layers.items()
        if attn.processor.__class__.__name__ != "AttnProcessor2_0"
    ]
    assert len(left) == 1 and type(pipe.scheduler).__dict__.get("stock_class") is None
