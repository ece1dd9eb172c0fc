"""The table of tiles: the tile of a key today, and the rows after a change."""

import itertools
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from qalign_kernels._triton import _configs
from qalign_kernels._triton._configs import Key, Tile

Choice = Tile | None  # None: the general kernel serves the key


class Change(NamedTuple):
    """A new tile for a key. `ratio` is its time over the old tile's; 0 where the old tile does not run."""

    key: Key
    old: Choice
    new: Choice
    ratio: float

    def __str__(self) -> str:
        gain = f"{self.ratio:.3f} of its time" if self.ratio else "which did not run or was wrong"
        return f"{describe(self.key)}: {cell(self.new)} instead of {cell(self.old)}, {gain}"


def describe(key: Key) -> str:
    return f"{key.op} {key.mode} {key.architecture} {key.dtype} d={key.head_dim} tokens<={key.tokens}"


def cell(tile: Choice) -> str:
    if tile is None:
        return "the general kernel"
    return f"{tile.block_m}x{tile.block_n} warps {tile.num_warps} stages {tile.num_stages}"


def shipped_tile(key: Key, itemsize: int) -> Choice:
    """Look up the tile that a launch of this key uses today; None is the general kernel."""
    if (key.op, key.mode) not in _configs.LISTED_WORK:
        return _configs.look_up(key, itemsize)
    places = itertools.product((key.triton, None), (key.tokens, None))
    found = (_configs.tiles().get(key._replace(triton=triton, tokens=tokens)) for triton, tokens in places)
    return next(filter(None, found), None)


def replace(rows: list[dict[str, Any]], changes: Iterable[Change]) -> list[dict[str, Any]]:
    """Put a row for each changed key behind the general rows.

    A row of several keys keeps the keys that did not change. A change to the general kernel removes the row.
    """
    for key, _, tile, _ in changes:
        rows = [part for row in rows for part in _without(row, key)]
        if tile is not None:
            rows.append(_row(key, tile))
    general = [row for row in rows if row["triton"] is None]
    special = {_row_key(row): row for row in rows if row["triton"] is not None}
    return general + [special[text] for text in sorted(special)]


def _without(row: dict[str, Any], key: Key) -> list[dict[str, Any]]:
    """Take a key out of a row, which leaves one row for each of its other keys."""
    keys = _configs.row_keys(row)
    if key not in keys:
        return [row]
    return [_row(other, Tile(*row["tile"])) for other in keys if other != key]


def _row(key: Key, tile: Tile) -> dict[str, Any]:
    return {
        "op": key.op,
        "modes": [key.mode],
        "architecture": key.architecture,
        "triton": key.triton,
        "dtypes": [key.dtype],
        "tokens": key.tokens,
        "head_dims": [key.head_dim],
        "tile": list(tile),
    }


def _row_key(row: dict[str, Any]) -> str:
    return json.dumps([value for name, value in row.items() if name != "tile"])
