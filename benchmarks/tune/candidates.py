"""Tiles that only a GPU can judge: data in candidates.json. `gpu --first` and `tune` try them, no kernel takes them.

A row holds for an op, a mode, a family of architectures and head dims, for every dtype and number of tokens.
Rows of attention hold what came within 7 % of the fastest tile on an H200 (benchmarks/results/nvidia-h200); what
lost by more is left out. Modes named "... hopper" are those of the kernels in Gluon.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

from qalign_kernels._triton import _configs
from qalign_kernels._triton._configs import FAMILIES, Key, Tile

FILE = Path(__file__).with_name("candidates.json")


@functools.cache
def rows() -> list[dict[str, Any]]:
    """Read the file."""
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
