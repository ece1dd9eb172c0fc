"""The two tiers of the tests, as a plugin of pytest: a case without `slow` fails where it takes too long.

A case is measured with its fixtures and with the processes that it waited for. Processor time counts,
because a busy machine hardly changes it. Where many threads share the work, the shorter wall time counts.
`fast_case_seconds` in pyproject.toml is several times what a case without `slow` should take.
"""

import os
from collections.abc import Generator

import pytest
import torch

BEGUN = pytest.StashKey[tuple[float, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("fast_case_seconds", "what a case without `slow` may take", default="10")


def clocks() -> tuple[float, float]:
    """Seconds of processor time, of this process and all that it has waited for, and on the wall."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system, used.elapsed


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGUN] = clocks()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    seconds = min(now - begun for now, begun in zip(clocks(), item.stash[BEGUN]))
    most = float(item.config.getini("fast_case_seconds"))
    compiles = torch.cuda.is_available()  # kernels, on their first call: that is not the case's fault
    if seconds > most and not compiles and item.get_closest_marker("slow") is None:
        pytest.fail(
            f"case: expected at most {most:g} s of processor time, got {seconds:.1f} s; "
            "make the case cheaper or mark it slow",
            pytrace=False,
        )
    return result
