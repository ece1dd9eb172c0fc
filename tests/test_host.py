"""The benchmark of the host's part of a call."""

import pytest

from tests.stubbed import run_over_stub


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return run_over_stub(
        """
        from benchmarks.gpu import host
        host.SHAPES = ((1, 2, 64, 16),)
        result = host.measure(["similarity_argmax"], 5, Path(sys.argv[1]))
        """,
        tmp_path_factory.mktemp("stub"),
    )


@pytest.mark.slow
def test_replay_takes_half_the_host_time(rows):
    ordinary, replayed = rows
    assert (ordinary["launches"], replayed["launches"]) == ("ordinary", "replayed")
    assert 0 < replayed["p20_us"] <= replayed["p50_us"] < ordinary["p50_us"] / 2


@pytest.mark.slow
def test_both_ways_launch_the_same_kernels(rows):
    ordinary, replayed = (list(row["kernels_us"]) for row in rows)
    assert ordinary == replayed and "_similarity_argmax_kernel" in ordinary
