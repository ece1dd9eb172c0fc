"""Shared parts of all measurements: random inputs, time, peak memory, rows of figures and tables."""

import ctypes
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MIB = 2**20
NUM_LABELS = 4
FLUSH_MIB = 256  # larger than the L2 cache of any GPU
MOST_FLUSHES = 32
_flush: Tensor | None = None


class Sizes(NamedTuple):
    """The sizes of one attention layer.

    Queries are [batch, heads, tokens, head_dim], keys [batch, heads, key_tokens, head_dim] and values
    [batch, heads, key_tokens, value_dim].
    """

    batch: int
    heads: int
    tokens: int
    key_tokens: int
    head_dim: int
    value_dim: int

    @property
    def scores(self) -> int:
        """Count the score elements E = B·H·N_q·N_k."""
        return self.batch * self.heads * self.tokens * self.key_tokens


class Inputs(NamedTuple):
    """The tensors that the measured ops read.

    Attributes:
        query: [B, H, N_q, D].
        ref_query, key: [B, H, N_k, D].
        value: [B, H, N_k, D_v].
        output_gradient: [B, H, N_q, D_v], the weights of an output whose gradients are measured.
        match_map: int32 [B, 1, N_q] into the keys.
        counts: int32 [B, 1, N_k], how often `match_map` names each key.
        bit_sets, half_sets: int32 [B, N_k], labels of keys: NUM_LABELS or two regions of equal size, one bit
            each.
        query_bit_sets, query_half_sets: int32 [B, N_q], the same for queries.
        classes: int32 [B, N_k], the numbers of the regions of `bit_sets`.
    """

    query: Tensor
    ref_query: Tensor
    key: Tensor
    value: Tensor
    output_gradient: Tensor
    match_map: Tensor
    counts: Tensor
    bit_sets: Tensor
    half_sets: Tensor
    query_bit_sets: Tensor
    query_half_sets: Tensor
    classes: Tensor


FEATURES = ("query", "ref_query", "key", "value", "output_gradient")


def draw_inputs(
    sizes: Sizes, dtype: torch.dtype, device: str, *, matched_fraction: float | None = None, seed: int = 0
) -> Inputs:
    """Draw contiguous features from a normal distribution; the same seed gives the same.

    Args:
        matched_fraction: each query is a noisy copy of a token from this fraction of the reference tokens.
            None: queries are independent of the reference.
    """
    batch, heads, tokens, key_tokens, head_dim, value_dim = sizes
    generator = torch.Generator(device).manual_seed(seed)

    def normal(length: int, dim: int) -> Tensor:
        return torch.randn((batch, heads, length, dim), generator=generator, device=device)

    query, ref_query, key = (normal(length, head_dim) for length in (tokens, key_tokens, key_tokens))
    value = normal(key_tokens, value_dim)
    index = torch.randint(key_tokens, (batch, 1, tokens), generator=generator, device=device)
    if matched_fraction is not None:
        maps = [_map(tokens, key_tokens, matched_fraction, generator, device) for _ in range(batch)]
        index = torch.stack(maps).unsqueeze(1)
        rows = index.unsqueeze(-1).expand(-1, heads, -1, head_dim)
        query = ref_query.gather(2, rows) + 0.5 * query
    output_gradient = normal(tokens, value_dim)
    counts = torch.zeros((batch, 1, key_tokens), dtype=torch.int64, device=device)
    counts.scatter_add_(2, index, torch.ones_like(index))
    sets = [
        _bits(length, count, batch, device) for length in (key_tokens, tokens) for count in (NUM_LABELS, 2)
    ]
    features = [x.to(dtype) for x in (query, ref_query, key, value, output_gradient)]
    classes = _regions(key_tokens, NUM_LABELS, device).expand(batch, -1).int().contiguous()
    return Inputs._make([*features, index.int(), counts.int(), *sets, classes])


def _map(tokens: int, key_tokens: int, fraction: float, generator: torch.Generator, device: str) -> Tensor:
    """Draw a match map [tokens] onto this fraction of the reference tokens."""
    unique = min(tokens, max(1, round(fraction * key_tokens)))
    chosen = torch.randperm(key_tokens, generator=generator, device=device)[:unique]
    repeated = chosen[torch.randint(unique, (tokens - unique,), generator=generator, device=device)]
    return torch.cat((chosen, repeated))[torch.randperm(tokens, generator=generator, device=device)]


def _regions(tokens: int, count: int, device: str) -> Tensor:
    """Number the tokens by `count` consecutive regions of equal size."""
    return torch.arange(tokens, device=device).mul(count).div(tokens, rounding_mode="floor")


def _bits(tokens: int, count: int, batch: int, device: str) -> Tensor:
    return (1 << _regions(tokens, count, device)).int().expand(batch, -1).contiguous()


def in_processor_layout(inputs: Inputs) -> Inputs:
    """Copy the features to the memory layout of attention processors, [B, N, H, D] seen as [B, H, N, D]."""
    return inputs._replace(**{name: processor_layout(getattr(inputs, name)) for name in FEATURES})


def processor_layout(features: Tensor) -> Tensor:
    """Copy [B, H, N, D] to [B, N, H, D] in memory; the shape stays."""
    return features.transpose(1, 2).contiguous().transpose(1, 2)


def unique_fraction(index: Tensor) -> float:
    """Compute the number of distinct reference tokens per query token, U/N, averaged over maps [B, G, N]."""
    return sum(row.unique().numel() / row.numel() for row in index.flatten(0, 1)) / index.shape[:2].numel()


class CudaStamp:
    """A point in GPU time. The difference of two is in seconds and waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "CudaStamp") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def stamp() -> Any:
    """A `CudaStamp` if CUDA is measured, else the CPU time in seconds."""
    return CudaStamp() if _flush is not None else time.perf_counter()


def use_cuda() -> None:
    """Measure GPU time from now on, with an empty L2 cache before every round."""
    global _flush
    _flush = torch.empty(FLUSH_MIB << 20, dtype=torch.int8, device="cuda")


def before_round(flushes: int = 1) -> None:
    """Empty the L2 cache `flushes` times, so that the launches of the round queue behind it."""
    if _flush is not None:
        for _ in range(flushes):
            _flush.zero_()


class Hidden(NamedTuple):
    """How the time that the host needs for a call is hidden from the GPU time.

    Attributes:
        host_seconds: time of one call on the host, which does not wait for the GPU.
        flushes: number of cache flushes before each round, during which the host launches it.
        host_bound: the host needs longer than MOST_FLUSHES, so the measured time is that of the host.
    """

    host_seconds: float
    flushes: int
    host_bound: bool


def hide_host(call: Callable[[], Any]) -> Hidden:
    """Measure the time of a call on the host and the number of flushes that hide it; 1 flush on a CPU."""
    if _flush is None:
        return Hidden(0.0, 1, False)
    start = stamp()
    before_round(MOST_FLUSHES)
    flush_seconds = max((stamp() - start) / MOST_FLUSHES, 1e-6)
    host_seconds = statistics.median(_host_seconds(call) for _ in range(5))
    wanted = 1 + math.ceil(1.5 * host_seconds / flush_seconds)
    return Hidden(host_seconds, min(wanted, MOST_FLUSHES), wanted > MOST_FLUSHES)


def _host_seconds(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_rounds(call: Callable[[], Any], rounds: int, flushes: int = 1) -> list[float]:
    """Time single calls in seconds. On a GPU the L2 cache is empty, and rounds queue as in a busy stream."""
    stamps = []
    for _ in range(rounds):
        before_round(flushes)
        start = stamp()
        call()
        stamps.append((start, stamp()))
    return [end - start for start, end in stamps]


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """Compute p20, p50 and p80 of the rounds."""
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def cuda_peak_mib(call: Callable[[], Any]) -> float:
    """Measure the peak of the GPU memory that one call allocates, with its output."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def cpu_rise_mib(call: Callable[[], Any]) -> float:
    """Measure how far one call raises the peak resident size of this process."""
    before = _settle()
    result = call()
    rise = (_peak_bytes() - before) / MIB
    del result
    return rise


def fresh_process_rise_mib(
    prepare: Callable[..., Callable[[], Any]], *arguments: Any, preload: str
) -> float | None:
    """Measure the call that `prepare(*arguments)` returns, in a new process with as many threads as this one.

    `prepare` is a function of an importable module and warms up. `preload` is a module that it needs.

    Returns:
        MiB. None if that process gives no result, and on Windows, which cannot fork.
    """
    if sys.platform == "win32":
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", preload])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_rise, args=(sender, torch.get_num_threads(), prepare, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def _send_rise(
    sender: Connection, threads: int, prepare: Callable[..., Callable[[], Any]], arguments: tuple
) -> None:
    torch.set_num_threads(threads)
    with torch.no_grad():
        sender.send(cpu_rise_mib(prepare(*arguments)))


def _settle() -> int:
    """Free unused memory and reset the peak, if the system can; returns the resident size in bytes."""
    if not sys.platform.startswith("linux"):
        return _peak_bytes()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    if sys.platform.startswith("linux"):
        return _status_bytes("VmHWM")
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def saved_mib(call: Callable[[], Any], inputs: Sequence[Tensor]) -> tuple[float, Any]:
    """Measure what autograd saves for the backward pass of `call`, without `inputs`, each storage once.

    Returns:
        MiB, and the result of the call.
    """
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = call()
    given = {x.untyped_storage().data_ptr() for x in inputs}
    return sum(size for pointer, size in sizes.items() if pointer not in given) / MIB, result


def result_row(
    op: str,
    size: list[int],
    dtype: str,
    device: str,
    provider: str,
    seconds: list[float],
    *,
    work: float | None = None,
    yardstick: float | None = None,
    peak_mib: float | None = None,
    saved_mib: float | None = None,
    unique_fraction: float | None = None,
    hidden: Hidden | None = None,
) -> dict[str, Any]:
    """Make the row of figures of one provider.

    Args:
        size: [B, H, N, D].
        work: FLOPs of the op. None: the row has no TFLOP/s.
        yardstick: the median time of SDPA in seconds. None: the row has no ratio.
        hidden: how the rounds hid the time of the host. None: they did not.
    """
    p20, p50, p80 = percentiles(seconds)
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton_version(),
        "op": op,
        "shape": size,
        "dtype": dtype,
        "provider": provider,
        "p20_ms": round(p20 * 1e3, 4),
        "p50_ms": round(p50 * 1e3, 4),
        "p80_ms": round(p80 * 1e3, 4),
        "tflops": None if work is None else float(f"{work / p50 / 1e12:.4g}"),
        "peak_mib": None if peak_mib is None else round(peak_mib, 2),
        "saved_mib": None if saved_mib is None else round(saved_mib, 2),
        "ratio_to_sdpa": None if yardstick is None else float(f"{p50 / yardstick:.4g}"),
        "unique_fraction": None if unique_fraction is None else round(unique_fraction, 4),
        "host_us": round(hidden.host_seconds * 1e6, 1) if hidden and device == "cuda" else None,
        "host_bound": bool(hidden and hidden.host_bound),
    }


def device_name(device: str) -> str:
    """Name the GPU, or the processor and the number of threads of torch."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    return line.split(":", 1)[1].strip()


def triton_version() -> str | None:
    """The version of Triton, or None if it cannot be used."""
    return None if _backends.triton_problem() else sys.modules["triton"].__version__


def aligned(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format rows of cells as text in columns."""
    lines = [[str(cell) for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format rows of cells as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
