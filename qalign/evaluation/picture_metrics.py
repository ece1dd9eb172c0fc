"""What a picture of the embedded model shows, measured: the colours of its parts, and its layout.

Part labels are those of `qalign.embedded.scenes.PARTS`; a layout is read from the picture by the model itself.
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

COLOURED = 1e-3  # a part has a colour where it covers this share of the picture
LAYOUT_NOISE = 0.4  # of the training timesteps, at which the layout of a finished picture is read
OBJECT = slice(len(BACKGROUNDS), None)


def part_colours(picture: Tensor, labels: Tensor) -> Tensor:
    """The mean colour of each part of a picture [3, S, S]: float64 [PARTS, 3], NaN for parts that are (nearly) out of view."""
    members = F.one_hot(labels.flatten(), len(PARTS)).double()
    pixels = members.sum(0).unsqueeze(1)
    return torch.where(
        pixels >= COLOURED * labels.numel(), members.T @ picture.double().flatten(1).T / pixels, torch.nan
    )


def colour_error(picture: Tensor, labels: Tensor, appearance: Tensor, appearance_labels: Tensor) -> Tensor:
    """Euclidean RGB distance between the mean colours of each part: float64 [PARTS], NaN unless both show it.

    `labels` says where the parts of `picture` ought to be: for a transferred picture, the structure's labels.
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
    """Mean part IoU between the structure's layout and that of each picture [3, S, S], as `read_parts` sees it by the two scenes (appearance,
    structure). Averaged over the decoder's layers.
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
    """The part that each token of some pictures shows, as the model itself sees it: int32 [B, N] on the CPU, by self-attention layer of the decoder.

    A token of a noised picture takes the label of that token of the scenes, noised on their own, whose queries are most alike by joint cosine
    similarity.

    Args:
        pictures: [B, 3, S, S] in [0, 1], which share one noise, so that they are compared by what they show.
        scenes: whose labels are known.
        prompt: of all of them.
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
