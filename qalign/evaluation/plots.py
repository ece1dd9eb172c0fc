"""Pictures of transfers, correspondences, attention and leakage. Needs matplotlib (the extras `demo` and `bench` bring it).

Each function returns a figure of its own and leaves matplotlib's global state alone: `figure.savefig("grid.png")`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from ..context.layers import short_name
from .images import Picture, label_picture, palette, to_array

RIGHT = "#1a9e77"
WRONG = "#d1495b"
GREY = "#6b7280"
CURVES = (RIGHT, "#3b6fb6", GREY, "#c77d1e", "#8a4fb0")
DPI = 110
CAPTION: dict[str, Any] = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 2.5}
TITLE: dict[str, Any] = {"fontsize": 13, "weight": "bold", "va": "top"}
NOTE: dict[str, Any] = {"fontsize": 8.5, "color": GREY, "va": "bottom", "linespacing": 1.4}


@dataclass(frozen=True, eq=False)
class MatchPanel:
    """Matches to draw as lines between two pictures.

    Attributes:
        title: above the pictures.
        source, target: [n, 2] pixel coordinates (x, y) in the left and the right picture.
        right: bool [n], which of them are right; None where that is not known.
    """

    title: str
    source: Tensor
    target: Tensor
    right: Tensor | None = None


def _hex(label: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*palette(label + 1)[label])


def transfer_grid(rows: Sequence[Mapping[str, Picture]], *, title: str = "", note: str = "") -> Figure:
    """Pictures in rows under shared column titles, such as structure, appearance and the output of each method.

    Raises:
        ValueError: no row, or rows with different columns.
    """
    if not rows or any(list(row) != list(rows[0]) for row in rows):
        raise ValueError(
            f"rows: expected one or more with the same columns, got {[list(row) for row in rows]}"
        )
    columns = list(rows[0])
    figure, axes = _panels(
        len(rows), len(columns), title=title, note=note, aspect=_shape(rows[0][columns[0]])
    )
    for line, row in zip(axes, rows):
        for place, name in zip(line, columns):
            place.imshow(to_array(row[name]), interpolation="lanczos")
    for place, name in zip(axes[0], columns):
        place.set_title(name, fontsize=10.5)
    return figure


def comparison_grid(
    pictures: Mapping[str, Picture], *, columns: int = 4, title: str = "", note: str = ""
) -> Figure:
    """Pictures under titles of their own, so many to a row; a title's lines after the first are small."""
    lines = -(-len(pictures) // columns)
    figure, axes = _panels(
        lines, columns, title=title, note=note, aspect=_shape(next(iter(pictures.values()))), gap=0.68
    )
    places = [place for line in axes for place in line]
    for place, (name, picture) in zip(places, pictures.items()):
        place.imshow(to_array(picture), interpolation="lanczos")
        head, *more = name.split("\n")
        place.set_title(head, fontsize=10, pad=6 + 12 * len(more))
        place.text(
            0.5,
            1.03,
            "\n".join(more),
            transform=place.transAxes,
            ha="center",
            va="bottom",
            fontsize=7,
            color=GREY,
        )
    return figure


def contact_sheet(
    pictures: Sequence[Picture],
    labels: Sequence[Tensor],
    captions: Sequence[str],
    *,
    names: Sequence[str],
    title: str = "",
) -> Figure:
    """Each picture [3, H, W] above its labels [H, W], six to a row, with a legend of the labels that occur."""
    columns = min(6, len(pictures))
    lines = -(-len(pictures) // columns)
    height, width = labels[0].shape
    figure, axes = _panels(
        lines, columns, title=title, legend=0.4, aspect=(2 * height + height // 32, width), cell=1.9, gap=0.36
    )
    for number, (picture, label, caption) in enumerate(zip(pictures, labels, captions)):
        place = axes[number // columns][number % columns]
        gap = numpy.ones((height // 32, width, 3), "float32")
        place.imshow(numpy.concatenate([to_array(picture), gap, to_array(label_picture(label))]))
        place.set_title("\n".join(textwrap.wrap(caption, 36)), fontsize=6.3, color=GREY)
    present = torch.cat([label.flatten() for label in labels]).unique().tolist()
    handles = [Patch(facecolor=_hex(label), edgecolor=GREY, lw=0.4, label=names[label]) for label in present]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(len(handles), 2 * columns),
        frameon=False,
        fontsize=8,
        handlelength=1.2,
    )
    return figure


def correspondence(
    left: Picture,
    right: Picture,
    panels: Sequence[MatchPanel],
    *,
    title: str,
    note: str = "",
    curves: Mapping[str, Tensor] | None = None,
    tolerance: float = 0.0,
) -> Figure:
    """One row per panel with lines between the two pictures, which are of one size: green right, red wrong, by place where that is not known.

    Args:
        curves: name -> errors in pixels of all matches, drawn beside the panels as the share within a distance; "chance" is dashed.
        tolerance: pixels, marked in the curves.
    """
    first, second = to_array(left), to_array(right)
    gap = first.shape[1] // 16
    pictures = numpy.concatenate([first, numpy.ones((first.shape[0], gap, 3), first.dtype), second], axis=1)
    wide = pictures.shape[1] / pictures.shape[0]
    below = 1.05 if curves else 0.65 if note else 0.15
    width, height = 4.1 * wide + (4.4 if curves else 0) + 0.5, 4.5 * len(panels) + 0.65 + below
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    bounds = {
        "left": 0.2 / width,
        "right": 1 - 0.2 / width,
        "top": 1 - 0.9 / height,
        "bottom": below / height,
    }
    grid = figure.add_gridspec(
        len(panels),
        2 if curves else 1,
        width_ratios=(4.1 * wide, 3.9) if curves else None,
        wspace=0.14,
        hspace=0.1,
        **bounds,
    )
    figure.text(0.2 / width, 1 - 0.2 / height, title, **TITLE)
    figure.text(0.2 / width, 0.12 / height, note, **NOTE)
    for row, panel in enumerate(panels):
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
    """A row for each point: where it lies in the structure picture, and each of its maps laid over the appearance picture.

    Args:
        points: [P, 2] pixel coordinates (x, y) in the structure picture.
        maps: column title -> [P, h, w], such as the softmax over the similarities of one query; each is shown relative to its peak.
        captions: column title -> a text for each point, written into its map.
    """
    shape = _shape(structure)
    figure, axes = _panels(len(points), 1 + len(maps), title=title, note=note, aspect=shape)
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


def leakage_by_layer_and_step(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    title: str,
    ylabel: str,
    threshold: float | None = None,
    note: str = "",
) -> Figure:
    """A panel for each layer with a line for each method: method -> layer -> (step, leakage).

    Args:
        threshold: where a pair counts as leaking, dotted.
    """
    layers = list(dict.fromkeys(layer for of_method in curves.values() for layer in of_method))
    columns = min(4, len(layers))
    lines = -(-len(layers) // columns)
    width, height = 0.9 + 3.1 * columns, 1.5 + 2.3 * lines
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    bounds = {
        "left": 0.75 / width,
        "right": 1 - 0.2 / width,
        "top": 1 - 1.1 / height,
        "bottom": 0.75 / height,
    }
    axes = figure.subplots(
        lines,
        columns,
        sharex=True,
        sharey=True,
        squeeze=False,
        gridspec_kw={**bounds, "wspace": 0.08, "hspace": 0.3},
    )
    for number, place in enumerate(axes.flat):
        if number >= len(layers):
            place.set_axis_off()
            continue
        for (method, of_method), colour in zip(curves.items(), (WRONG, RIGHT, *CURVES[1:])):
            steps, values = zip(*of_method.get(layers[number], [(numpy.nan, numpy.nan)]))
            place.plot(steps, values, color=colour, lw=2, marker="o", ms=3.5, label=method)
        if threshold is not None:
            place.axhline(threshold, color=GREY, lw=0.9, ls=":")
        place.set_title(short_name(layers[number]), fontsize=9, loc="left")
        place.set_ylim(0, 1)
        place.tick_params(labelbottom=number + columns >= len(layers))
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=9.5, y=0.36 / height)
    figure.supylabel(ylabel, fontsize=9.5, x=0.16 / width)
    figure.text(0.2 / width, 1 - 0.2 / height, title, **TITLE)
    figure.text(0.2 / width, 0.1 / height, note, **NOTE)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(0.1 / width, 1 - 0.46 / height),
        ncols=len(names),
        frameon=False,
        fontsize=9.5,
    )
    return figure


def _panels(
    rows: int,
    columns: int,
    *,
    title: str,
    note: str = "",
    aspect: tuple[int, int] = (1, 1),
    cell: float = 2.6,
    gap: float = 0.12,
    legend: float = 0,
) -> tuple[Figure, list[list[Axes]]]:
    """Empty frames without ticks, `cell` inches wide, under a title and above a note and `legend` inches."""
    tall = cell * aspect[0] / aspect[1]
    width = cell * columns + 0.12 * (columns - 1) + 0.24
    note = "\n".join(textwrap.wrap(note, round(15.5 * width)))
    above, below = 0.4 + (0.42 if title else 0), 0.12 + 0.2 * (note.count("\n") + 1 if note else 0) + legend
    height = tall * rows + gap * (rows - 1) + above + below
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    bounds = {
        "left": 0.12 / width,
        "right": 1 - 0.12 / width,
        "top": 1 - above / height,
        "bottom": below / height,
    }
    axes = figure.subplots(
        rows, columns, squeeze=False, gridspec_kw={**bounds, "wspace": 0.12 / cell, "hspace": gap / tall}
    )
    for place in axes.flat:
        place.set_axis_off()
    figure.text(0.12 / width, 1 - 0.14 / height, title, **TITLE)
    figure.text(0.12 / width, 0.08 / height, note, **NOTE)
    return figure, axes.tolist()


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
        ylabel="share of matches within it",
    )
    axes.set_title(
        f"All {len(next(iter(curves.values())))} tokens whose truth is known", fontsize=10.5, loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.1, 0.93), fontsize=9)


def _shape(picture: Picture) -> tuple[int, int]:
    return (
        (picture.height, picture.width)
        if isinstance(picture, Image.Image)
        else (picture.shape[1], picture.shape[2])
    )


def _resize(heat: Tensor, shape: tuple[int, int]) -> Any:
    """[h, w] relative to its peak, as smooth [H, W]."""
    large = torch.nn.functional.interpolate(
        heat[None, None].float(), shape, mode="bicubic", align_corners=False
    )[0, 0]
    return (large / heat.max().clamp(min=1e-12)).clamp(0, 1).numpy()
