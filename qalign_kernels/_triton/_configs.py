"""Tile sizes as data: a pure function of op, head dim, dtype and architecture over small tables."""

import functools
from typing import NamedTuple


class Tile(NamedTuple):
    """Query rows and key columns of one score tile, and how it is run."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """A head dim as a power of two plus a smaller power-of-two tail (0 for none): 40 = 32 + 16 (8 masked), 160 = 128 + 32."""
    main = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - main
    return main, 0 if rest == 0 else max(16, 1 << (rest - 1).bit_length())


# (widest head dim served, tile), narrowest first, by family or, before it, by target;
# "busy" segments keep more per key: labels, or counts beside other segments
ATTENTION_TILES: dict[tuple[str, str], list[tuple[int, Tile]]] = {
    ("hopper", "softmax"): [(64, Tile(128, 128, 8, 3)), (128, Tile(128, 128, 8, 2)), (160, Tile(128, 64, 8, 3))],
    ("hopper", "busy softmax"): [(64, Tile(128, 128, 8, 3)), (160, Tile(128, 64, 8, 3))],
    ("hopper", "lse"): [(64, Tile(128, 128, 8, 3)), (160, Tile(128, 64, 8, 3))],
    ("hopper", "contrast"): [(64, Tile(128, 64, 4, 3)), (128, Tile(128, 128, 8, 2)), (160, Tile(128, 64, 8, 3))],
    ("hopper", "busy contrast"): [(64, Tile(128, 64, 4, 3)), (160, Tile(128, 64, 8, 3))],
    ("hopper", "guided"): [(64, Tile(128, 64, 8, 3)), (128, Tile(128, 64, 8, 2)), (160, Tile(128, 32, 8, 2))],
    ("hopper", "exact"): [(160, Tile(128, 64, 8, 3))],
    ("hopper", "map"): [(160, Tile(128, 64, 8, 2))],
    ("ampere", "softmax"): [(48, Tile(128, 64, 8, 3)), (64, Tile(128, 64, 8, 2)), (128, Tile(128, 64, 8, 3)), (160, Tile(128, 16, 8, 2))],
    ("ampere", "busy softmax"): [(32, Tile(128, 64, 8, 2)), (64, Tile(128, 64, 8, 3)), (128, Tile(128, 32, 8, 3)), (160, Tile(128, 16, 8, 2))],
    ("ampere", "lse"): [(64, Tile(128, 64, 8, 2)), (80, Tile(128, 64, 8, 1)), (128, Tile(128, 64, 8, 2)), (160, Tile(128, 32, 8, 2))],
    ("ampere", "contrast"): [(64, Tile(128, 64, 8, 3)), (128, Tile(128, 32, 8, 3)), (160, Tile(128, 16, 8, 2))],
    ("ampere", "busy contrast"): [(64, Tile(128, 64, 8, 3)), (128, Tile(128, 32, 8, 3)), (160, Tile(128, 16, 8, 2))],
    ("ampere", "guided"): [(80, Tile(128, 32, 8, 2)), (160, Tile(128, 16, 8, 2))],
    ("ampere", "exact"): [(160, Tile(128, 32, 8, 2))],
    ("ampere", "map"): [(64, Tile(128, 64, 8, 1)), (160, Tile(128, 64, 8, 2))],
    ("sm_120", "softmax"): [(64, Tile(128, 64, 8, 3)), (128, Tile(128, 32, 8, 3)), (160, Tile(128, 16, 8, 2))],
    ("sm_120", "busy softmax"): [(64, Tile(128, 64, 8, 3)), (128, Tile(128, 32, 8, 3)), (160, Tile(128, 16, 8, 2))],
    ("sm_100", "softmax"): [(64, Tile(128, 128, 8, 3)), (80, Tile(128, 128, 8, 2)), (96, Tile(128, 64, 8, 2)), (160, Tile(128, 64, 8, 3))],
    ("sm_100", "busy softmax"): [(160, Tile(128, 64, 8, 3))],
    ("sm_100", "contrast"): [(64, Tile(128, 128, 8, 3)), (160, Tile(128, 64, 8, 3))],
    ("sm_100", "busy contrast"): [(64, Tile(128, 128, 8, 3)), (160, Tile(128, 64, 8, 3))],
    ("cdna", "softmax"): [(64, Tile(128, 64, 4, 1)), (80, Tile(64, 64, 4, 1)), (160, Tile(128, 64, 4, 1))],
    ("cdna", "busy softmax"): [(160, Tile(64, 32, 4, 1))],
    ("cdna", "lse"): [(160, Tile(128, 64, 4, 1))],
    ("cdna", "contrast"): [(64, Tile(128, 64, 4, 1)), (80, Tile(128, 32, 4, 1)), (160, Tile(128, 64, 4, 1))],
    ("cdna", "busy contrast"): [(160, Tile(64, 32, 4, 1))],
    ("cdna", "guided"): [(64, Tile(128, 64, 4, 1)), (80, Tile(128, 64, 8, 1)), (160, Tile(128, 64, 4, 1))],
    ("cdna", "exact"): [(160, Tile(128, 64, 4, 1))],
    ("cdna", "map"): [(160, Tile(128, 64, 4, 1))],
}
ATTENTION_TILE_FLOAT32 = Tile(32, 32, 8, 1)


def attention_tile(target: str, mode: str, head_dim: int, itemsize: int) -> Tile:
    """`mode` is "softmax", "lse", "contrast", "busy softmax", "busy contrast", "guided", "exact" (unrounded weights) or "map"."""
    if target == "interpreter":
        return Tile(32, 32, 4, 1)
    if itemsize == 4:
        return ATTENTION_TILE_FLOAT32
    tiles = ATTENTION_TILES.get((target, mode)) or ATTENTION_TILES[family(target), mode]
    return next(tile for widest, tile in tiles if head_dim <= widest)


CONCURRENT_PROGRAMS = 264  # two on each multiprocessor of a large GPU
PROGRAM_OVERHEAD_TILES = 2  # what a program does before its first tile and after its last, in tiles
MOST_SPLITS = 16


@functools.cache
def split_keys(programs: int, key_tiles: int, most_tiles: int) -> tuple[int, int]:
    """Over how many programs the key tiles of a row tile are split, and how many tiles each takes, at most `most_tiles`: the shortest schedule."""
    schedules = []
    for wanted in range(1, min(key_tiles, MOST_SPLITS) + 1):
        tiles = min(-(-key_tiles // wanted), most_tiles)
        splits = -(-key_tiles // tiles)
        waves = -(-programs * splits // CONCURRENT_PROGRAMS)
        schedules.append((waves * (tiles + PROGRAM_OVERHEAD_TILES), splits, tiles))
    _, splits, tiles = min(schedules)
    return splits, tiles


# as ATTENTION_TILES; 64 rows would read the keys twice as often as the second-level cache can give them
SIMILARITY_TILES: dict[tuple[str, str], list[tuple[int, Tile]]] = {
    ("hopper", "exact"): [(64, Tile(128, 64, 4, 3)), (160, Tile(128, 64, 8, 3))],
    ("hopper", "packed"): [(160, Tile(128, 64, 4, 3))],
    ("hopper", "joint"): [(64, Tile(128, 128, 8, 3)), (160, Tile(128, 128, 8, 2))],
    ("hopper", "topk"): [(160, Tile(64, 64, 4, 3))],
    ("sm_100", "exact"): [(160, Tile(128, 64, 8, 3))],
    ("sm_100", "joint"): [(64, Tile(128, 128, 8, 3)), (128, Tile(128, 64, 8, 3)), (160, Tile(128, 64, 8, 2))],
    ("ampere", "exact"): [(160, Tile(128, 64, 8, 3))],
    ("ampere", "packed"): [(160, Tile(128, 64, 8, 3))],
    ("ampere", "joint"): [(64, Tile(128, 128, 8, 3)), (96, Tile(128, 64, 8, 2)), (160, Tile(64, 64, 4, 2))],
    ("ampere", "topk"): [(160, Tile(64, 64, 4, 2))],
    ("sm_120", "topk"): [(160, Tile(64, 64, 8, 2))],
    ("sm_120", "packed"): [(64, Tile(128, 64, 8, 3)), (160, Tile(128, 64, 8, 2))],
    ("cdna", "exact"): [(160, Tile(128, 64, 8, 2))],
    ("cdna", "packed"): [(96, Tile(128, 64, 4, 2)), (160, Tile(128, 64, 8, 2))],
    ("cdna", "joint"): [(96, Tile(128, 128, 8, 2)), (160, Tile(64, 64, 4, 2))],
    ("cdna", "topk"): [(160, Tile(64, 64, 4, 2))],
}
SIMILARITY_TILES_FLOAT32 = {"hopper": Tile(32, 32, 8, 1), "ampere": Tile(32, 32, 8, 1), "cdna": Tile(64, 32, 4, 2)}


def similarity_tile(target: str, mode: str, head_dim: int, itemsize: int) -> Tile:
    """`mode` is "exact", "packed", "joint" or "topk"."""
    if target == "interpreter":
        return Tile(64, 32, 4, 1)
    if itemsize == 4:
        return SIMILARITY_TILES_FLOAT32[family(target)]
    tiles = SIMILARITY_TILES.get((target, mode)) or SIMILARITY_TILES[family(target), mode]
    return next(tile for widest, tile in tiles if head_dim <= widest)


def family(target: str) -> str:
    """Which architectures share a table: "hopper" (large shared memory), "ampere" or "cdna"."""
    if not target.startswith("sm_"):
        return "cdna"
    return "hopper" if target in ("sm_90", "sm_100", "sm_103") else "ampere"


def topk_attention_tile(target: str, head_dim: int) -> Tile:
    if target == "interpreter":
        return Tile(16, 16, 4, 1)
    return Tile(64 if head_dim <= 64 else 32, 16, 4 if head_dim <= 96 else 8, 2)
