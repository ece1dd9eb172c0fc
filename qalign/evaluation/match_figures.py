"""Figures of matches between two pictures, and the scenes, layer and points that they show by default."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..context.layers import short_name, token_grid
from ..embedded.scenes import BACKGROUNDS, PARTS, held_out_pairs, render, token_labels
from .correspondence import SIGNALS, STRENGTH, Capture, token_centres
from .match_plots import MatchPanel, correspondence, point_heat_maps


def held_out_scenes(seed: int, size: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], str]:
    """Two held-out scenes of a seed: structure and appearance [3, size, size], their labels, and a prompt."""
    pair = held_out_pairs(1, seed)[0]
    scenes = render([pair.structure, pair.appearance], size)
    return (
        scenes.image[0],
        scenes.image[1],
        (scenes.labels[0], scenes.labels[1]),
        f"a photo of a {scenes.plans[0]}",
    )


def choose(captures: Sequence[Capture], side: int) -> Capture:
    """The layer whose number of tokens is nearest to side x side. Of several, the last."""
    return min(reversed(captures), key=lambda capture: abs(capture.query.shape[2] - side * side))


def draw_lines(
    capture: Capture,
    structure: Tensor,
    appearance: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    *,
    most: int = 80,
) -> tuple[Figure, dict[str, float]]:
    """Draw matches by both signals as lines, and return the fraction of right matches by signal.

    With labels, the lines are those of object tokens, and a match is right if it ends in the same part.
    Without labels, the fractions are empty.

    Args:
        capture: the queries and keys of a layer.
        structure, appearance: [3, H, W] in [0, 1], of one size.
        labels: int64 [H, W] of structure and appearance, or None.
        most: the largest number of lines.
    """
    size = (structure.shape[1], structure.shape[2])
    grid = token_grid(size, capture.query.shape[2])
    centres = token_centres(size, grid)
    judged, of_structure, of_appearance = torch.ones(len(centres), dtype=torch.bool), None, None
    if labels is not None:
        of_structure, of_appearance, judged = _judged(labels, grid)
    kept = judged.nonzero().flatten()
    kept = kept[torch.linspace(0, len(kept) - 1, min(most, len(kept))).round().long()]
    panels, shares = [], {}
    for signal, name in SIGNALS.items():
        index = capture.match(signal).index.flatten().long().cpu()
        title, right = f"{name[0].upper()}{name[1:]}", None
        if of_structure is not None and of_appearance is not None:
            agrees = of_appearance[index] == of_structure
            shares[name] = agrees[judged].double().mean().item()
            title, right = (
                f"{title}: {shares[name]:.0%} of {int(judged.sum())} tokens match their own part",
                agrees[kept],
            )
        panels.append(MatchPanel(title, centres[kept], centres[index[kept]], right))
    note = f"{len(kept)} tokens as lines, coloured by where they begin."
    if labels is not None:
        note = f"{len(kept)} tokens of the object as lines: green if they end in the same part, red if not."
    title = f"Matches in {short_name(capture.layer)}, {grid[0]} x {grid[1]} tokens"
    return correspondence(structure, appearance, panels, title=title, note=note), shares


def draw_heat_maps(
    capture: Capture,
    structure: Tensor,
    appearance: Tensor,
    points: Tensor,
    labels: tuple[Tensor, Tensor] | None,
) -> Figure:
    """Draw where the tokens under `points` [P, 2] look, by both signals.

    With labels, each map says how much of it is in the part of the point.
    """
    size = (structure.shape[1], structure.shape[2])
    grid = token_grid(size, capture.query.shape[2])
    tokens = torch.cdist(points.float(), token_centres(size, grid)).argmin(1).tolist()
    maps = {
        SIGNALS[signal]: torch.stack([capture.heat(token, signal).cpu().reshape(grid) for token in tokens])
        for signal in reversed(SIGNALS)
    }
    note = f"Softmax over the appearance of q·k (mean of heads) and of {STRENGTH:g} cos(q, q). Cross: peak."
    captions = None
    if labels is not None:
        of_structure, of_appearance, _ = _judged(labels, grid)
        parts = [int(of_structure[token]) for token in tokens]
        captions = {
            name: [
                f"{PARTS[part]}: {heat.flatten()[of_appearance == part].sum():.0%}"
                for part, heat in zip(parts, heats)
            ]
            for name, heats in maps.items()
        }
        note += " In the corner: the part of the point, and how much of the map lies on it."
    title = f"Where a point looks in {short_name(capture.layer)}"
    return point_heat_maps(structure, appearance, points, maps, title=title, note=note, captions=captions)


def default_points(
    capture: Capture, structure: Tensor, labels: tuple[Tensor, Tensor] | None, most: int = 3
) -> Tensor:
    """Points [P, 2] in the largest object parts of both scenes, or on the diagonal without labels."""
    height, width = structure.shape[1:]
    if labels is None:
        return torch.stack([torch.linspace(0, side, most + 2)[1:-1] for side in (width, height)], -1)
    grid = token_grid((height, width), capture.query.shape[2])
    centres, (of_structure, _, judged) = token_centres((height, width), grid), _judged(labels, grid)
    parts, sizes = of_structure[judged].unique(return_counts=True)
    points = []
    for part in parts[sizes.argsort(descending=True)][:most]:
        inside = centres[of_structure == part]
        points.append(inside[(inside - inside.mean(0)).norm(dim=1).argmin()])
    return torch.stack(points)


def _judged(labels: tuple[Tensor, Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token labels [N] of structure and appearance, and which tokens of the structure can be judged.

    These are the tokens of an object part that the appearance shows too.
    """
    of_structure, of_appearance = token_labels(torch.stack(labels), grid).long()
    return (
        of_structure,
        of_appearance,
        (of_structure >= len(BACKGROUNDS)) & torch.isin(of_structure, of_appearance),
    )
