"""The sweep of tiles: which tiles replace a row, and what is kept when time is up or the user interrupts."""

import json
import sys

import pytest
import torch

from benchmarks import __main__
from benchmarks.suite import shapes
from benchmarks.suite.rows import write
from benchmarks.suite.shapes import Shape
from benchmarks.tune import candidates, trials
from benchmarks.tune import command as tune
from benchmarks.tune.sweep import Sweep, medians
from benchmarks.tune.table import Change, replace, shipped_tile
from benchmarks.tune.trials import TRIALS, Call
from qalign_kernels import _backends
from qalign_kernels._triton import _configs
from qalign_kernels._triton._configs import LISTED_WORK, WORK, Key, Tile
from qalign_kernels.bench import measure

KEY = Key("attention", "softmax", "sm_90", "3.6", "bfloat16", 4096, 64)
OTHER = KEY._replace(head_dim=128)
LISTED = KEY._replace(mode="softmax hopper")  # of a kernel that serves only what a row names
SLOW, FAST, FASTER = Tile(64, 32, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 2)


class Fake:
    """A subject whose tiles take given times; those without one do not compile."""

    def __init__(self, times, wrong=(), unserving=()):
        self.times, self.wrong, self.unserving, self.asked = times, wrong, unserving, []

    def right(self, tile):
        self.asked.append(tile)
        self.times[tile]
        return tile not in self.wrong

    def serves(self, tile):
        return tile not in self.unserving

    def seconds(self, tile):
        return self.times[tile]


def _shipped():
    return _configs.look_up(KEY, 2)


def _sweep(subject, *, key=KEY, late=lambda: False, settle=lambda: None, candidates=(SLOW, FAST, FASTER)):
    changes = []
    sweep = Sweep(lambda key: subject, late, changes.append, settle, lambda key, shipped: list(candidates))
    sweep.run([key])
    assert sweep.changes == changes
    return sweep


@pytest.mark.parametrize(
    ("times", "chosen"), [((9.0, 0.99, 1.5), None), ((9.0, 0.97, 0.985), FAST), ((9.0, 0.97, 0.5), FASTER)]
)
def test_tile_is_replaced_from_two_percent_on(times, chosen):
    sweep = _sweep(Fake({_shipped(): 1.0, **dict(zip((SLOW, FAST, FASTER), times))}))
    assert (sweep.swept, sweep.timed, sweep.skipped, sweep.wrong, sweep.notes) == (1, 4, 0, 0, [])
    expected = [] if chosen is None else [Change(KEY, _shipped(), chosen, min(times))]
    assert sweep.changes == expected


def test_general_kernel_replaces_a_slower_listed_one():
    shipped = shipped_tile(LISTED, 2)
    assert shipped == Tile(128, 128, 8, 4)
    sweep = _sweep(Fake({shipped: 1.0, None: 0.9, FAST: 0.95}), key=LISTED, candidates=(FAST, None))
    assert sweep.changes == [Change(LISTED, shipped, None, 0.9)]
    assert "the general kernel instead of 128x128 warps 8 stages 4, 0.900" in str(sweep.changes[0])


def test_listed_tile_replaces_the_general_kernel():
    key = LISTED._replace(triton="9.9")
    assert shipped_tile(key, 2) is None
    sweep = _sweep(Fake({None: 1.0, FAST: 0.9}), key=key, candidates=(FAST,))
    assert sweep.changes == [Change(key, None, FAST, 0.9)]


def test_wrong_unserving_and_failing_tiles_are_passed_over():
    subject = Fake(
        {_shipped(): 1.0, FAST: 0.6, FASTER: 0.5, Tile(32, 32, 4, 1): 0.1},
        wrong=(Tile(32, 32, 4, 1),),
        unserving=(FASTER,),
    )
    sweep = _sweep(subject, candidates=(Tile(32, 32, 4, 1), SLOW, FASTER, FAST))
    assert sweep.changes == [Change(KEY, _shipped(), FAST, 0.6)]
    assert (sweep.timed, sweep.skipped, sweep.wrong) == (3, 1, 2)


def test_luck_in_the_screening_is_not_enough():
    class Lucky(Fake):
        def seconds(self, tile):
            if tile == FAST:
                self.times[FAST] += 0.01
            return super().seconds(tile)

    sweep = _sweep(Lucky({_shipped(): 1.0, FAST: 0.8}), candidates=(FAST,))
    assert sweep.changes == [] and sweep.swept == 1


@pytest.mark.parametrize("wrong", [False, True])
def test_failing_shipped_tile_is_named_and_replaced(wrong):
    subject = Fake({FAST: 5.0} | ({_shipped(): 0.1} if wrong else {}), wrong=(_shipped(),))
    sweep = _sweep(subject, candidates=(FAST,))
    assert sweep.changes == [Change(KEY, _shipped(), FAST, 0.0)]
    assert len(sweep.notes) == 1 and "the shipped tile" in sweep.notes[0]


@pytest.mark.parametrize("checks", [0, 1, 3])
def test_nothing_is_half_swept_when_time_is_up(checks):
    subject = Fake({_shipped(): 1.0, SLOW: 9.0, FAST: 0.5, FASTER: 0.5})
    sweep = _sweep(subject, late=lambda: len(subject.asked) >= checks)
    assert (sweep.swept, sweep.changes) == (0, [])
    assert len(subject.asked) == checks


def test_a_broken_device_ends_the_sweep():
    def settle():
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        _sweep(Fake({_shipped(): 1.0}), settle=settle)


def test_too_little_memory_is_a_note():
    class Large(Fake):
        def right(self, tile):
            raise torch.OutOfMemoryError

    sweep = _sweep(Large({}))
    assert sweep.swept == 0 and "too little memory" in sweep.notes[0]


def test_medians_alternate():
    asked = []
    times = {SLOW: iter((1.0, 5.0, 3.0)), FAST: iter((2.0, 2.0, 9.0))}
    found = medians([SLOW, FAST], lambda tile: (asked.append(tile), next(times[tile]))[1], 3)
    assert found == {SLOW: 3.0, FAST: 2.0}
    assert asked == [SLOW, FAST, FAST, SLOW, SLOW, FAST]


@pytest.mark.parametrize(("op", "mode"), WORK)
@pytest.mark.parametrize("head_dim", trials.HEADS)
def test_neighbours(op, mode, head_dim):
    key = KEY._replace(op=op, mode=mode, head_dim=head_dim)
    tile = _configs.look_up(key, 2)
    steps = candidates.neighbours(key, tile)
    assert len(steps) >= 3 and tile not in steps and len(set(steps)) == len(steps)
    assert all(
        min(step) >= 1
        and step.num_warps in (4, 8)
        and _configs.accumulators(step, key) <= _configs.MOST_ACCUMULATORS
        for step in steps
    )


@pytest.mark.parametrize("trial", [trial for trial in TRIALS if trial.listed], ids=lambda trial: trial.name)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_listed_candidates_fit_and_keep_rows(trial, head_dim):
    key = Key(trial.op, trial.mode, "sm_90", "3.6", "bfloat16", 4096, head_dim)
    shipped = shipped_tile(key, 2)
    tiles = candidates.candidate_tiles(key, shipped)
    assert shipped not in tiles and len(set(tiles)) == len(tiles)
    assert (None in tiles) == (shipped is not None)
    for tile in filter(None, tiles):
        assert _configs.fits(tile, key, 2) and (tile.block_m, tile.num_warps) == (128, 8)
        assert trial.serves("sm_90", head_dim)


def test_rows_of_several_keys_keep_the_others():
    shipped, half = json.loads(_configs.FILE.read_text()), LISTED._replace(dtype="float16")
    before = _configs.expand(shipped)
    assert before[LISTED] == before[half] == Tile(128, 128, 8, 4)
    changed = _configs.expand(replace(shipped, [Change(LISTED, before[LISTED], FAST, 0.5)]))
    assert changed == {**before, LISTED: FAST}
    removed = _configs.expand(replace(shipped, [Change(LISTED, before[LISTED], None, 0.5)]))
    assert removed == {key: tile for key, tile in before.items() if key != LISTED}


def test_rows_are_replaced_and_others_stay(tmp_path):
    shipped = json.loads(_configs.FILE.read_text())
    first = [
        Change(KEY, SLOW, FAST, 0.5),
        Change(OTHER, SLOW, FAST, 0.5),
        Change(KEY._replace(triton="3.9", architecture="sm_80"), SLOW, FAST, 0.5),
    ]
    rows = replace(replace(shipped, first), [Change(KEY, FAST, FASTER, 0.5)])
    table = _configs.expand(rows)
    assert [row for row in rows if row["triton"] is None] == [row for row in shipped if row["triton"] is None]
    assert (table[KEY], table[OTHER], table[first[2].key]) == (FASTER, FAST, FAST)
    write(tmp_path / "tiles.json", rows)
    assert json.loads((tmp_path / "tiles.json").read_text()) == rows and len(list(tmp_path.iterdir())) == 1
    write(tmp_path / "tiles.json", shipped)
    assert (tmp_path / "tiles.json").read_text() == _configs.FILE.read_text()


def test_unwritable_table_leaves_the_old_one(tmp_path):
    file = tmp_path / "tiles.json"
    file.write_text("old")
    with pytest.raises(TypeError):
        write(file, [{"tile": object()}])
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("interrupted", [False, True])
def test_what_was_found_is_kept_at_once(interrupted, tmp_path, monkeypatch, capsys):
    table = dict(_configs.tiles())
    monkeypatch.setattr(_configs, "tiles", lambda: table)
    shipped = {key: _configs.look_up(key, 2) for key in (KEY, OTHER)}
    file = tmp_path / "tiles.json"

    def subject(key, trial):
        if key == OTHER:
            assert _configs.expand(json.loads(file.read_text()))[KEY] == FAST == _configs.look_up(KEY, 2)
            if interrupted:
                raise KeyboardInterrupt
        return Fake({shipped[key]: 1.0, FAST: 0.5 if key == KEY else 2.0})

    monkeypatch.setattr(tune, "GpuSubject", subject)
    monkeypatch.setattr(tune, "candidate_tiles", lambda key, tile: [FAST])
    assert tune.sweep([(TRIALS[1], KEY), (TRIALS[1], OTHER)], file, 60.0) == (130 if interrupted else 0)
    assert set(_configs.expand(json.loads(file.read_text()))) - set(
        _configs.expand(json.loads(_configs.FILE.read_text()))
    ) == {KEY}
    first, *_, last = capsys.readouterr().out.splitlines()
    assert (
        "attention softmax sm_90 bfloat16 d=64 tokens<=4096: 64x64 warps 4 stages 1 instead of" in first
        and "0.500 of its time" in first
    )
    assert last.startswith(
        "interrupted: 1 of 2 keys swept, 1 changed" if interrupted else "2 of 2 keys swept, 1 changed"
    )


def test_everything_is_there_most_important_first():
    chosen = tune.choose_keys(None, "sm_90", "3.6")
    keys = [key for _, key in chosen]
    widths = len(WORK) * len(trials.HEADS) + sum(map(len, trials.LISTED_HEAD_DIMS.values()))
    assert len(set(keys)) == len(keys) == widths * len(tune.DTYPES) * len(_configs.TOKEN_BUCKETS)
    assert {(key.op, key.mode) for key in keys} == {*WORK, *LISTED_WORK}
    elsewhere = {(key.op, key.mode) for _, key in tune.choose_keys(None, "sm_100", "3.6")}
    assert elsewhere == set(WORK)
    assert set(trials.USUAL_TOKENS) == set(_configs.TOKEN_BUCKETS)
    named = [f"{trial.name} {key.head_dim}" for trial, key in chosen[:8]]
    assert named[0] == "similarity joint 64"
    assert named[1:7] == [
        f"attention {mode} {head_dim}"
        for mode in ("counted softmax", "softmax")
        for head_dim in (64, 40, 128)
    ]
    assert named[7] == "attention contrast 64"
    assert all(key.tokens == 4096 and key.dtype == "bfloat16" for key in keys[:8])


CALLS = [(trial, call) for trial in TRIALS for call in (trial.timed, *trial.others) if isinstance(call, Call)]


@pytest.mark.parametrize(("trial", "call"), CALLS, ids=lambda value: getattr(value, "name", ""))
def test_checks_accept_right_and_see_wrong_rows(trial, call):
    inputs = shapes.make_inputs(Shape("", 2, 4, 300, 40), True, torch.float32, "cpu")
    ragged = trials.make_ragged(inputs, KEY)
    for x in (inputs, ragged):
        assert call.check(x, call.run(x, "tiled"), "tiled")
    result = call.run(inputs, "tiled")
    part = result[0] if isinstance(result, tuple) else result
    part.select(-2 if part.is_floating_point() else 2, -1).add_(1)
    assert not call.check(inputs, result, "tiled")


@pytest.mark.parametrize("trial", [trial for trial in TRIALS if trial.listed], ids=lambda trial: trial.name)
def test_listed_calls_launch_the_tried_tile(trial):
    if problem := _backends.triton_problem():
        pytest.skip(problem)
    from qalign_kernels._triton._launch import recording

    key = Key(trial.op, trial.mode, "sm_90", _configs.triton_minor(), "float16", 1024, 64)
    inputs = trials.make_inputs(key, "cpu")
    for call in (trial.timed, *trial.others):
        for tile in (*candidates.tiles(key), None):
            with _configs.trying(key, tile), recording("sm_90") as launches:
                call.run(inputs, "triton")
            rings = [launch.arguments for launch in launches if "BUFFERS" in launch.arguments]
            found = {(ring["BLOCK_N"], ring["BUFFERS"]) for ring in rings}
            assert (
                ((tile.block_n, tile.num_stages) in found) if tile else not found or call is not trial.timed
            )


@pytest.mark.parametrize("head_dim", [64, 40])
@pytest.mark.parametrize(
    "trial", [trial for trial in TRIALS if not trial.listed], ids=lambda trial: trial.name
)
def test_every_call_launches_with_the_tried_tile(trial, head_dim, device):
    if problem := _backends.triton_problem():
        pytest.skip(problem)
    from qalign_kernels._triton._launch import recording

    key, odd = (
        Key(trial.op, trial.mode, "sm_90", _configs.triton_minor(), "float16", 256, head_dim),
        Tile(16, 16, 4, 5),
    )
    inputs = trials.make_inputs(key, device)
    for call in (trial.timed, *(trial.others if head_dim == 64 else ())):
        for x in (inputs, trials.make_ragged(inputs, key)):
            with _configs.trying(key, odd), recording("sm_90") as launches:
                call.run(x, "triton")
            assert any(
                launch.num_stages == odd.num_stages and launch.arguments["BLOCK_M"] == odd.block_m
                for launch in launches
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_short_sweep_on_a_gpu(tmp_path, monkeypatch, capsys):
    table = dict(_configs.tiles())
    monkeypatch.setattr(_configs, "tiles", lambda: table)
    monkeypatch.setattr(measure, "_flush", None)
    file = tmp_path / "tiles.json"
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "tune", "--op", "packed", "--minutes", "0.5", "--out", str(file)]
    )
    assert __main__.main() == 0
    assert _configs.expand(json.loads(file.read_text()))
    assert not capsys.readouterr().out.splitlines()[-1].startswith("0 of")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--op", "nonsense"], "tune: --op: expected part of similarity joint, "),
        (["--out", "/proc/none/tiles.json"], "tune: --out: expected a folder to write to, got /proc"),
        ([], "tune: expected a GPU, because tiles are chosen by their time, got none"),
    ],
)
def test_bad_arguments_and_no_gpu_are_one_line(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "tune", *arguments])
    assert __main__.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(complaint)
