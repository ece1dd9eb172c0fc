"""The decoder of a VAE, tuned to some pictures for a while, so that latents with their textures are decoded sharply."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require_count
from .attention_reader import frozen
from .inversion import require_finite

ITERATIONS = 75  # as published
LEARNING_RATE = 1e-4


@contextlib.contextmanager
def tuned_decoder(
    pipe: Any, pictures: Tensor, *, iterations: int = ITERATIONS, learning_rate: float = LEARNING_RATE
) -> Iterator[list[float]]:
    """`pipe.vae` decodes with weights that reproduce `pictures` meanwhile; afterwards, whatever happened, it is bit for bit as before.

    min over the decoder's weights of mean |decode(encode(pictures)) - pictures|, of pixels in [-1, 1], by Adam; the latents stay as they are.

    >>> with tuned_decoder(pipe, style):
    ...     pictures = pipe(structure, style[0]).images

    Args:
        pipe: one of the pipelines, of which the VAE and `encode` are used.
        pictures: float32 [B, 3, H, W] in [0, 1], each with the same weight.
        iterations: of Adam, over all pictures each; 75 as published.
        learning_rate: 1e-4 as published.

    Yields the loss before each iteration. Nothing is drawn by chance. The VAE is float32 meanwhile, whatever its dtype, and a copy of its decoder
    is tuned; only this copy's parameters have gradients, picture by picture. `pipe.vae.enable_gradient_checkpointing()` saves memory.

    Raises:
        ValueError: a bad argument, named, or a VAE whose weights are not in memory. FloatingPointError: NaN or infinity in latents or loss.
    Source: Attention Distillation, arXiv 2502.20235. Deviation: published code tunes to one picture.
    """
    require_count("iterations", iterations)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: expected a number above 0, got {learning_rate!r}")
    vae = pipe.vae
    if any(parameter.is_meta for parameter in vae.parameters()):
        raise ValueError(
            "vae: expected its weights in memory, got some that are offloaded one by one (enable_model_cpu_offload keeps them)"
        )
    original, dtype = vae.decoder, vae.dtype
    with frozen(vae):
        try:
            vae.decoder = copy.deepcopy(original)
            nn.Module.to(vae, torch.float32)  # that of diffusers warns of what is not so
            yield _tune(pipe, pictures, iterations, learning_rate)
        finally:
            vae.decoder = original
            nn.Module.to(vae, vae.device, dtype)  # offloading may have moved the rest meanwhile


def _tune(pipe: Any, pictures: Tensor, iterations: int, learning_rate: float) -> list[float]:
    """The losses before each iteration of the tuning of `pipe.vae.decoder`."""
    vae, losses = pipe.vae, []
    with torch.no_grad():
        latents = pipe.encode(pictures) / vae.config.scaling_factor
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
