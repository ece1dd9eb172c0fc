"""Launches that are replayed, over the stub driver: they are what Triton's own launch would be."""

import pytest

from tests.stubbed import run_over_stub

pytestmark = pytest.mark.slow
RUNS = """
import threading
from unittest import mock
from triton import knobs
from qalign_kernels import Segment, _backends, match_counts, qalign_attention
from qalign_kernels._triton import _configs, _launch, _replay, rearrange
from qalign_kernels.attention import Guide
from qalign_kernels.testing import poisoned_memory
from replay_checks import difference, features

result = {}
sizes = (1, 2, 80, 16)
key = _configs.Key("attention", "counted softmax", "sm_90", None, "bfloat16", None, 16)
small = [(key._replace(mode=mode), _configs.Tile(32, 32, 4, 1)) for mode in ("counted softmax", "softmax")]
for one, tile in small:
    _configs.put(one, tile)
x = features(*sizes)

def transfer(tensors, scale=0.25):
    query, *reference = tensors
    module = _backends.implementation("triton", "qalign_attention")
    settings = {"scale": scale, "contrast": 1.0}
    return lambda: module.rearranged_attention(query, query, *reference, "cosine", True, **settings)

def rows(tensor, index):
    return lambda: _backends.implementation("triton", "rearrange").take_rows(tensor, index)

result["qalign_attention"] = difference(stub, transfer(x))
result["another_scale"] = difference(stub, transfer(x, scale=0.5))
result["other_tensors"] = difference(stub, transfer(features(*sizes)), calls=1)
result["one_tensor_twice"] = difference(stub, transfer([x[0], x[0], x[2], x[3]], 0.125))
result["two_tensors_then"] = difference(stub, transfer(x, 0.125))
index = torch.zeros(1, 1, 70, dtype=torch.int32)
result["take_rows"] = difference(stub, rows(x[0], index))
result["other_strides"] = difference(stub, rows(x[0].contiguous(), index))
result["misaligned"] = difference(stub, rows(*features(*sizes, count=1, offset=1), index))
result["aligned_again"] = difference(stub, rows(x[0], index), calls=1)
result["one_row"] = difference(stub, rows(x[0][:, :1, :1], index[..., :1]))
result["seventeen_rows"] = difference(stub, rows(x[0], index[..., :17]))
result["float32"] = difference(stub, rows(*features(*sizes, count=1, dtype=torch.float32), index))

def matched(query, reference, rows=None):
    module = _backends.implementation("triton", "similarity")
    return lambda: module.similarity_argmax(query, reference, "cosine", True, None, None, rows)

import contextlib

listed = contextlib.ExitStack()
for mode in ("softmax hopper", "counted softmax hopper"):
    for dtype in ("bfloat16", "float16"):
        wanted = _configs.Key("attention", mode, "sm_90", _configs.triton_minor(), dtype, 1024, 64)
        listed.enter_context(_configs.trying(wanted, _configs.Tile(128, 128, 8, 4)))
wide = (2, 2, 300, 64)
result["hopper"] = difference(stub, matched(*features(*wide, count=2)))
result["hopper_other_tensors"] = difference(stub, matched(*features(*wide, count=2)), calls=1)
chosen = torch.zeros(2, dtype=torch.int32)
result["hopper_batch_index"] = difference(stub, matched(*features(*wide, count=2), chosen))
counted = transfer(features(*wide))
result["hopper_counted"] = difference(stub, counted)
with stub.recording() as calls:
    counted()
result["hopper_threads"] = [call.block[0] for call in calls]

from qalign_kernels import Segment as Keys

def attended(query, key, value, rows=None):
    module = _backends.implementation("triton", "attention")
    settings = {"contrast": 1.0, "query_labels": None, "guide": None, "need_lse": True}
    return lambda: module.attention(query, [Keys(key, value, batch_index=rows)], scale=0.125, **settings)

result["hopper_attention"] = difference(stub, attended(*features(*wide, count=3)))
result["hopper_attention_batch_index"] = difference(stub, attended(*features(*wide, count=3), chosen))
with stub.recording() as calls:
    attended(*features(*wide, count=3))()
result["hopper_attention_threads"] = [call.block[0] for call in calls]
listed.close()
difference(stub, transfer(x))  # the table changed: what was replayed is watched again

stub.stream = 5
result["other_stream"] = difference(stub, transfer(x), calls=1)
stub.stream = 0

def units(tensors):
    return lambda: _backends.implementation("triton", "qalign_attention").unit_features(*tensors)

def guided(query, reference, key, value):
    guide = Guide(query, reference, 20.0)
    settings = {"scale": 0.25, "contrast": 1.0, "query_labels": None, "guide": guide, "need_lse": False}
    module = _backends.implementation("triton", "attention")
    return lambda: module.attention(query, [Segment(key, value)], **settings)

result["units"] = difference(stub, units(x[:2]))
result["units_of_one_tensor"] = difference(stub, units([x[0], x[0]]))
result["guided"] = difference(stub, guided(*x))
for _ in range(3):
    with mock.patch.object(_replay, "_replay", wraps=_replay._replay) as replayed, stub.recording() as calls:
        qalign_attention(*x, refinement="guided", backend="triton")
result["public_guided"] = [replayed.call_count, len(calls)]

for _ in range(3):
    with mock.patch.object(_replay, "_replay", wraps=_replay._replay) as replayed:
        qalign_attention(*x, backend="triton")
result["public_op"] = replayed.called

def grids():
    with stub.recording() as calls:
        transfer(x)()
    return [call.grid[0] for call in calls]

before = grids()
with _configs.trying(key, _configs.Tile(16, 32, 4, 1)):
    result["exchanged_tile"] = difference(stub, transfer(x))
    result["tile_grids"] = [before, grids()]
result["tile_grids"].append(grids())

hooked = []
knobs.runtime.launch_enter_hook.add(hooked.append)
transfer(x)()
knobs.runtime.launch_enter_hook.calls.clear()
result["hooked"] = len(hooked)
with _launch.recording("sm_90") as noted:
    launches = stub.launches
    transfer(x)()
    result["recorded"] = [len(noted), stub.launches - launches]

with poisoned_memory():
    result["zeros"] = [int(match_counts(index, 90, backend="triton").count_nonzero()) for _ in range(4)]

launches, failures = stub.launches, []
def work(tensors):
    try:
        for _ in range(40):
            transfer(tensors)()
            transfer(tensors, scale=0.75)()
    except Exception as error:
        failures.append(repr(error))
threads = [threading.Thread(target=work, args=(features(*sizes),)) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
result["threads"] = [failures, stub.launches - launches]
result["after_threads"] = difference(stub, transfer(x), calls=1)

for number in range(_replay.KEPT + 20):
    rows(x[0], index.expand(1, 1, 70)[..., : 1 + number % 70])()
    transfer(x, scale=1.0 + number)()
result["kept"] = [_replay._kind.cache_info().currsize, _replay.KEPT]
"""
SAME = """
    hopper_attention hopper_attention_batch_index
    qalign_attention another_scale other_tensors one_tensor_twice two_tensors_then take_rows other_strides
    misaligned aligned_again one_row seventeen_rows float32
    hopper hopper_other_tensors hopper_batch_index hopper_counted
    other_stream exchanged_tile after_threads units units_of_one_tensor guided
""".split()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_over_stub(RUNS, tmp_path_factory.mktemp("stub"))


@pytest.mark.parametrize("case", SAME)
def test_replay_launches_what_triton_launches(results, case):
    assert results[case] is None


def test_hopper_kernels_get_new_tensor_maps(results):
    """Eight warps multiply; the one that loads takes the place of four."""
    assert results["hopper_threads"].count(12 * 32) == 2  # argmax and attention
    assert results["hopper_attention_threads"] == [12 * 32]


def test_the_public_op_is_replayed(results):
    assert results["public_op"]


def test_the_guided_op_is_replayed_whole(results):
    """Its unit features were computed with torch."""
    assert results["public_guided"] == [2, 2]


def test_replay_follows_an_exchanged_tile(results):
    before, inside, after = results["tile_grids"]
    assert before == after
    assert inside[:-1] == before[:-1] and inside[-1] > before[-1]


def test_launch_hooks_see_every_launch(results):
    assert results["hooked"] == 4


def test_recorded_launches_are_not_replayed(results):
    assert results["recorded"] == [4, 0]


def test_a_call_that_computes_is_not_replayed(results):
    assert results["zeros"] == [0, 0, 0, 0]


def test_threads_replay_side_by_side(results):
    assert results["threads"] == [[], 6 * 40 * 2 * 4]


def test_kinds_of_call_are_bounded(results):
    kept, most = results["kept"]
    assert kept <= most
