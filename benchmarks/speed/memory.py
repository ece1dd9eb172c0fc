"""Peak memory of one call on the CPU, beyond its inputs and with its output."""

from collections.abc import Callable
from typing import Any

import torch

from qalign_kernels.bench import measure
from qalign_kernels.bench.ops import op_named

_WARM_UP_TOKENS = 64


def cpu_peak_mib(provider: str, op_name: str, shape: tuple, dtype: torch.dtype) -> float | None:
    """Measure the rise of the peak resident size in a fresh process; None without a result."""
    return measure.fresh_process_rise_mib(
        _prepare, provider, op_name, shape, dtype, preload="benchmarks.suite.providers"
    )


def _prepare(provider: str, op_name: str, shape: tuple, dtype: torch.dtype) -> Callable[[], Any]:
    from ..suite.providers import build
    from ..suite.shapes import Shape, make_inputs

    op, measured = op_named(op_name), Shape(*shape)
    small = measured._replace(batch=1, tokens=_WARM_UP_TOKENS)
    build(provider, op, make_inputs(small, op.correlated, dtype, "cpu"))()
    return build(provider, op, make_inputs(measured, op.correlated, dtype, "cpu"))
