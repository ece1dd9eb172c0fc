"""The table of tiles: its rows, which of them a lookup takes, and how it adapts the nearest one."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch

from qalign_kernels._backends import TRITON_DTYPES, TRITON_HEAD_DIMS
from qalign_kernels._triton import _configs
from qalign_kernels._triton._configs import FAMILIES, TOKEN_BUCKETS, WORK, Key, Tile

DTYPES = [str(dtype).removeprefix("torch.") for dtype in TRITON_DTYPES]
STRANGERS = ("sm_75", "sm_87", "sm_110", "sm_121", "gfx90a", "gfx950", "gfx1100")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STATIC = sorted((BENCHMARKS / "results" / "static").glob("*.json"))
SOFTMAX = Key("attention", "softmax", "sm_90", "3.6", "bfloat16", 4096, 64)


def _look_up(key: Key) -> Tile:
    return _configs.look_up(key, getattr(torch, key.dtype).itemsize)


@pytest.fixture
def table(monkeypatch):
    """A table of the test's own in place of the file's."""
    rows: dict[Key, Tile] = {}
    monkeypatch.setattr(_configs, "tiles", lambda: rows)
    monkeypatch.setattr(_configs, "triton_minor", lambda: "3.6")
    _configs.choose_tile.cache_clear()
    yield rows
    _configs.choose_tile.cache_clear()


def test_rows_have_their_fields():
    rows = json.loads(_configs.FILE.read_text(encoding="utf-8"))
    for row in rows:
        assert list(row) == ["op", "modes", "architecture", "triton", "dtypes", "tokens", "head_dims", "tile"]
        assert row["modes"] and all(
            (row["op"], mode) in {**WORK, **_configs.LISTED_WORK} for mode in row["modes"]
        )
        assert row["architecture"] in FAMILIES.values() or re.fullmatch(r"sm_\d+|gfx\w+", row["architecture"])
        assert row["triton"] is None or re.fullmatch(r"\d+\.\d+", row["triton"])
        assert row["dtypes"] and set(row["dtypes"]) <= set(DTYPES)
        assert row["tokens"] in (None, *TOKEN_BUCKETS)
        assert row["head_dims"] and set(row["head_dims"]) <= set(TRITON_HEAD_DIMS)
        block_m, block_n, num_warps, num_stages = row["tile"]
        assert {block_m, block_n} <= {16, 32, 64, 128, 256} and num_warps in (4, 8) and 1 <= num_stages <= 6


def test_two_rows_for_a_key_are_refused():
    row = {
        "op": "attention",
        "modes": ["lse"],
        "architecture": "hopper",
        "triton": None,
        "dtypes": ["float16"],
        "tokens": None,
    }
    with pytest.raises(ValueError, match="expected one row for each key, got two for .*head_dim=64"):
        _configs.expand(
            [
                row | {"head_dims": [40, 64], "tile": [64, 64, 4, 2]},
                row | {"head_dims": [64], "tile": [128, 64, 4, 2]},
            ]
        )


@pytest.mark.parametrize("target", FAMILIES)
def test_known_architectures_have_rows_for_everything_served(target, monkeypatch):
    monkeypatch.setattr(_configs, "fit", None)
    for op, mode in WORK:
        for dtype in DTYPES:
            for head_dim in TRITON_HEAD_DIMS:
                key = Key(op, mode, target, "3.6", dtype, 4096, head_dim)
                tile = _look_up(key)
                assert _configs.accumulators(tile, key) <= _configs.MOST_ACCUMULATORS, key


def test_sm_103_takes_the_rows_of_sm_100():
    for op, mode in WORK:
        for dtype in DTYPES:
            for head_dim in TRITON_HEAD_DIMS:
                key = Key(op, mode, "sm_100", "3.9", dtype, 4096, head_dim)
                assert _look_up(key._replace(architecture="sm_103")) == _look_up(key)


def test_the_most_particular_row_is_taken(table):
    expected = []
    general = [
        ("hopper", None, None),
        ("hopper", None, 4096),
        ("hopper", "3.6", None),
        ("hopper", "3.6", 4096),
    ]
    for stage, (architecture, triton, tokens) in enumerate(
        [*general, ("sm_90", None, None), ("sm_90", "3.6", 4096)]
    ):
        tile = Tile(64, 64, 4, stage)
        table[SOFTMAX._replace(architecture=architecture, triton=triton, tokens=tokens)] = tile
        expected.append(tile)
        assert _look_up(SOFTMAX) == tile
    assert _look_up(SOFTMAX._replace(tokens=256)) == expected[4]
    assert _look_up(SOFTMAX._replace(triton="3.9")) == expected[4]
    assert _look_up(SOFTMAX._replace(architecture="sm_100")) == expected[3]
    assert _look_up(SOFTMAX._replace(architecture="sm_103", triton="3.9", tokens=256)) == expected[0]
    assert _look_up(SOFTMAX._replace(head_dim=33)) == expected[5]


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 256), (256, 256), (257, 1024), (4096, 4096), (9216, 16384), (70000, 16384)]
)
def test_buckets(tokens, bucket, table):
    table[SOFTMAX._replace(tokens=None)] = Tile(64, 64, 4, 1)
    table[SOFTMAX._replace(tokens=bucket)] = Tile(128, 64, 8, 2)
    assert _configs.choose_tile("attention", "softmax", "sm_90", 64, torch.bfloat16, tokens) == Tile(
        128, 64, 8, 2
    )
    assert _configs.choose_tile(
        "attention", "softmax", "sm_90", 64, torch.bfloat16, 40000 if bucket == 256 else 2
    ) == Tile(64, 64, 4, 1)


def test_a_tile_is_tried_and_taken_back(table):
    table[SOFTMAX._replace(tokens=None)] = Tile(64, 64, 4, 1)
    asked = ("attention", "softmax", "sm_90", 64, torch.bfloat16, 4096)
    ask = functools.partial(_configs.choose_tile, *asked)
    before = ask(), dict(table)
    with pytest.raises(RuntimeError), _configs.trying(SOFTMAX, Tile(16, 16, 4, 1)):
        with _configs.trying(SOFTMAX, Tile(32, 16, 4, 1)):
            assert ask() == Tile(32, 16, 4, 1)
        assert ask() == Tile(16, 16, 4, 1)
        raise RuntimeError
    assert (ask(), table) == before


def test_a_tile_is_tried_without_the_hopper_kernel(table):
    listed = SOFTMAX._replace(mode="softmax hopper")
    others = [listed._replace(head_dim=128), listed._replace(dtype="float16")]
    table.update(dict.fromkeys([listed, listed._replace(tokens=1024), *others], Tile(128, 128, 8, 4)))
    before = dict(table)
    with _configs.trying(SOFTMAX, Tile(32, 16, 4, 1)):
        assert set(table) == {SOFTMAX, *others}
    assert table == before


def test_lookups_after_the_first_cost_nothing(table):
    table[SOFTMAX._replace(tokens=None)] = Tile(64, 64, 4, 1)
    for _ in range(3):
        _configs.choose_tile("attention", "softmax", "sm_90", 64, torch.bfloat16, 4096)
    assert _configs.choose_tile.cache_info()[:2] == (2, 1)


@pytest.mark.parametrize("target", STRANGERS)
def test_an_unknown_architecture_gets_a_tile_that_fits(target):
    for op, mode in WORK:
        for dtype in DTYPES:
            for head_dim in TRITON_HEAD_DIMS:
                key = Key(op, mode, target, "3.6", dtype, 4096, head_dim)
                assert _configs.fits(_look_up(key), key, getattr(torch, dtype).itemsize), key


@pytest.mark.parametrize("target", (*FAMILIES, *STRANGERS))
def test_wider_head_dim_gets_a_fitting_tile(target):
    for op, mode in WORK:
        for head_dim in (192, 256):
            key = Key(op, mode, target, "3.6", "bfloat16", 4096, head_dim)
            assert _configs.fits(_look_up(key), key, 2), key


def test_rows_of_an_unknown_architecture_are_used_unchanged(table):
    crowded = Tile(256, 256, 4, 5)
    for architecture in ("sm_80", "ampere", "sm_75"):
        table[SOFTMAX._replace(architecture=architecture, triton=None, tokens=None)] = crowded
    assert _look_up(SOFTMAX._replace(architecture="sm_75")) == crowded
    assert _look_up(SOFTMAX._replace(architecture="sm_87")) != crowded


@pytest.mark.parametrize(
    ("tile", "target", "mode", "head_dim", "expected"),
    [
        (Tile(128, 128, 8, 3), "sm_90", "softmax", 64, Tile(128, 128, 8, 3)),
        (Tile(128, 64, 8, 3), "sm_90", "softmax", 256, Tile(128, 64, 8, 2)),  # 258, 194 KiB
        (Tile(128, 128, 8, 3), "sm_75", "softmax", 64, Tile(128, 64, 8, 1)),  # 114, 82, 66, 34 KiB
        (Tile(128, 64, 8, 2), "sm_90", "guided", 256, Tile(128, 32, 8, 2)),  # 224, 176 registers; 226 KiB
        (Tile(256, 64, 4, 2), "sm_90", "softmax", 256, Tile(64, 16, 4, 2)),
    ],
)
def test_shrinking(tile, target, mode, head_dim, expected):
    assert (
        _configs.fit(tile, Key("attention", mode, target, "3.6", "bfloat16", 4096, head_dim), 2) == expected
    )


def test_nothing_smaller_than_the_smallest():
    key = Key("attention", "guided", "sm_75", "3.6", "float32", 4096, 1024)
    assert _configs.fit(Tile(128, 128, 8, 3), key, 4) == Tile(16, 16, 4, 1)


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        ("sm_90", "sm_90"),
        ("sm_75", "sm_80"),
        ("sm_87", "sm_86"),
        ("sm_103", "sm_100"),
        ("sm_110", "sm_100"),
        ("sm_121", "sm_120"),
        ("gfx1100", "gfx942"),
    ],
)
def test_nearest_architecture(target, nearest):
    assert _configs.nearest_architecture(target) == nearest


def test_an_unknown_mode_is_named():
    with pytest.raises(
        ValueError, match="tile: expected an op, mode and dtype of tiles.json, got .*'nonsense'"
    ):
        _look_up(SOFTMAX._replace(mode="nonsense"))


def test_limits_are_those_of_the_static_gate():
    for target, limit in json.loads((BENCHMARKS / "static" / "budgets.json").read_text())[
        "shared_memory_kib"
    ].items():
        assert _configs.SHARED_MEMORY_KIB[target] == limit and (
            target in FAMILIES or target == "sm_103"
        )  # which has no rows of its own


def _key(row: dict) -> Key | None:
    """What the compiled kernel was launched for, where it has a score loop."""
    flags, head_dim = row["flags"], row["head_dim"]
    if "similarity" in row["kernel"]:
        op, mode = (
            "similarity",
            "topk"
            if "topk" in row["kernel"]
            else "packed"
            if "PACKED" in flags
            else "joint"
            if "JOINT" in flags
            else "exact",
        )
        head_dim = 64 if "JOINT" in flags and head_dim % 8 == 0 else head_dim  # eight heads in a row
    elif row["kernel"] == "mean_attention_map_kernel":
        op, mode = "attention", "map"
    elif row["kernel"] == "attention_kernel":
        guided, valueless = "guided" in row["cases"][0], "HAS_VALUES" not in flags
        op, mode = (
            "attention",
            "exact"
            if "EXACT_WEIGHTS" in flags
            else "guided"
            if guided
            else "lse"
            if valueless
            else "softmax",
        )
    else:
        return None
    return Key(op, mode, row["target"], None, row["dtype"], None, head_dim)


@pytest.mark.parametrize("file", STATIC, ids=lambda file: file.stem)
def test_compiled_shared_memory_stays_within_the_estimate(file):
    compared = 0
    for row in json.loads(file.read_text()):
        key = _key(row)
        if key and row["tile"].count("x") == 1:
            tile = Tile(*map(int, row["tile"].split("x")), row["num_warps"], row["num_stages"])
            assert row["shared_kib"] <= _configs.shared_memory_kib(tile, key, 2), row
            compared += 1
    assert compared > 100
