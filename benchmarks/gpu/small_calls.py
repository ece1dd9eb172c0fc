"""One small call of every op of a part on the GPU, for compute-sanitizer: `python -m benchmarks.gpu.small_calls PART PARTS`."""

import sys

import torch

from ..ops import OPS
from ..shapes import Shape, make_inputs

SHAPES = (Shape("small", 2, 2, 150, 64), Shape("small", 1, 3, 96, 40))


def main(part: int, parts: int) -> None:
    for shape in SHAPES:
        inputs = make_inputs(shape, True, torch.bfloat16, "cuda")
        for op in OPS[part::parts]:
            with torch.no_grad():
                op.run(inputs, "triton")
            torch.cuda.synchronize()
            print(f"called {op.name} {shape.size}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
