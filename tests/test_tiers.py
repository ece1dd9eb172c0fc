"""The tests about themselves: their names, their numbers, and the limit of the fast tier."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter

from tests.project import ROOT

MOST_WORDS, MOST_CASES = 8, 100
BUSY = """
import time
import pytest


def busy():
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


@pytest.fixture
def prepared():
    busy()


def test_cheap(): pass
def test_busy(): busy()
def test_busy_fixture(prepared): pass
@pytest.mark.slow
def test_slow(): busy()
"""


def test_names_have_at_most_eight_words():
    long = [
        f"{file.relative_to(ROOT)}: {node.name}"
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and len(node.name.split("_")) > MOST_WORDS + 1
    ]
    assert not long


def test_no_product_exceeds_a_hundred_cases(request):
    cases = Counter(item.nodeid.split("[")[0] for item in request.session.items)
    assert not {name: number for name, number in cases.items() if number > MOST_CASES}


def test_long_cases_fail_unless_marked_slow(tmp_path):
    (tmp_path / "test_busy.py").write_text(BUSY, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "tests.tiers", "-p", "no:cacheprovider", "-q", "-rf"]
    command += ["--rootdir", str(tmp_path), "-c", os.devnull, "-o", "markers=slow"]
    command += ["-o", "fast_case_seconds=0.2"]
    environment = os.environ | {
        "CI": "",  # there pytest repeats whole messages in its summary
        "BUILD_NUMBER": "",
        "PYTHONPATH": str(ROOT),
        "PYTEST_ADDOPTS": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert "2 failed, 2 passed" in done.stdout, done.stdout
    assert done.stdout.count("expected at most 0.2 s of processor time, got 0.") == 2
    assert re.findall(r"FAILED .*::(\w+)", done.stdout) == ["test_busy", "test_busy_fixture"]
