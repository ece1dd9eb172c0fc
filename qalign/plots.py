"""Pictures of correspondences between two photographs. Needs matplotlib (the extras `demo` and `bench` bring it)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RIGHT = "#1a9e77"
WRONG = "#d1495b"
GREY = "#6b7280"
CURVES = (RIGHT, "#3b6fb6", GREY)


@dataclass(frozen=True, eq=False)
class MatchPanel:
    """Matches to draw as lines between two pictures.

    Attributes:
        title: above the pictures.
        source, target: [n, 2] pixel coordinates (x, y) in the left and the right picture.
        error: [n] pixels from the true position.
    """

    title: str
    source: Tensor
    target: Tensor
    error: Tensor


def plot_correspondences(
    path: Path,
    left: Tensor,
    right: Tensor,
    panels: Sequence[MatchPanel],
    curves: Mapping[str, Tensor],
    *,
    tolerance: float,
    title: str,
    note: str,
) -> None:
    """Write a PNG: one row per panel with lines between the two pictures, and the share of matches within a distance beside it.

    Args:
        left, right: [3, S, S] in [0, 1].
        panels: the matches to draw; a line is green where its error is at most `tolerance` pixels.
        curves: name -> errors in pixels of all matches, drawn as cumulative shares.
        tolerance: pixels.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    size = left.shape[-1]
    gap = size // 16
    height = 4.4 * len(panels) + 1.5
    figure = pyplot.figure(figsize=(13.6, height), dpi=110, facecolor="white")
    bounds = {"left": 0.015, "right": 0.985, "top": 1 - 0.9 / height, "bottom": 0.75 / height}
    grid = figure.add_gridspec(len(panels), 2, width_ratios=(2.2, 1), wspace=0.14, hspace=0.1, **bounds)
    figure.text(0.015, 1 - 0.2 / height, title, fontsize=13, weight="bold", va="top")
    figure.text(0.015, 0.15 / height, note, fontsize=8.5, color=GREY, va="bottom", linespacing=1.4)
    pictures = torch.cat([left, left.new_ones(3, size, gap), right], dim=2).permute(1, 2, 0).clamp(0, 1)
    for row, panel in enumerate(panels):
        axes = figure.add_subplot(grid[row, 0])
        axes.imshow((0.4 + 0.6 * pictures).numpy(), interpolation="lanczos")
        _draw_lines(axes, panel, size + gap, tolerance)
        share = (panel.error <= tolerance).double().mean().item()
        axes.set_title(f"{panel.title}: {share:.0%} of these lines end within {tolerance:.0f} px of the truth", fontsize=10.5, loc="left")
        axes.set_axis_off()
        axes.set_anchor("W")
    _draw_curves(figure.add_subplot(grid[:, 1]), curves, tolerance, size)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_lines(axes: Any, panel: MatchPanel, offset: int, tolerance: float) -> None:
    right = panel.error <= tolerance
    for kept, colour, width, alpha in ((~right, WRONG, 0.7, 0.4), (right, RIGHT, 1.3, 0.9)):
        source, target = panel.source[kept], panel.target[kept]
        x, y = torch.stack([source[:, 0], target[:, 0] + offset]), torch.stack([source[:, 1], target[:, 1]])
        axes.plot(x.numpy(), y.numpy(), color=colour, lw=width, alpha=alpha)
        for points, shift in ((source, 0), (target, offset)):
            axes.scatter(points[:, 0] + shift, points[:, 1], s=9, color=colour, alpha=alpha, linewidths=0, zorder=3)


def _draw_curves(axes: Any, curves: Mapping[str, Tensor], tolerance: float, size: int) -> None:
    for (name, errors), colour in zip(curves.items(), CURVES):
        ordered = errors.double().sort().values
        share = torch.arange(1, len(ordered) + 1) / len(ordered)
        axes.plot(ordered.numpy(), share.numpy(), color=colour, lw=2, label=name, ls="--" if colour == GREY else "-")
    axes.axvline(tolerance, color=GREY, lw=0.8, ls=":")
    axes.annotate("one token", (tolerance, 0.97), xytext=(4, 0), textcoords="offset points", fontsize=8.5, color=GREY, va="top")
    axes.set(xlim=(0, 0.6 * size), ylim=(0, 1), xlabel="distance from the true position, pixels", ylabel="share of matches within it")
    axes.set_title(f"All {len(next(iter(curves.values())))} tokens whose truth is known", fontsize=10.5, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.1, 0.93), fontsize=9)
