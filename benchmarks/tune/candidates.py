"""Tiles that only a GPU can judge. `tune` and `gpu --first` try them; kernels do not use them.

A row of candidates.json holds for an op, a mode, a family of architectures and head dims, for every dtype and
number of tokens. Rows of attention hold tiles within 7 % of the fastest on an H200
(benchmarks/results/nvidia-h200). Modes named "... hopper" are those of the kernels in Gluon.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

from qalign_kernels._triton import _configs
from qalign_kernels._triton._configs import FAMILIES, Key, Tile

from .table import Choice

FILE = Path(__file__).with_name("candidates.json")


@functools.cache
def rows() -> list[dict[str, Any]]:
    """Read the rows of candidates.json."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def tiles(key: Key) -> list[Tile]:
    """List the candidates of a key that its architecture can hold, the most promising first."""
    family = FAMILIES[_configs.nearest_architecture(key.architecture)]
    place = key.op, key.mode, family
    found = [
        Tile(*tile)
        for row in rows()
        if (row["op"], row["mode"], row["family"]) == place and key.head_dim in row["head_dims"]
        for tile in row["tiles"]
    ]
    return [tile for tile in found if _configs.fits(tile, key, getattr(torch, key.dtype).itemsize)]


BLOCKS, TEAMS, STAGES = range(16, 257), (4, 8), range(1, 6)

RING_COLUMNS, RING_BUFFERS = (64, 128, 256), range(2, 9)  # of the kernels in Gluon


def neighbours(key: Key, tile: Tile) -> list[Tile]:
    """List the tiles one step away, and those that trade one resource for another.

    Tiles that would spill registers are left out.
    """
    m, n, warps, stages = tile
    shapes = [(m, 2 * n, warps, stages), (m, n // 2, warps, stages), (m, n, warps, stages + 1)]
    shapes += [(m, n, warps, stages - 1), (m, n, 2 * warps, stages), (m, n, warps // 2, stages)]
    shapes += [(2 * m, n, warps, stages), (m // 2, n, warps, stages), (m, 2 * n, warps, stages - 1)]
    shapes += [(m, n // 2, warps, stages + 1), (m // 2, n, warps // 2, stages)]
    shapes += [(m // 2, 2 * n, warps, stages), (2 * m, n // 2, warps, stages)]
    has_columns = _configs.WORK[key.op, key.mode].keys > 0
    return [
        step
        for step in dict.fromkeys(Tile(*shape) for shape in shapes)
        if _is_usual(step)
        and (has_columns or step.block_n == n)
        and _configs.accumulators(step, key) <= _configs.MOST_ACCUMULATORS
    ]


def _is_usual(tile: Tile) -> bool:
    blocks = tile.block_m in BLOCKS and tile.block_n in BLOCKS
    return blocks and tile.num_warps in TEAMS and tile.num_stages in STAGES


def ring_neighbours(key: Key, tile: Tile) -> list[Tile]:
    """List the tiles one step away, for a kernel in Gluon.

    Its stages are the buffers of a ring, and its rows and warps are fixed.
    """
    n, stages = tile.block_n, tile.num_stages
    shapes = [(n, stages + 1), (n, stages - 1), (2 * n, stages), (n // 2, stages)]
    shapes += [(2 * n, stages // 2), (n // 2, 2 * stages)]
    steps = [tile._replace(block_n=columns, num_stages=buffers) for columns, buffers in shapes]
    itemsize = getattr(torch, key.dtype).itemsize
    return [
        step
        for step in dict.fromkeys(steps)
        if step != tile
        and step.block_n in RING_COLUMNS
        and step.num_stages in RING_BUFFERS
        and _configs.fits(step, key, itemsize)
    ]


def candidate_tiles(key: Key, tile: Choice) -> list[Choice]:
    """List what is tried beside the shipped tile: candidates, neighbours, and the general kernel."""
    listed = (key.op, key.mode) in _configs.LISTED_WORK
    near = ring_neighbours if listed else neighbours
    tried: dict[Choice, None] = dict.fromkeys(tiles(key))
    if tile is not None:
        tried |= dict.fromkeys(near(key, tile))
    if listed:
        tried[None] = None
    tried.pop(tile, None)
    return list(tried)
