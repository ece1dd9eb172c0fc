"""Measure whether a model's own self-attention stays in its part, which makes it fit to measure leakage."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qalign_kernels import label_mass

from ..context.layers import decoder_layers, picture_size, short_name, token_grid
from ..processors.unet import project
from .scenes import BACKGROUNDS, PARTS, held_out_seed, render, token_labels

TIMESTEPS = (100, 300, 500, 700)
MID_TIMESTEPS = (300, 500)


@torch.no_grad()
def self_attention_fitness(
    pipe: Any, scenes: int = 48, timesteps: Sequence[int] = TIMESTEPS, batch: int = 16
) -> list[dict[str, Any]]:
    """Measure where self-attention without edits goes in held-out scenes, for each layer and noise level.

    The figures are means over the queries on a creature and over heads. `own_part_mass` is the attention
    mass on keys of the query's own part, in any individual. `own_part_mass_by_part` weighs every part
    alike. `object_to_background` is the mass on the background. A token has the label of most of its
    pixels.

    Args:
        pipe: a Stable Diffusion pipeline trained on the scenes.
        scenes: number of held-out scenes.
        timesteps: noise levels, of the scheduler's 1000.
        batch: number of scenes in one call of the network.

    Returns:
        One row for each layer and timestep.
    """
    layers = {name: module for name, module in pipe.unet.named_modules() if name.endswith("attn1")}
    masses: dict[tuple[str, int], list[Tensor]] = {}
    for first in range(0, scenes, batch):
        seeds = [held_out_seed(10**9 + number) for number in range(first, min(first + batch, scenes))]
        drawn = render(seeds, picture_size(pipe))
        latents = (
            pipe.vae.encode(pipe.image_processor.preprocess(drawn.image)).latent_dist.mode()
            * pipe.vae.config.scaling_factor
        )
        tokens = pipe.tokenizer(
            list(drawn.captions), padding="max_length", truncation=True, return_tensors="pt"
        )
        text = pipe.text_encoder(tokens.input_ids)[0]
        for timestep in timesteps:
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(first + timestep))
            noisy = pipe.scheduler.add_noise(latents, noise, torch.tensor([timestep]))
            with contextlib.ExitStack() as stack:
                for name, module in layers.items():
                    observe = functools.partial(
                        _observe, masses.setdefault((name, timestep), []), drawn.labels
                    )
                    stack.callback(module.register_forward_pre_hook(observe).remove)
                pipe.unet(noisy, timestep, encoder_hidden_states=text)
    return [_row(layer, timestep, torch.cat(parts)) for (layer, timestep), parts in masses.items()]


def best_decoder_layer(
    rows: Sequence[dict[str, Any]], timesteps: Sequence[int] = MID_TIMESTEPS
) -> dict[str, Any]:
    """The decoder layer with the most mass in the own part, with its figures averaged over `timesteps`."""
    figures = ("own_part_mass", "own_part_mass_by_part", "object_to_background")
    best: dict[str, Any] = {}
    for layer in dict.fromkeys(decoder_layers([row["layer"] for row in rows])):
        of_layer = [row for row in rows if row["layer"] == layer and row["timestep"] in timesteps]
        mean = {figure: sum(row[figure] for row in of_layer) / len(of_layer) for figure in figures}
        if not best or mean["own_part_mass"] > best["own_part_mass"]:
            best = {"layer": layer, "tokens": of_layer[0]["tokens"], **mean}
    return best


def _observe(into: list[Tensor], labels: Tensor, attn: nn.Module, inputs: Any) -> None:
    into.append(_own_and_background(attn, inputs[0], labels))


def _own_and_background(attn: Any, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """[object queries, 4]: number of tokens, label, own-part mass, background mass."""
    q, k, _ = project(attn, hidden_states, None)
    label = token_labels(labels, token_grid(labels.shape[1:], q.shape[2]))
    mass = label_mass(q, k, label, len(PARTS), scale=attn.scale).mean(1)
    own = mass.gather(-1, label.long().unsqueeze(-1)).squeeze(-1)
    background = mass[..., : len(BACKGROUNDS)].sum(-1)
    figures = torch.stack([torch.full_like(own, q.shape[2]), label.float(), own, background], -1)
    return figures[label >= len(BACKGROUNDS)]


def _row(layer: str, timestep: int, queries: Tensor) -> dict[str, Any]:
    tokens, label, own, background = queries.unbind(-1)
    by_part = [own[label == part].mean().item() for part in label.unique()]
    return {
        "layer": short_name(layer),
        "tokens": int(tokens[0]),
        "timestep": timestep,
        "own_part_mass": round(own.mean().item(), 4),
        "own_part_mass_by_part": round(sum(by_part) / len(by_part), 4),
        "object_to_background": round(background.mean().item(), 4),
    }
