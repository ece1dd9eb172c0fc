"""The function that pytest collects: one op, one provider, one shape, one repeat.

`python -m benchmarks speed` runs it.
"""

import functools
from typing import Any

import pytest

from qalign_kernels.bench import measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    plan: Any = metafunc.config.pluginmanager.get_plugin("qalign-speed")
    metafunc.parametrize("item", plan.items, ids=plan.identify)


def bench_op(item: Any, benchmark: Any, request: pytest.FixtureRequest) -> None:
    plan: Any = request.config.pluginmanager.get_plugin("qalign-speed")
    measured = plan.prepare(item)
    setup = functools.partial(measure.before_round, measured.hidden.flushes)
    benchmark.pedantic(measured.call, setup=setup, rounds=measured.rounds, iterations=1)
    measured.seconds += benchmark.stats.stats.data
