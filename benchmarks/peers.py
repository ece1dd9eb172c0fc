"""Other people's kernels, where they are installed. Each function returns a call without arguments; what is not there raises ImportError.

Inputs are brought into the peer's own layout, normalised and squared outside the call, which favours the peer.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from qalign_kernels.bench.measure import Inputs

FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")


def fa3(x: Inputs) -> Callable[[], Tensor]:
    """FlashAttention 3's forward, [B, N, H, D] inside."""
    function = _first_found(FA3_MODULES, "flash_attn_func")
    query, key, value = (part.transpose(1, 2).contiguous() for part in (x.query, x.key, x.value))

    def call() -> Tensor:
        result = function(query, key, value)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return call


def sageattention(x: Inputs) -> Callable[[], Tensor]:
    """Attention with 8-bit scores: not the same numbers."""
    function = importlib.import_module("sageattention").sageattn
    return lambda: function(x.query, x.key, x.value, is_causal=False)


def flash_kmeans(x: Inputs, joint: bool) -> Callable[[], Tensor]:
    """Nearest centroid among vectors of equal norm, which is the most similar one: the index only."""
    assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    points, centroids = ((_joined(part) if joint else part.flatten(0, 1)) for part in (x.query, x.ref_query))
    points, centroids = (normalize(part.float(), dim=-1).to(x.query.dtype).contiguous() for part in (points, centroids))
    takes_squares = "x_sq" in inspect.signature(assign).parameters
    squares = {"x_sq": points.float().square().sum(-1)} if takes_squares else {}
    return lambda: assign(points, centroids, **squares)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _first_found(modules: tuple[str, ...], name: str) -> Any:
    problems = []
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:  # an extension built for another torch may raise anything
            problems.append(f"{module}: {type(error).__name__}: {error}".splitlines()[0])
    raise ImportError("; ".join(problems))
