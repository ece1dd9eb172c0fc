"""What callbacks may return, in all pipelines, and that no call returns NaN."""

import functools

import pytest
import torch

from qalign import AttentionDistillationPipeline, BoundedAttentionPipeline
from qalign.pipelines.base import StepCallback
from tests.pipelines.transfers import make, pictures, seeded, transfer
from tests.processors.models import pipe_of

NAN = float("nan")


@functools.cache
def pipe(kind):
    return (
        make()
        if kind == "transfer"
        else pipe_of({"bound": BoundedAttentionPipeline}.get(kind, AttentionDistillationPipeline))
    )


def call(kind, **options):
    options = {"output_type": "latent", "generator": seeded()} | options
    if kind == "transfer":
        return transfer(
            pipe(kind), **{"num_inference_steps": 3, "method": None, "adain": None} | options
        ).images
    if kind == "bound":
        subjects = [("ox", (0.0, 0.0, 0.5, 1.0))]
        return pipe(kind)("an ox", subjects, num_inference_steps=2, layers="up", **options).images
    if kind == "expand":
        return (
            pipe(kind).expand(pictures(1)[0], 32, 32, num_inference_steps=2, iterations=1, **options).images
        )
    return pipe(kind)(
        pictures(1)[0], num_inference_steps=2, iterations=1, mode=kind, content=pictures(1)[0], **options
    ).images


KINDS = ["transfer", "bound", "optimise", "expand"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_function_is_refused_before_work(kind, monkeypatch):
    def work(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(pipe(kind).unet, "forward", work)
    monkeypatch.setattr(pipe(kind).vae, "encode", work)
    with pytest.raises(TypeError, match="^callback_on_step_end: expected a function or None, got 3$"):
        call(kind, callback_on_step_end=3)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_latents_raises_with_any_output(kind):
    """In the last step no prediction comes after it."""

    def spoil(pipe, step, timestep, given):
        return {"latents": given["latents"] * NAN} if step == 1 else None

    with pytest.raises(FloatingPointError, match="^latents"):
        call(kind, callback_on_step_end=spoil)


@pytest.mark.parametrize("kind", ["transfer", "bound"])
def test_nan_written_in_place_raises(kind):
    """These pipelines give the callback the latents of the loop."""

    def spoil(pipe, step, timestep, given):
        if step == 1:
            given["latents"].fill_(NAN)

    with pytest.raises(FloatingPointError, match="^latents: expected finite values"):
        call(kind, callback_on_step_end=spoil)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (3, TypeError, "a dict or None from it, got int"),
        (torch.zeros(1), TypeError, "a dict or None from it, got Tensor"),
        ({"latents": 3}, TypeError, "latents of floating point from it, got int"),
        (
            {"latents": torch.zeros(1, 4, 8, 8, dtype=torch.long)},
            TypeError,
            "latents of floating point .* got torch.int64",
        ),
        ({"latents": torch.zeros(2, 4, 8, 8)}, ValueError, r"latents \[1, 4, 8, 8\], got \[2, 4, 8, 8\]"),
        (
            {"prompt_embeds": 3, "latents": None},
            ValueError,
            "a dict of latents alone from it, got prompt_embeds",
        ),
    ],
)
def test_wrong_returns_are_named_in_one_line(returned, error, message):
    callback = StepCallback(lambda *given: returned, ("latents",))
    with pytest.raises(error, match=f"^callback_on_step_end: expected {message}$"):
        callback(None, 0, 0, torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("returned", [None, {}, {"latents": None}])
def test_nothing_keeps_the_latents(returned):
    assert StepCallback(lambda *given: returned, ())(None, 0, 0, torch.zeros(1, 4, 8, 8)) is None


def test_returned_latents_take_the_loops_dtype():
    callback = StepCallback(lambda *given: {"latents": torch.ones(1, 4, 8, 8, dtype=torch.float16)}, ())
    assert callback(None, 0, 0, torch.zeros(1, 4, 8, 8)).dtype == torch.float32
