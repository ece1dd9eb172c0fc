"""torch.export of every op with dynamic sizes, and AOTInductor: one program for all rows and tokens."""

import shutil

import pytest
import torch
from torch.export import Dim, export

import qalign_kernels as qk
from tests.kernels.calls import CALLS, Inputs, inputs

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
FIRST = {name.split()[0]: name for name in reversed(CALLS)}.values()  # one call of each op
SIZES = ((3, 12), (2, 7), (5, 20))  # rows and tokens; the program is made at the first
FEATURES = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
ROWS, LABELS = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
SHAPES = Inputs(*[FEATURES] * 4, labels=LABELS, counts=FEATURES, rows=ROWS)


class Module(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *tensors):
        return self.call(Inputs(*tensors), "auto")


def check(call, strict):
    module = Module(call)
    program = export(module, tuple(inputs(*SIZES[0])), dynamic_shapes=(tuple(SHAPES),), strict=strict)
    assert any("qalign_kernels" in str(node.target) for node in program.graph.nodes)
    for size in SIZES:
        x = inputs(*size)
        torch.testing.assert_close(program.module()(*x), call(x, "auto"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_exported_ops_take_other_sizes(name):
    check(CALLS[name], strict=False)


@pytest.mark.parametrize("name", FIRST)
def test_strictly_exported_ops_take_other_sizes(name):
    check(CALLS[name], strict=True)


class Matched(torch.nn.Module):
    """Two ops; the second has an empty list among its arguments."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(16, 16)

    def forward(self, query, reference, key, value):
        matched = qk.qalign_attention(query, reference, key, value)
        return self.out(qk.attention(matched, qk.Segment(key, value)))


@torch.no_grad()
def test_aot_inductor_takes_other_sizes(tmp_path):
    compiler = torch._inductor.config.cpp.cxx[1]
    if shutil.which(compiler) is None:
        pytest.skip(f"AOTInductor compiles C++, and there is no compiler {compiler}")
    module = Matched().eval()
    program = export(module, tuple(inputs(*SIZES[0]).leaves()), dynamic_shapes=(FEATURES,) * 4)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "module.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for size in SIZES:
        leaves = inputs(*size).leaves()
        torch.testing.assert_close(compiled(*leaves), module(*leaves), rtol=1e-5, atol=1e-6)
