"""The providers of a measured op.

They are our backends, the reference, eager PyTorch and its compiled form, SDPA by name, FlexAttention and
others.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qalign_kernels import _backends
from qalign_kernels.bench.measure import Inputs
from qalign_kernels.bench.ops import SDPA, Op, attention_flops

from . import eager, peers
from .shapes import Shape

OURS = ("triton", "tiled")
FORCED_SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
IMPLEMENTATIONS = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "math",
}
EAGER_SDPA = "eager sdpa"
FLEX_FLASH = "flex flash"  # FlexAttention on FlashAttention 4, where torch has both
CHANNEL_PEERS = ("sdpa channels", "varlen channels")
PEERS = ("fa3", "sageattention", "flash_kmeans")
FLEX_OPS = ("attention", "attention_counts", "attention_labels", "attention_gradient")
COMPILED_OPS = ("attention", "similarity_argmax", "qalign_attention")
MAIN_OPS = ("attention", "similarity_argmax", "qalign_attention", "qalign_attention_correlated")


def names(op: Op, shape: Shape, device: str, quick: bool) -> list[str]:
    """List the providers that are measured beside each other; SDPA on the same shape is always there."""
    cuda = device == "cuda"
    result = [*(OURS if cuda else ("tiled",)), SDPA, "eager"]
    if (
        op.name.startswith(("attention", "qalign_attention"))
        and op.name not in ("attention_segments", "attention_gradient")
        and cuda
    ):
        result += FORCED_SDPA
    if _reference_gib(shape) < (40 if cuda else 6) and (
        not quick or shape.scores < 2e7 or op.name == "qalign_attention"
    ):
        result.append("reference")
    if op.name in COMPILED_OPS and not quick and (cuda or not shape.large):
        result.append("eager compiled")
    if op.name in FLEX_OPS and not quick and (cuda or not shape.large):
        result += ["flex", FLEX_FLASH] if cuda else ["flex"]
    if op.name == "attention_counts" and cuda:
        result += CHANNEL_PEERS
    return result


def _reference_gib(shape: Shape) -> float:
    """Estimate the memory of the reference: four score matrices in float32."""
    return 16 * shape.scores / 2**30


def build(provider: str, op: Op, x: Inputs) -> Callable[[], Any]:
    """Make a function without arguments that does the op once; raise where the provider cannot run here."""
    if provider in OURS or provider == "reference":
        return lambda: op.run(x, provider)
    if provider == "eager":
        return lambda: eager.peer(op.name)(x)
    if provider == "eager compiled":
        compiled = torch.compile(eager.peer(op.name), dynamic=False)
        return lambda: compiled(x)
    if provider in ("flex", FLEX_FLASH):
        return _flex(op.name, x, {"BACKEND": "FLASH"} if provider == FLEX_FLASH else None)
    if provider in CHANNEL_PEERS:
        return peers.counted_sdpa(x) if provider == "sdpa channels" else peers.counted_varlen(x)
    if provider == EAGER_SDPA:
        return lambda: eager.qalign_attention_by_sdpa(x)
    if provider == "flash_kmeans":
        return peers.flash_kmeans(x, joint=op.name == "similarity_argmax")
    if provider in PEERS:
        return getattr(peers, provider)(x)
    if provider == SDPA:
        return lambda: scaled_dot_product_attention(x.query, x.key, x.value)
    return lambda: _forced_sdpa(FORCED_SDPA[provider], x)


def sdpa_implementation(provider: str, x: Inputs) -> str | None:
    """Name the implementation that torch chooses for SDPA on these inputs; None for other providers."""
    if provider not in (SDPA, *FORCED_SDPA):
        return None
    forced = FORCED_SDPA.get(provider)
    with sdpa_kernel(forced) if forced else contextlib.nullcontext():
        chosen = SDPBackend(torch._fused_sdp_choice(x.query, x.key, x.value))
    return (
        _flash_implementation()
        if chosen == SDPBackend.FLASH_ATTENTION
        else IMPLEMENTATIONS.get(chosen, chosen.name)
    )


def _flash_implementation() -> str:
    """Name the FlashAttention that torch uses: FA2, unless another one was activated."""
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return active or "FA2"


def _forced_sdpa(backend: SDPBackend, x: Inputs) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(x.query, x.key, x.value)


def _flex(op_name: str, x: Inputs, options: dict[str, Any] | None) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(functools.partial(flex_attention, kernel_options=options), dynamic=False)
    if op_name == "attention_counts":
        bias = x.counts.float().log().squeeze(1)

        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[b, j]

        return lambda: compiled(x.query, x.key, x.value, score_mod=add_bias)
    if op_name == "attention_labels":
        classes, tokens = x.classes, x.query.shape[2]
        batch, device = x.query.shape[0], str(x.query.device)
        mask = create_block_mask(
            lambda b, h, i, j: classes[b, i] == classes[b, j], batch, None, tokens, tokens, device=device
        )
        return lambda: compiled(x.query, x.key, x.value, block_mask=mask)
    if op_name == "attention_gradient":
        return lambda: eager.gradient(compiled, x)
    return lambda: compiled(x.query, x.key, x.value)


def flops(provider: str, op: Op, shape: Shape) -> float | None:
    """Count FLOPs of the op's definition. SDPA and FlexAttention always do plain attention."""
    if provider.startswith(SDPA) and provider not in CHANNEL_PEERS:
        return attention_flops(shape.sizes)
    return op.flops(shape.sizes) if op.flops else None


def refusal(provider: str, op: Op, x: Inputs) -> str | None:
    """Give the reason why one of our backends cannot serve this op here, or None."""
    if provider != "triton":
        return None
    return _backends.triton_refusal(x.query, (x.query.shape[3],))
