"""Kernels stay readable: helpers take few parameters, and the formatter lays out the code."""

import ast

import pytest

from tests.project import ROOT

FILES = sorted((ROOT / "qalign_kernels" / "_triton").glob("*.py"))
MOST_PARAMETERS = 12


def _device_functions(path):
    """The names and numbers of parameters of functions under `@triton.jit`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
            yield node.name, len(node.args.args)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_device_helpers_take_few_parameters(path):
    helpers = {name: count for name, count in _device_functions(path) if not name.endswith("_kernel")}
    assert {name: count for name, count in helpers.items() if count > MOST_PARAMETERS} == {}


def test_every_launch_is_of_a_function_named_kernel():
    """The rule above leaves out entry points only. Two are in Gluon; the argmax chooses between two."""
    names = {name for path in FILES for name, _ in _device_functions(path)}
    launched = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
                launched.add(ast.unparse(node.args[0]).rsplit(".", 1)[-1])
    launched -= {"kernel", "attention_hopper_kernel"}
    assert launched | {"_similarity_argmax_kernel"} == {name for name in names if name.endswith("_kernel")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_tables_are_laid_out_by_hand(path):
    marked = [line for line in path.read_text(encoding="utf-8").splitlines() if "fmt: skip" in line]
    assert all(line.startswith("}") for line in marked)
