"""Kernels of other projects, where they are installed. Each function returns a call without arguments.

The inputs are converted to the peer's layout, normalised and squared outside the call, which favours the
peer. A missing package raises ImportError.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad, scaled_dot_product_attention

from qalign_kernels.bench.measure import Inputs

FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")


def fa3(x: Inputs) -> Callable[[], Tensor]:
    """Run the forward pass of FlashAttention 3, which takes [B, N, H, D]."""
    function = _first_found(FA3_MODULES, "flash_attn_func")
    query, key, value = (part.transpose(1, 2).contiguous() for part in (x.query, x.key, x.value))

    def call() -> Tensor:
        result = function(query, key, value)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return call


def sageattention(x: Inputs) -> Callable[[], Tensor]:
    """Attend with 8-bit scores, which are not the same numbers."""
    function = importlib.import_module("sageattention").sageattn
    return lambda: function(x.query, x.key, x.value, is_causal=False)


def flash_kmeans(x: Inputs, joint: bool) -> Callable[[], Tensor]:
    """Find the nearest centroid among vectors of equal norm, which is the most similar one; index only."""
    assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    points, centroids = ((_joined(part) if joint else part.flatten(0, 1)) for part in (x.query, x.ref_query))
    points, centroids = (
        normalize(part.float(), dim=-1).to(x.query.dtype).contiguous() for part in (points, centroids)
    )
    takes_squares = "x_sq" in inspect.signature(assign).parameters
    squares = {"x_sq": points.float().square().sum(-1)} if takes_squares else {}
    return lambda: assign(points, centroids, **squares)


COUNT_CHANNELS = 8  # two channels, padded so that rows are aligned to 16 bytes
NEVER = -30000.0  # a logit whose weight is zero, finite in float16


def _with_counts(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Extend the query by ones and the key by its counts, and pad the value to the same width.

    The query becomes [q, 1, 1] and the key [k, high, low], with high + low = ln(counts) / scale. Two channels
    of the inputs' precision hold the logarithm about as well as fp32 does.
    """
    dtype, scale = x.key.dtype, x.query.shape[3] ** -0.5
    logit = (x.counts.float().log() / scale).clamp(min=NEVER)
    high = logit.to(dtype)
    low = (logit - high.float()).to(dtype)
    channels = torch.stack((high, low), -1).expand(-1, x.key.shape[1], -1, -1)
    ones = torch.ones_like(x.query[..., :2])
    rest = (0, COUNT_CHANNELS - 2)
    query, key = pad(torch.cat((x.query, ones), -1), rest), pad(torch.cat((x.key, channels), -1), rest)
    return query, key, pad(x.value, (0, COUNT_CHANNELS))


def counted_sdpa(x: Inputs) -> Callable[[], Tensor]:
    """Attend with counts by any SDPA; two more channels hold the counts."""
    scale, width = x.query.shape[3] ** -0.5, x.value.shape[3]
    query, key, value = (_as_processors(part) for part in _with_counts(x))
    return lambda: scaled_dot_product_attention(query, key, value, scale=scale)[..., :width]


def counted_varlen(x: Inputs) -> Callable[[], Tensor]:
    """Attend with counts over the keys that were matched; their number stays on the device."""
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    if "seqused_k" not in inspect.signature(attend).parameters:
        raise ImportError("varlen_attn of this torch has no seqused_k")
    scale, width, batch = x.query.shape[3] ** -0.5, x.value.shape[3], x.query.shape[0]
    query, key, value = _with_counts(x)
    order = (x.counts.squeeze(1) == 0).sort(dim=-1, stable=True).indices  # [B, N_k], matched keys first
    places = order[:, None, :, None]
    key, value = (part.take_along_dim(places, dim=2) for part in (key, value))
    rows = [part.transpose(1, 2).flatten(0, 1).contiguous() for part in (query, key, value)]
    lengths = [part.shape[2] for part in (query, key)]
    starts = [
        torch.arange(batch + 1, device=x.query.device, dtype=torch.int32) * length for length in lengths
    ]
    used = (x.counts.squeeze(1) > 0).sum(-1).int()

    def call() -> Tensor:
        output = attend(*rows, *starts, *lengths, scale=scale, seqused_k=used)
        return output.unflatten(0, (batch, -1)).transpose(1, 2)[..., :width]

    return call


def _as_processors(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


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
