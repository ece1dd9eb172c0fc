"""Hold one op against float64 under the library's error budget: `python examples/validate_one_op.py`.

`python -m qalign_kernels.validate` does this for every op, backend, dtype and shape.
"""

import sys

import torch
from torch import Tensor

from qalign_kernels import Segment, attention
from qalign_kernels.testing import judge_formula


def formula(query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
    """softmax(q·k / sqrt(D) + log counts) v, with the whole matrix."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return (scores + counts.log().unsqueeze(-2)).softmax(-1) @ value


torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 8, 256, 40).unbind(0)  # [B, H, N, D]
counts = torch.randint(0, 4, (1, 1, 256), dtype=torch.int32)  # how often each key counts; 0 is absent

output = attention(query, Segment(key, value, counts=counts))
verdict = judge_formula(output, formula, query, key, value, counts, reduction=256)
print(f"error {verdict.error:.1e}, budget {verdict.budget:.1e}: {'passed' if verdict.passed else 'FAILED'}")
sys.exit(not verdict.passed)
