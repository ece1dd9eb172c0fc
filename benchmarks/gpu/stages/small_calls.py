"""Make one small call of every op of a part, for compute-sanitizer.

Usage: `python -m benchmarks.gpu.stages.small_calls PART PARTS`.
"""

import sys

import torch

from qalign_kernels._triton import _labels
from qalign_kernels.bench.ops import OPS

from ...suite.shapes import Shape, make_inputs

SHAPES = (Shape("small", 2, 2, 150, 64), Shape("small", 1, 3, 96, 40))
SORTED_FROM = (
    1,
    _labels.SORTED_FROM,
)  # tokens are sorted by label in the first shape as they are where there are many


def main(part: int, parts: int) -> None:
    for shape, sorted_from in zip(SHAPES, SORTED_FROM):
        _labels.SORTED_FROM = sorted_from
        inputs = make_inputs(shape, True, torch.bfloat16, "cuda")
        for op in OPS[part::parts]:
            with torch.no_grad():
                op.run(inputs, "triton")
            torch.cuda.synchronize()
            print(f"called {op.name} {shape.size}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
