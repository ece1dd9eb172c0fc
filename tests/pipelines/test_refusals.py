"""Bad arguments of every pipeline: one line that names the argument, before the UNet is called."""

import functools
import math

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from qalign import BoundedAttentionPipeline, DreamMatcher, MasaCtrl, Regions
from qalign.context.layers import layer_grid
from qalign.methods import TRANSFERS
from qalign.methods.free_custom import FreeCustom
from qalign.pipelines import AppearanceTransferPipeline, AttentionDistillationPipeline
from qalign.processors.attach import attach
from qalign.sampling.bounded_guidance import BoundedGuidance
from qalign.sampling.inversion import Inversion
from tests.processors.models import pipe_of

PIPELINES = {
    "transfer": AppearanceTransferPipeline,
    "distillation": AttentionDistillationPipeline,
    "bounded": BoundedAttentionPipeline,
}
A, B = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BOX = [("fox", (0.0, 0.0, 0.5, 1.0))]
PROMPT = "a fox"
CALLS = {  # pipeline, function, and its good arguments
    "transfer": ("transfer", "__call__", {"appearance": A, "structure": B, "num_inference_steps": 3}),
    "invert": ("transfer", "invert", {"appearance": A, "structure": B, "num_inference_steps": 3}),
    "self_regions": ("transfer", "self_regions", {"appearance": A, "structure": B}),
    "noise_free": (
        "transfer",
        "noise_free",
        {
            "method": "qalign",
            "inversion": Inversion("ddim", torch.zeros(3, 2, 4, 16, 16), None, torch.tensor([500, 0]), 0.0),
        },
    ),
    "distillation": ("distillation", "__call__", {"style": A, "content": B, "num_inference_steps": 2}),
    "sample": (
        "distillation",
        "__call__",
        {"style": A, "content": B, "mode": "sample", "num_inference_steps": 2},
    ),
    "expand": ("distillation", "expand", {"style": A, "height": 32, "width": 64, "num_inference_steps": 1}),
    "bounded": ("bounded", "__call__", {"subjects": BOX, "num_inference_steps": 4}),
}


@functools.cache
def pipe_and_calls(name: str):
    """A pipeline and the list that counts the calls of its UNet."""
    pipe, calls = pipe_of(PIPELINES[name], "sd15"), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    return pipe, calls


def call(case: str, **options):
    """The result of a call. The list of the pipeline then has the UNet calls until its end."""
    name, function, good = CALLS[case]
    pipe, calls = pipe_and_calls(name)
    calls.clear()
    prompt = {} if case == "expand" else {"prompt": PROMPT}
    return getattr(pipe, function)(**(prompt | good | options))


def refused(case: str, argument: str, **options) -> None:
    """Check that the call is refused in one line, which names the argument, before any work of the UNet."""
    calls = pipe_and_calls(CALLS[case][0])[1]
    with pytest.raises((TypeError, ValueError, OSError, FloatingPointError)) as error:
        call(case, **options)
    message = str(error.value)
    assert message.startswith(f"{argument}: expected ") and "\n" not in message, f"{options}: {message}"
    assert not calls, f"{options}: {len(calls)} UNet calls before {message}"


def labels(height: int, width: int) -> torch.Tensor:
    return (torch.arange(width) < width // 2).long().expand(height, width)


NOT_NUMBERS = (None, "x", math.nan, math.inf, True)
NOT_COUNTS = (0, -1, 1.5, True, "3", math.nan)
NOT_PROMPTS = (["a fox", "an ox"], [], None, 3)
BAD = {  # case: {argument: values}
    "transfer": {
        "prompt": NOT_PROMPTS,
        "method": ("masa", 3, DreamMatcher),
        "num_inference_steps": NOT_COUNTS,
        "skip": (-0.1, 1, "x", None, math.nan),
        "inversion": ("x", None, 3),
        "inversion_guidance_scale": NOT_NUMBERS,
        "swap_guidance_scale": NOT_NUMBERS,
        "edit_steps": ((0.5, 0.5), (1, 0), "ab", 0.5, (0,), (None, 1)),
        "guidance_start": (*NOT_NUMBERS, -1, 2),
        "adain_start": (*NOT_NUMBERS, -1, 2),
        "adain": ("x", True, 1),
        "noun": (3,),
        "freeu": ("x", 1),
        "regions": ("x", 3, {"a": 1}),
        "height": (20, 0, -8, "x", 16.0),
        "width": (20, 0),
        "generator": (3, "x", [torch.Generator()], [None, None]),
        "output_type": ("jpg", None, 3),
        "callback_on_step_end": (3, "x"),
        "callback_on_step_end_tensor_inputs": (("x",), None, 3, "latents"),
        "cache": (3, "/dev/null", "/dev/null/x"),
        "appearance": (None, [A, A], A * math.nan, A * 3, A[:1], "a.png"),
        "structure": (None, [], torch.rand(3, 33, 32)),
    },
    "invert": {"prompt": NOT_PROMPTS, "num_inference_steps": NOT_COUNTS, "inversion": ("x", None)},
    "self_regions": {"prompt": NOT_PROMPTS, "noun": ("ox", 3), "height": (20, 0)},
    "noise_free": {"prompt": NOT_PROMPTS, "inversion": ("ddpm", None), "method": ("masa", 3)},
    "distillation": {
        "prompt": NOT_PROMPTS,
        "mode": ("x", 3),
        "method": ("x", None),
        "num_inference_steps": NOT_COUNTS,
        "iterations": (-1, 1.5, "x"),
        "learning_rate": ("x", 0, -1.0, math.nan, math.inf),
        "guidance_scale": NOT_NUMBERS,
        "adain": ("x", 3),
        "anneal": ("x", 3),
        "initial": ("x", 3),
        "tune_decoder": (-1, 1.5, None),
        "generator": (3, "x"),
        "callback_on_step_end": (3,),
        "output_type": ("jpg",),
        "height": (20, 0, "x"),
        "style": (None, []),
        "regions": (
            "x",
            3,
            Regions(structure=labels(16, 16)),
            Regions(appearance=labels(10, 10), structure=labels(16, 16)),
        ),
    },
    "sample": {"prompt": NOT_PROMPTS, "guidance_scale": NOT_NUMBERS},
    "expand": {
        "window": NOT_COUNTS,
        "stride": (*NOT_COUNTS, 17),
        "batch_size": (*NOT_COUNTS, None),
        "height": (0, None, "x"),
        "generator": (3,),
    },
    "bounded": {
        "prompt": NOT_PROMPTS,
        "subjects": (
            None,
            "fox",
            [("dog", (0, 0, 0.5, 1))],
            [("fox",)],
            [("fox", (0, 0, 0.5))],
            [(3, (0, 0, 1, 1))],
        ),
        "guidance": ("x", 3),
        "guidance_scale": NOT_NUMBERS,
        "num_inference_steps": (*NOT_COUNTS, None),
        "filter_words": ("x", 3, [3]),
        "generator": (3, "x"),
        "latents": ("x", torch.zeros(2, 4, 16, 16), torch.full((1, 4, 16, 16), math.nan)),
        "callback_on_step_end": (3,),
        "mask_layers": (["up_blocks.1", "up_blocks.2"],),
    },
}


@pytest.mark.parametrize(("case", "argument"), [(case, name) for case in BAD for name in BAD[case]])
def test_a_bad_argument_is_refused_before_any_work(case: str, argument: str) -> None:
    for value in BAD[case][argument]:
        refused(case, argument, **{argument: value})


@pytest.mark.parametrize("case", CALLS)
def test_a_scheduler_without_levels_is_refused(case: str, monkeypatch) -> None:
    pipe = pipe_and_calls(CALLS[case][0])[0]
    for scheduler in (EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()):
        if case == "noise_free":  # it takes the timesteps of an inversion, and no noise
            continue
        monkeypatch.setattr(pipe, "scheduler", scheduler)
        refused(case, "scheduler")


@pytest.mark.parametrize("case", CALLS)
def test_a_unet_that_needs_more_is_refused(case: str) -> None:
    pipe = pipe_and_calls(CALLS[case][0])[0]
    before = pipe.unet.config.encoder_hid_dim_type
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    try:
        refused(case, "unet")
    finally:
        pipe.unet.register_to_config(encoder_hid_dim_type=before)


def test_ddim_inversion_needs_a_spacing_that_stock_inverts() -> None:
    pipe = pipe_and_calls("transfer")[0]
    before = pipe.scheduler
    pipe.scheduler = type(before)(timestep_spacing="linspace")
    try:
        refused("transfer", "inversion", inversion="ddim")
    finally:
        pipe.scheduler = before


@pytest.mark.parametrize("method", TRANSFERS)
def test_label_maps_that_do_not_fit_are_refused(method: str) -> None:
    maps = {
        "appearance": labels(16, 16),
        "structure": labels(16, 16),
    }
    options = {"method": method, "num_inference_steps": 6}
    read = ("appearance",) if method == "free_custom" else ("structure",)
    read = read if method in ("free_custom", "dream_matcher") else ("appearance", "structure")
    for picture in read:
        for wrong in (labels(10, 10), labels(16, 24), labels(8, 32), None, [labels(16, 16)] * 2):
            other = "structure" if picture == "appearance" else "appearance"
            regions = Regions(**{picture: wrong, other: maps[other]})
            refused("transfer", "regions", regions=regions, **options)
    refused("transfer", "regions", regions=Regions(**maps), method=None)


def test_settings_that_do_not_fit_are_refused() -> None:
    maps = {"appearance": labels(16, 16), "structure": labels(16, 16)}
    refused("transfer", "mask_weights", method=FreeCustom(mask_weights=(1.0, 2.0)))
    masks = MasaCtrl(ref_token_idx=(2,), cur_token_idx=(2,))
    refused("transfer", "regions", method=masks, regions=Regions(**maps))
    refused("transfer", "map_tokens", method=MasaCtrl(ref_token_idx=(2,), cur_token_idx=(2,), map_tokens=100))
    for settings in (
        {"iterations": -1},
        {"until": 2},
        {"refine_every": 1.5},
        {"rates": (1,)},
        {"rates": (math.nan, 1.0)},
        {"enough": "x"},
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(settings))}: expected "):
            BoundedGuidance(**settings)


def test_good_calls_still_run() -> None:
    for case, options in (
        (
            "transfer",
            {"prompt": [PROMPT], "regions": Regions(appearance=labels(32, 32), structure=labels(16, 16))},
        ),
        ("transfer", {"cache": None, "generator": [torch.Generator(), torch.Generator()], "method": None}),
        ("expand", {}),
        (
            "bounded",
            {
                "mask_layers": ["up_blocks.1", "up_blocks.2"],
                "guidance": BoundedGuidance(refine_every=0, until=0),
            },
        ),
    ):
        call(case, **options)
        assert pipe_and_calls(CALLS[case][0])[1], case


@pytest.mark.parametrize("family", ["sd15", "sdxl", "small"])
def test_the_grid_of_every_layer_is_known(family: str) -> None:
    pipe = pipe_of(AppearanceTransferPipeline, family)
    layers, seen = attach(pipe, DreamMatcher(), layers=["down", "mid", "up"]).layers, {}

    def see(name: str, module, inputs: tuple, options: dict) -> None:
        seen[name] = (inputs[0] if inputs else options["hidden_states"]).shape[1]

    for name, layer in layers.items():
        layer.register_forward_pre_hook(functools.partial(see, name), with_kwargs=True)
    condition = pipe.conditions("a", 32, 32)[0]
    for size in ((16, 16), (12, 20), (9, 13)):
        with torch.no_grad():
            pipe.predict(torch.zeros(1, 4, *size), torch.tensor(5), condition)
        grids = {name: layer_grid(name, pipe.unet, size) for name in layers}
        assert seen == {name: rows * columns for name, (rows, columns) in grids.items()}, size
