"""Tune the decoder of a VAE to pictures for a while, so that it decodes their textures sharply."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require_count
from .attention_reader import frozen
from .denoising import require_finite

ITERATIONS = 75  # as published
LEARNING_RATE = 1e-4


@contextlib.contextmanager
def tuned_decoder(
    pipe: Any, pictures: Tensor, *, iterations: int = ITERATIONS, learning_rate: float = LEARNING_RATE
) -> Iterator[list[float]]:
    """Tune the decoder of `pipe.vae` to pictures, inside a `with` block.

    min over the decoder's weights of mean |decode(encode(pictures)) - pictures|

    Pixels are in [-1, 1], and the encoder stays as it is. Afterwards the decoder is bit for bit the one
    before, after exceptions too.

    Args:
        pipe: one of the pipelines of this library.
        pictures: float32 [B, 3, H, W] in [0, 1]. All have the same weight.
        iterations: of Adam, each over all pictures. Default 75, as published.
        learning_rate: of Adam. Default 1e-4, as published.

    Yields:
        the loss before each iteration, a list of floats.

    Raises:
        ValueError: an argument is invalid, or the weights of the VAE are not in memory.
        FloatingPointError: latents or loss are NaN or infinite.

    Example:
        >>> from qalign import AttentionDistillationPipeline, tuned_decoder
        >>> pipe = AttentionDistillationPipeline.from_pipe(pipe)
        >>> with tuned_decoder(pipe, appearance[None], iterations=3) as losses:
        ...     picture = pipe(appearance, structure, num_inference_steps=2, output_type="pt").images
        >>> len(losses), picture.shape
        (3, torch.Size([1, 3, 32, 32]))

    Notes:
        The result is deterministic. Inside the block the VAE is float32, and a copy of its decoder is
        tuned, with gradients picture by picture. `pipe.vae.enable_gradient_checkpointing()` saves memory.

    Source: Attention Distillation, arXiv 2502.20235. Deviation: the published code tunes to one picture.
    """
    require_count("iterations", iterations)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: expected a number above 0, got {learning_rate!r}")
    vae = pipe.vae
    if any(parameter.is_meta for parameter in vae.parameters()):
        advice = "enable_model_cpu_offload keeps them in memory"
        raise ValueError(f"vae: expected its weights in memory, got weights offloaded one by one ({advice})")
    original, dtype = vae.decoder, vae.dtype
    with frozen(vae):
        try:
            vae.decoder = copy.deepcopy(original)
            nn.Module.to(vae, torch.float32)  # the one of diffusers gives a wrong warning
            yield _tune(pipe, pictures, iterations, learning_rate)
        finally:
            vae.decoder = original
            nn.Module.to(vae, vae.device, dtype)  # offloading may have moved the rest


def _tune(pipe: Any, pictures: Tensor, iterations: int, learning_rate: float) -> list[float]:
    """Tune `pipe.vae.decoder` in place; the loss before each iteration."""
    vae, losses = pipe.vae, []
    with torch.no_grad():
        latents = pipe._unscaled(pipe.encode(pictures))
    truth = pipe.image_processor.normalize(pictures).to(latents)
    vae.decoder.requires_grad_(True)
    adam = torch.optim.Adam(vae.decoder.parameters(), lr=learning_rate)
    with torch.enable_grad(), pipe.progress_bar(total=iterations) as bar:
        for _ in range(iterations):
            adam.zero_grad()
            total = 0.0
            for row, picture in zip(latents.split(1), truth.split(1)):
                loss = (vae.decode(row, return_dict=False)[0] - picture).abs().mean() / len(truth)
                require_finite(loss, "loss of the decoder", loss.dtype).backward()
                total += loss.item()
            adam.step()
            losses.append(total)
            bar.set_postfix(loss=f"{total:.4g}")
            bar.update()
    adam.zero_grad()
    vae.decoder.requires_grad_(False)
    return losses
