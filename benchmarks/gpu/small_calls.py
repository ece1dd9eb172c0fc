"""One small call of every op on the GPU: what compute-sanitizer looks at."""

import torch

from ..ops import OPS
from ..shapes import Shape, make_inputs

SHAPES = (Shape("small", 2, 2, 150, 64), Shape("small", 1, 3, 96, 40))


def main() -> None:
    for shape in SHAPES:
        inputs = make_inputs(shape, True, torch.bfloat16, "cuda")
        for op in OPS:
            with torch.no_grad():
                op.run(inputs, "triton")
            torch.cuda.synchronize()
            print(f"called {op.name} {shape.size}", flush=True)


if __name__ == "__main__":
    main()
