"""Tiles as data: `tiles.json` lists them, and a pure function looks them up.

A row of the file names an op, its modes, an architecture or a family of them, a minor version of Triton,
dtypes, a bucket of query tokens, and head dims. Null stands for every version, or for every number of tokens.

Several rows may match a call. The most specific one is taken: a row of the architecture before one of its
family, then a row of the Triton version, then a row of the bucket. `python -m benchmarks tune` writes rows.
"""

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("tiles.json")
TOKEN_BUCKETS = (256, 1024, 4096, 16384)  # the most query tokens of each; the last also takes longer ones
FAMILIES = {
    "sm_80": "ampere",
    "sm_86": "ampere",
    "sm_89": "ampere",
    "sm_90": "hopper",
    "sm_100": "hopper",
    "sm_120": "ampere",
    "gfx942": "cdna",
}

_generation = 0


class Tile(NamedTuple):
    """Query rows and key columns of one tile of scores, and the options of its launch."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Key(NamedTuple):
    """What a tile is chosen for.

    `triton` is a minor version ("3.6") and `tokens` a bucket. None stands for all of them.
    """

    op: str
    mode: str
    architecture: str
    triton: str | None
    dtype: str
    tokens: int | None
    head_dim: int


class Work(NamedTuple):
    """How many tiles of each kind a program holds."""

    queries: int  # [BLOCK_M, D], input dtype
    keys: int  # [BLOCK_N, D], input dtype
    scores: int  # [BLOCK_M, BLOCK_N], fp32
    outputs: int  # [BLOCK_M, D], fp32
    staged_queries: bool = False  # whether the loop loads queries in every stage, too


_SOFTMAX = Work(queries=1, keys=2, scores=2, outputs=1)  # scores and weights
WORK = {
    ("attention", "softmax"): _SOFTMAX,
    ("attention", "counted softmax"): _SOFTMAX,
    # "busy" keeps more: labels, counts beside other segments, or a comparison
    ("attention", "busy softmax"): _SOFTMAX,
    ("attention", "contrast"): _SOFTMAX,
    ("attention", "busy contrast"): _SOFTMAX,
    ("attention", "exact"): _SOFTMAX,  # unrounded weights
    ("attention", "lse"): Work(queries=1, keys=1, scores=2, outputs=0),
    ("attention", "guided"): Work(queries=2, keys=3, scores=3, outputs=1),
    ("attention", "map"): Work(queries=1, keys=1, scores=2, outputs=0, staged_queries=True),
    ("attention_backward", "queries"): Work(queries=2, keys=2, scores=3, outputs=1),
    # here the rows of the tile are keys, its columns queries; "shared keys" are read through a batch index
    ("attention_backward", "keys"): Work(queries=2, keys=2, scores=3, outputs=2),
    ("attention_backward", "shared keys"): Work(queries=2, keys=2, scores=3, outputs=2),
    ("similarity", "exact"): Work(queries=1, keys=1, scores=3, outputs=0),
    ("similarity", "packed"): Work(queries=1, keys=1, scores=2, outputs=0),
    ("similarity", "joint"): Work(queries=1, keys=1, scores=1, outputs=0, staged_queries=True),
    ("similarity", "topk"): Work(queries=1, keys=1, scores=2, outputs=0, staged_queries=True),
    # a gathered key and value for each query
    ("topk_attention", "softmax"): Work(queries=0, keys=0, scores=0, outputs=4),
    ("topk_attention", "contrast"): Work(queries=0, keys=0, scores=0, outputs=4),
}
# Kernels that serve only what a row names. Their `num_stages` is the number of buffers of their ring.
LISTED_WORK = {
    ("attention", "softmax hopper"): _SOFTMAX,
    ("attention", "counted softmax hopper"): _SOFTMAX,
    ("similarity", "joint hopper"): Work(queries=1, keys=1, scores=1, outputs=0, staged_queries=True),
}
INTERPRETED = {
    "attention": Tile(32, 32, 4, 1),
    "attention_backward": Tile(32, 32, 4, 1),
    "similarity": Tile(64, 32, 4, 1),
    "topk_attention": Tile(16, 16, 4, 1),
}


@functools.cache
def choose_tile(op: str, mode: str, target: str, head_dim: int, dtype: torch.dtype, tokens: int) -> Tile:
    """The tile of an (op, mode) of WORK on `target` ("sm_90", "gfx942", "interpreter") for `tokens` queries.

    If the table has no row for an architecture or a head dim, the nearest tile is made smaller until it fits.
    """
    if target == "interpreter":
        return INTERPRETED[op]
    name = str(dtype).removeprefix("torch.")
    return look_up(
        Key(op, mode, target, triton_minor(), name, token_bucket(tokens), head_dim), dtype.itemsize
    )


def look_up(key: Key, itemsize: int) -> Tile:
    """The tile of a key without None in it."""
    nearest = nearest_architecture(key.architecture)
    architectures = (key.architecture, nearest, FAMILIES[nearest])
    widths = sorted(
        {row.head_dim for row in tiles()}, key=lambda width: (width < key.head_dim, abs(width - key.head_dim))
    )
    for head_dim, architecture, triton, tokens in itertools.product(
        widths, architectures, (key.triton, None), (key.tokens, None)
    ):
        tile = tiles().get(
            key._replace(architecture=architecture, triton=triton, tokens=tokens, head_dim=head_dim)
        )
        if tile:
            served = head_dim >= key.head_dim and key.architecture in (nearest, architecture)
            return tile if served else fit(tile, key, itemsize)
    raise ValueError(f"tile: expected an op, mode and dtype of {FILE.name}, got {key}")


@functools.cache
def listed_tile(
    op: str, mode: str, target: str, head_dim: int, dtype: torch.dtype, tokens: int
) -> Tile | None:
    """The tile of a mode of LISTED_WORK, or None where no row names this architecture and head dim."""
    name = str(dtype).removeprefix("torch.")
    key = Key(op, mode, target, triton_minor(), name, token_bucket(tokens), head_dim)
    for triton, bucket in itertools.product((key.triton, None), (key.tokens, None)):
        if tile := tiles().get(key._replace(triton=triton, tokens=bucket)):
            return tile
    return None


@functools.cache
def tiles() -> dict[Key, Tile]:
    """The rows of the file, with one entry for each mode, dtype and head dim of a row."""
    return expand(json.loads(FILE.read_text(encoding="utf-8")))


def expand(rows: list[dict[str, Any]]) -> dict[Key, Tile]:
    """The tile of each key of the rows; raises if two rows have the same key."""
    table: dict[Key, Tile] = {}
    for row in rows:
        for key in row_keys(row):
            if key in table:
                raise ValueError(f"{FILE.name}: expected one row for each key, got two for {key}")
            table[key] = Tile(*row["tile"])
    return table


def row_keys(row: dict[str, Any]) -> list[Key]:
    """The keys of a row."""
    return [
        Key(row["op"], mode, row["architecture"], row["triton"], dtype, row["tokens"], head_dim)
        for mode in row["modes"]
        for dtype in row["dtypes"]
        for head_dim in row["head_dims"]
    ]


def put(key: Key, tile: Tile | None) -> Tile | None:
    """Set the tile of `key` in this process; None removes its entry, so that a more general row serves it.

    Returns the tile that was there before.
    """
    global _generation
    before = tiles().pop(key, None)
    if tile is not None:
        tiles()[key] = tile
    choose_tile.cache_clear()
    listed_tile.cache_clear()
    _generation += 1
    return before


def generation() -> int:
    """A number that changes with the table: a tile chosen under another number may be out of date."""
    return _generation


@contextlib.contextmanager
def trying(key: Key, tile: Tile | None) -> Iterator[None]:
    """Inside, launches of `key` take `tile`; with None the tile that they would get without its row.

    A tile is tried with the kernels for Hopper switched off, because these would take its launches.
    """
    changes: list[tuple[Key, Tile | None]] = [(key, tile)]
    if tile is not None:
        hopper = key._replace(mode=f"{key.mode} hopper", triton=None, tokens=None)
        changes += [(one, None) for one in tiles() if one._replace(triton=None, tokens=None) == hopper]
    before = [(one, put(one, new)) for one, new in changes]
    try:
        yield
    finally:
        for one, old in before:
            put(one, old)


def version_numbers(version: str) -> tuple[int, ...]:
    """(3, 7) for "3.7.1" or "3.7.0+git1234": the two numbers that name a minor version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@functools.cache
def triton_minor(version: str | None = None) -> str:
    """ "3.6" for version 3.6.0 of Triton; without an argument for the installed one."""
    if version is None:
        import triton

        version = triton.__version__
    return ".".join(map(str, version_numbers(version)))


def token_bucket(tokens: int) -> int:
    return next((most for most in TOKEN_BUCKETS if tokens <= most), TOKEN_BUCKETS[-1])


def nearest_architecture(target: str) -> str:
    """The architecture of FAMILIES nearest to `target`: itself, the newest older one, or the oldest."""
    if target in FAMILIES:
        return target
    if not target.startswith("sm_"):
        return "gfx942"
    known = [(int(name[3:]), name) for name in FAMILIES if name.startswith("sm_")]
    return max((pair for pair in known if pair[0] <= int(target[3:])), default=min(known))[1]


# the most that one program may have, from the vendors' tables
SHARED_MEMORY_KIB = {
    "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227,
    "sm_103": 227, "sm_110": 227, "sm_120": 99, "sm_121": 99, "gfx90a": 64, "gfx942": 64, "gfx950": 160,
}  # fmt: skip
LEAST_SHARED_MEMORY_KIB = 64
REDUCTIONS_KIB = 2
MOST_ACCUMULATORS = 192  # of a thread's 255 registers; operands, addresses and running sums take the rest
SMALLEST_BLOCK, SMALLEST_TEAM = 16, 4


def _work(key: Key) -> Work:
    return {**WORK, **LISTED_WORK}[key.op, key.mode]


def shared_memory_kib(tile: Tile, key: Key, itemsize: int) -> float:
    """An upper bound of the shared memory of a program, in KiB.

    It holds the query tiles and the key tiles of every stage, or one fp32 tile of scores if that is larger;
    and room for reductions.
    """
    work = _work(key)
    queries = work.queries * tile.block_m * (tile.num_stages if work.staged_queries else 1)
    keys = work.keys * tile.block_n * tile.num_stages
    operands = (queries + keys) * sum(split_head_dim(key.head_dim)) * itemsize
    return max(operands, tile.block_m * tile.block_n * 4) / 1024 + REDUCTIONS_KIB


def accumulators(tile: Tile, key: Key) -> float:
    """How many fp32 numbers of scores and outputs a thread keeps, in one register each."""
    work = _work(key)
    columns = work.scores * tile.block_n + work.outputs * sum(split_head_dim(key.head_dim))
    lanes = 64 if key.architecture.startswith("gfx9") else 32
    return tile.block_m * columns / (tile.num_warps * lanes)


def fits(tile: Tile, key: Key, itemsize: int) -> bool:
    limit = SHARED_MEMORY_KIB.get(key.architecture, LEAST_SHARED_MEMORY_KIB)
    return shared_memory_kib(tile, key, itemsize) <= limit and accumulators(tile, key) <= MOST_ACCUMULATORS


def fit(tile: Tile, key: Key, itemsize: int) -> Tile:
    """The tile, made smaller until it fits.

    Stages go first, if shared memory is short; then columns, then rows. The smallest tile is returned even if
    it does not fit.
    """
    while not fits(tile, key, itemsize):
        crowded = accumulators(tile, key) > MOST_ACCUMULATORS
        if tile.num_stages > 1 and not crowded:
            tile = tile._replace(num_stages=tile.num_stages - 1)
        elif tile.block_n > SMALLEST_BLOCK:
            tile = tile._replace(block_n=tile.block_n // 2)
        elif tile.block_m > SMALLEST_BLOCK:
            tile = tile._replace(block_m=tile.block_m // 2, num_warps=max(SMALLEST_TEAM, tile.num_warps // 2))
        else:
            break
    return tile


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """A head dim as a power of two and a smaller power of two, its tail, or 0.

    40 gives 32 and 16, of which 8 channels are masked; 160 gives 128 and 32.
    """
    main = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - main
    return main, 0 if rest == 0 else max(16, 1 << (rest - 1).bit_length())


PROGRAM_OVERHEAD_TILES = 2  # the work of a program before its first tile and after its last one, in tiles


@functools.cache
def split_keys(programs: int, key_tiles: int, most_tiles: int, at_once: int) -> tuple[int, int]:
    """Divide the key tiles of a row tile among programs, so that the schedule is the shortest.

    Args:
        programs: How many row tiles there are.
        key_tiles: How many key tiles a row tile meets.
        most_tiles: The most key tiles of one program.
        at_once: How many programs run at the same time.

    Returns:
        Over how many programs the key tiles are split, and how many of them each program takes.
    """
    schedules = []
    for wanted in range(1, key_tiles + 1):
        tiles = min(-(-key_tiles // wanted), most_tiles)
        splits = -(-key_tiles // tiles)
        schedules.append((schedule_length(programs * splits, tiles, at_once), splits, tiles))
    _, splits, tiles = min(schedules)
    return splits, tiles


def schedule_length(programs: int, tiles: int, at_once: int) -> int:
    """The time of programs with `tiles` tiles each, in tiles, if `at_once` of them run at the same time."""
    return -(-programs // at_once) * (tiles + PROGRAM_OVERHEAD_TILES)
