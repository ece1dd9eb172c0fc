"""Plots of matches: lines between two pictures, and heat maps of single points. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .images import Picture, to_array
from .plots import CAPTION, CURVES, DPI, GREY, NOTE, RIGHT, TITLE, WRONG, panels, shape_of


@dataclass(frozen=True, eq=False)
class MatchPanel:
    """Matches to draw as lines between two pictures.

    Attributes:
        title: above the pictures.
        source, target: [n, 2] pixel coordinates (x, y) in the left and the right picture.
        right: bool [n], which matches are right; None if this is not known.
    """

    title: str
    source: Tensor
    target: Tensor
    right: Tensor | None = None


def correspondence(
    left: Picture,
    right: Picture,
    matches: Sequence[MatchPanel],
    *,
    title: str,
    note: str = "",
    curves: Mapping[str, Tensor] | None = None,
    tolerance: float = 0.0,
) -> Figure:
    """Draw matches as lines between two pictures, one row for each panel.

    Right matches are green and wrong ones red. Lines that are neither have a colour by their place.

    Args:
        left, right: pictures of one size.
        matches: the panels.
        title: above the panels.
        note: below the panels.
        curves: name -> errors in pixels of all matches, drawn beside the panels as the fraction within a
            distance. The curve "chance" is dashed.
        tolerance: a distance in pixels, marked in the curves.
    """
    first, second = to_array(left), to_array(right)
    gap = first.shape[1] // 16
    pictures = numpy.concatenate([first, numpy.ones((first.shape[0], gap, 3), first.dtype), second], axis=1)
    wide = pictures.shape[1] / pictures.shape[0]
    below = 1.05 if curves else 0.65 if note else 0.15
    width, height = 4.1 * wide + (4.4 if curves else 0) + 0.5, 4.5 * len(matches) + 0.65 + below
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    bounds = {
        "left": 0.2 / width,
        "right": 1 - 0.2 / width,
        "top": 1 - 0.9 / height,
        "bottom": below / height,
    }
    grid = figure.add_gridspec(
        len(matches),
        2 if curves else 1,
        width_ratios=(4.1 * wide, 3.9) if curves else None,
        wspace=0.14,
        hspace=0.1,
        **bounds,
    )
    figure.text(0.2 / width, 1 - 0.2 / height, title, **TITLE)
    figure.text(0.2 / width, 0.12 / height, note, **NOTE)
    for row, panel in enumerate(matches):
        axes = figure.add_subplot(grid[row, 0])
        axes.imshow(0.4 + 0.6 * pictures, interpolation="bilinear")
        axes.autoscale(False)
        _draw_lines(axes, panel, first.shape[1] + gap)
        axes.set_title(panel.title, fontsize=10.5, loc="left")
        axes.set_axis_off()
        axes.set_anchor("W")
    if curves:
        _draw_curves(figure.add_subplot(grid[:, 1]), curves, tolerance, first.shape[1])
    return figure


def point_heat_maps(
    structure: Picture,
    appearance: Picture,
    points: Tensor,
    maps: Mapping[str, Tensor],
    *,
    title: str,
    note: str = "",
    captions: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Draw a row for each point: the point in the structure, and its maps over the appearance.

    Args:
        structure, appearance: pictures of one size.
        points: [P, 2] pixel coordinates (x, y) in the structure picture.
        maps: column title -> [P, h, w], such as the attention of one query. Each map is scaled by its peak.
        title: above the rows.
        note: below the rows.
        captions: column title -> a text for each point, written into its map.
    """
    shape = shape_of(structure)
    figure, axes = panels(len(points), 1 + len(maps), title=title, note=note, aspect=shape)
    grey = to_array(appearance).mean(-1, keepdims=True) * 0.75 + 0.1
    for row, point in enumerate(points.tolist()):
        axes[row][0].imshow(to_array(structure), interpolation="lanczos")
        axes[row][0].plot(*point, "o", ms=9, mfc="none", mec="white", mew=3.2)
        axes[row][0].plot(*point, "o", ms=9, mfc="none", mec=WRONG, mew=1.8)
        for place, (name, values) in zip(axes[row][1:], maps.items()):
            heat = _resize(values[row], shape)
            shown = colormaps["inferno"](heat)[..., :3]
            weight = numpy.sqrt(heat)[..., None] * 0.9
            place.imshow(grey * (1 - weight) + shown * weight, interpolation="lanczos")
            peak = divmod(int(values[row].argmax()), values.shape[-1])
            centre = [
                (index + 0.5) * extent / cells - 0.5
                for index, extent, cells in zip(peak, shape, values.shape[1:])
            ]
            place.plot(centre[1], centre[0], "+", ms=10, mec="#38e1ff", mew=1.6)
            if captions is not None:
                place.text(
                    0.03,
                    0.03,
                    captions[name][row],
                    transform=place.transAxes,
                    fontsize=8.5,
                    color="white",
                    bbox=CAPTION,
                )
    for place, name in zip(axes[0], ["structure: the point", *maps]):
        place.set_title(name, fontsize=10)
    return figure


def _draw_lines(axes: Axes, panel: MatchPanel, offset: int) -> None:
    if panel.right is None:
        styles = [(colour, 1.1, 0.85) for colour in colormaps["turbo"](panel.source[:, 0].numpy() / offset)]
    else:
        styles = [(RIGHT, 1.3, 0.9) if right else (WRONG, 0.7, 0.4) for right in panel.right.tolist()]
    for (x, y), (to_x, to_y), (colour, width, alpha) in zip(
        panel.source.tolist(), panel.target.tolist(), styles
    ):
        axes.plot(
            (x, to_x + offset),
            (y, to_y),
            color=colour,
            lw=width,
            alpha=alpha,
            marker="o",
            ms=3,
            mew=0,
            zorder=2 + width,
        )


def _draw_curves(axes: Axes, curves: Mapping[str, Tensor], tolerance: float, size: int) -> None:
    for (name, errors), colour in zip(curves.items(), CURVES):
        ordered = errors.double().sort().values
        share = torch.arange(1, len(ordered) + 1) / len(ordered)
        axes.plot(
            ordered.numpy(),
            share.numpy(),
            color=colour,
            lw=2,
            label=name,
            ls="--" if name == "chance" else "-",
        )
    axes.axvline(tolerance, color=GREY, lw=0.8, ls=":")
    axes.annotate(
        "one token",
        (tolerance, 0.97),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8.5,
        color=GREY,
        va="top",
    )
    axes.set(
        xlim=(0, 0.6 * size),
        ylim=(0, 1),
        xlabel="distance from the true position, pixels",
        ylabel="fraction of matches within it",
    )
    axes.set_title(
        f"All {len(next(iter(curves.values())))} tokens with a known position", fontsize=10.5, loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.1, 0.93), fontsize=9)


def _resize(heat: Tensor, shape: tuple[int, int]) -> Any:
    """Scale a map [h, w] by its peak, and resize it smoothly to [H, W]."""
    large = torch.nn.functional.interpolate(
        heat[None, None].float(), shape, mode="bicubic", align_corners=False
    )[0, 0]
    return (large / heat.max().clamp(min=1e-12)).clamp(0, 1).numpy()
