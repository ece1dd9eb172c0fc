"""Measure a picture of the embedded model: the colours of its parts, and its layout.

Part labels are indices into `qalign.embedded.scenes.PARTS`. The layout is read from the picture by the
model's own features.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qalign_kernels import similarity_argmax

from ..context.layers import token_grid
from ..embedded.scenes import BACKGROUNDS, PARTS, Scenes, token_labels
from .noised_features import noised_features

COLOURED = 1e-3  # a part has a colour if it covers this fraction of the picture
LAYOUT_NOISE = 0.4  # of the training timesteps, at which the layout of a finished picture is read
OBJECT = slice(len(BACKGROUNDS), None)


def part_colours(picture: Tensor, labels: Tensor) -> Tensor:
    """The mean colour of each part of a picture [3, S, S]: float64 [PARTS, 3], NaN if hardly in view.

    >>> from qalign.embedded.scenes import render
    >>> scene = render([3], 32)
    >>> part_colours(scene.image[0], scene.labels[0]).shape
    torch.Size([12, 3])
    """
    members = F.one_hot(labels.flatten(), len(PARTS)).double()
    pixels = members.sum(0).unsqueeze(1)
    return torch.where(
        pixels >= COLOURED * labels.numel(), members.T @ picture.double().flatten(1).T / pixels, torch.nan
    )


def colour_error(picture: Tensor, labels: Tensor, appearance: Tensor, appearance_labels: Tensor) -> Tensor:
    """The Euclidean RGB distance between the mean colours of each part: float64 [PARTS].

    It is NaN for a part that one of the pictures does not show.

    Args:
        picture: [3, S, S].
        labels: int64 [S, S], where the parts of `picture` should be. For a transferred picture, the
            structure's labels.
        appearance: [3, S, S].
        appearance_labels: int64 [S, S].
    """
    return (part_colours(picture, labels) - part_colours(appearance, appearance_labels)).norm(dim=-1)


def part_iou(found: Tensor, truth: Tensor) -> float:
    """Intersection over union of two label maps [N], averaged over the parts of `truth`."""
    found, truth = (F.one_hot(labels.long(), len(PARTS)).bool() for labels in (found, truth))
    both, either = (found & truth).sum(0).double(), (found | truth).sum(0).double()
    return (both / either)[truth.any(0)].mean().item()


def read_layouts(
    pipe: Any, pictures: Mapping[str, Tensor], scenes: Scenes, prompt: str, *, seed: int
) -> dict[str, float]:
    """The mean part IoU between the structure's layout and the layout of each picture [3, S, S].

    `read_parts` reads the layouts by the two scenes (appearance, structure). The result is averaged over the
    decoder's layers.
    """
    read = read_parts(pipe, torch.stack(list(pictures.values())), scenes, prompt, seed=seed)
    scores = torch.zeros(len(pictures), dtype=torch.float64)
    for found in read.values():
        structure = token_labels(scenes.labels[1:], token_grid(scenes.labels.shape[1:], found.shape[1]))[
            0
        ].cpu()
        scores += torch.tensor([part_iou(row, structure) for row in found], dtype=torch.float64)
    return dict(zip(pictures, (scores / len(read)).tolist()))


def read_parts(pipe: Any, pictures: Tensor, scenes: Scenes, prompt: str, *, seed: int) -> dict[str, Tensor]:
    """Read which part each token of a picture shows, by the model's own features.

    A token of a noised picture takes the label of the most similar token of the noised scenes, by joint
    cosine similarity of queries.

    Args:
        pipe: an `AppearanceTransferPipeline`.
        pictures: [B, 3, S, S] in [0, 1]. They share one noise, so they differ only in what they show.
        scenes: scenes with known labels; each has a noise of its own.
        prompt: of all pictures and scenes.
        seed: of the noise.

    Returns:
        By self-attention layer of the decoder, int32 [B, N] on the CPU.
    """
    timestep = int(LAYOUT_NOISE * pipe.scheduler.config.num_train_timesteps)
    count, known = len(pictures), len(scenes.image)
    seeds = [seed] * count + [seed + number for number in range(1, known + 1)]
    rows = torch.cat([pictures, scenes.image])
    kept = noised_features(pipe, rows, torch.full((len(rows),), timestep), prompt, seeds=seeds)
    found = {}
    for layer, (q, _, _) in kept.items():
        labels = token_labels(scenes.labels, token_grid(scenes.labels.shape[1:], q.shape[2])).cpu().flatten()
        joined = q[count:].transpose(0, 1).flatten(1, 2)[None]  # [1, H, known · N, D]
        index = similarity_argmax(
            q[:count], joined, batch_index=torch.zeros(count, dtype=torch.int32, device=q.device)
        ).index
        found[layer] = labels[index[:, 0].long().cpu()]
    return found
