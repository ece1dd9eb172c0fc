"""List the methods of this library: paper, steps and cost; then what each edits, its layers and its ops.

The cost is that of one edited layer and output row, in 10^9 multiply-adds, beside the self-attention that
it replaces. It is given for the first self-attention layer of SD 1.5 at 512 pixels (4096 tokens, 8 heads of
40 channels) and of SDXL at 1024 pixels (4096 tokens, 10 heads of 64). It is counted, not timed, without
masks, norms and gathers.

examples:
  python -m qalign methods
"""

import argparse

from ._shared import say

NEEDS: tuple[str, ...] = ()
SHAPES = {"SD 1.5": (4096, 8 * 40), "SDXL": (4096, 10 * 64)}
HEAD = ("name", "method", "arXiv", "steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments: the command has none."""


def run(options: argparse.Namespace) -> int:
    from ..methods import METHODS

    stock = {family: 2 * tokens**2 * channels / 1e9 for family, (tokens, channels) in SHAPES.items()}
    cards = {name: kind.card for name, kind in METHODS.items() if kind.card is not None}
    lines = [(*HEAD, *stock)]
    lines += [
        (name, card.title, card.paper, card.steps, *_costs(card.cost, stock)) for name, card in cards.items()
    ]
    lines.append(("-", "plain self-attention", "-", "-", *_costs(1.0, stock)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        if card := cards.get(line[0]):
            indent = " " * (widths[0] + 2)
            say(f"{indent}{card.edits}\n{indent}{card.layers}; {card.uses}")
    return 0


def _costs(cost: float, stock: dict[str, float]) -> list[str]:
    return [f"{cost * work:.1f}" for work in stock.values()]
