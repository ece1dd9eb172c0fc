"""Plots of transfers, scenes and leakage. They need matplotlib, which the extras `demo` and `bench` install.

Each function returns a new figure and does not touch matplotlib's global state. Save it by
`figure.savefig("grid.png")`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
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


def _hex(label: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*palette(label + 1)[label])


def transfer_grid(rows: Sequence[Mapping[str, Picture]], *, title: str = "", note: str = "") -> Figure:
    """Draw pictures in rows under shared column titles, such as structure, appearance and each method.

    Args:
        rows: for each row, column title -> picture.
        title: above the grid.
        note: below the grid.

    Raises:
        ValueError: there is no row, or rows have different columns.

    >>> rows = [{"structure": structure, "appearance": appearance}]
    >>> len(transfer_grid(rows, title="two pictures").axes)
    2
    """
    if not rows or any(list(row) != list(rows[0]) for row in rows):
        raise ValueError(
            f"rows: expected one or more with the same columns, got {[list(row) for row in rows]}"
        )
    columns = list(rows[0])
    figure, axes = panels(
        len(rows), len(columns), title=title, note=note, aspect=shape_of(rows[0][columns[0]])
    )
    for line, row in zip(axes, rows):
        for place, name in zip(line, columns):
            place.imshow(to_array(row[name]), interpolation="lanczos")
    for place, name in zip(axes[0], columns):
        place.set_title(name, fontsize=10.5)
    return figure


def comparison_grid(
    pictures: Mapping[str, Picture], *, columns: int = 5, title: str = "", note: str = ""
) -> Figure:
    """Draw each picture under its title, `columns` to a row. The later lines of a title are small."""
    lines = -(-len(pictures) // columns)
    figure, axes = panels(
        lines,
        columns,
        title=title,
        note=note,
        aspect=shape_of(next(iter(pictures.values()))),
        gap=0.68,
        head=0.3,
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
    """Draw each picture [3, H, W] above its labels [H, W], six to a row, with a legend of these labels."""
    columns = min(6, len(pictures))
    lines = -(-len(pictures) // columns)
    height, width = labels[0].shape
    figure, axes = panels(
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


def leakage_by_layer_and_step(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    title: str,
    ylabel: str,
    threshold: float | None = None,
    note: str = "",
) -> Figure:
    """Draw a panel for each layer with a line for each method.

    Args:
        curves: method -> layer -> [(step, leakage)].
        title: above the panels.
        ylabel: of the leakage.
        threshold: the leakage above which a pair leaks, as a dotted line.
        note: below the panels.
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
        _draw_layer(place, curves, layers[number], threshold)
        place.tick_params(labelbottom=number + columns >= len(layers))
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


def _draw_layer(
    axes: Axes,
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    layer: str,
    threshold: float | None,
) -> None:
    """The lines of all methods in one layer."""
    for (method, of_method), colour in zip(curves.items(), (WRONG, RIGHT, *CURVES[1:])):
        steps, values = zip(*of_method.get(layer, [(numpy.nan, numpy.nan)]))
        axes.plot(steps, values, color=colour, lw=2, marker="o", ms=3.5, label=method)
    if threshold is not None:
        axes.axhline(threshold, color=GREY, lw=0.9, ls=":")
    axes.set_title(short_name(layer), fontsize=9, loc="left")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def panels(
    rows: int,
    columns: int,
    *,
    title: str,
    note: str = "",
    aspect: tuple[int, int] = (1, 1),
    cell: float = 2.6,
    gap: float = 0.12,
    head: float = 0,
    legend: float = 0,
) -> tuple[Figure, list[list[Axes]]]:
    """Make empty axes without ticks, `cell` inches wide.

    Above are a title and `head` inches for captions, below a note and `legend` inches.
    """
    tall = cell * aspect[0] / aspect[1]
    width = cell * columns + 0.12 * (columns - 1) + 0.24
    note = "\n".join(textwrap.wrap(note, round(15.5 * width)))
    above, below = (
        0.4 + head + (0.42 if title else 0),
        0.12 + 0.2 * (note.count("\n") + 1 if note else 0) + legend,
    )
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


def shape_of(picture: Picture) -> tuple[int, int]:
    return (
        (picture.height, picture.width)
        if isinstance(picture, Image.Image)
        else (picture.shape[1], picture.shape[2])
    )
