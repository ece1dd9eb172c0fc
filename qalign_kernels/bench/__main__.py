"""Measure time and peak memory of ops on this machine, at any shape, beside SDPA of the same shape.

Each result is first compared with float64 on up to 256 sampled query rows, under the error budget of
`qalign_kernels.testing`. A wrong result has no figures. Inputs are random, in the memory layout of the
attention processors of diffusers. Rounds of the op and of SDPA alternate. On a GPU the L2 cache is emptied
before each round.

examples:
  python -m qalign_kernels.bench --op attention --shape 1,8,4096,64 --dtype bf16
  python -m qalign_kernels.bench --op attention label_mass --shape 2,8,1024,80 --key-tokens 77 --json FILE

Exit status: 0 if all ops were measured, 1 if a result is outside its budget, 2 for bad arguments.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__, _backends, _command_line
from .._files import Files, drafting
from . import measure
from .measure import DTYPES, Inputs, Sizes
from .ops import OPS, SDPA, TOPK, Op, build, draw, op_named, prepare

REPEATS = 3  # each measures the op and SDPA in alternating order, so that drift cancels in their ratio
MAX_ROUNDS = 100  # of one repeat
HEAD = ("op", "shape", "dtype", "provider", "p20 ms", "p50 ms", "p80 ms", "TFLOP/s", "peak MiB", "x SDPA")
SHOWN = ("dtype", "provider", "p20_ms", "p50_ms", "p80_ms", "tflops", "peak_mib", "ratio_to_sdpa")


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected four numbers B,H,N,D above zero, such as 1,8,4096,64, got {text!r}"
        )
    return tuple(map(int, parts))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    names = [op.name for op in OPS]
    parser.add_argument(
        "--op", nargs="+", choices=names, required=True, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        required=True,
        metavar="B,H,N,D",
        help="batch size, heads, query tokens and channels of a head",
    )
    parser.add_argument(
        "--key-tokens",
        type=_command_line.count,
        metavar="N",
        help="tokens of keys and values (default: N of --shape)",
    )
    parser.add_argument(
        "--value-dim",
        type=_command_line.count,
        metavar="D",
        help="channels of a head of the values (default: D of --shape)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, fp32 on the CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--backend", choices=_backends.BACKENDS, default="auto", help="default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=_command_line.positive,
        default=1.0,
        metavar="S",
        help="time for the rounds of each op (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")


def files(options: argparse.Namespace) -> Files:
    """The file that the command writes."""
    return Files(writes=[] if options.json is None else [("--json", options.json)])


def _sizes(options: argparse.Namespace) -> Sizes:
    batch, heads, tokens, head_dim = options.shape
    return Sizes(batch, heads, tokens, options.key_tokens or tokens, head_dim, options.value_dim or head_dim)


def choose_backend(name: str, sizes: Sizes, dtype: torch.dtype, device: str) -> str:
    """Choose the measured backend: "auto" is Triton on a GPU where it serves these sizes, else tiled.

    Raises:
        ValueError: "triton" cannot serve these sizes, or would run in its interpreter on a CPU.
    """
    if name not in ("auto", "triton"):
        return name
    probe = torch.empty(1, dtype=dtype, device=device)
    refusal = _backends.triton_refusal(probe, (sizes.head_dim, sizes.value_dim))
    if device == "cpu":
        refusal = "on a CPU Triton runs in its interpreter only, whose time has no meaning"
    if name == "triton" and refusal:
        raise ValueError(f"--backend: expected a backend that can be measured here, got triton: {refusal}")
    return "tiled" if refusal else "triton"


def measure_op(
    op: Op, backend: str, sizes: Sizes, dtype: str, device: str, seconds: float
) -> list[dict[str, Any]]:
    """Check the result of an op, then measure the op and SDPA.

    Args:
        dtype: a key of `DTYPES`.
        seconds: time for the rounds of both together.

    Returns:
        One row of figures for each of the two; no rows if the check fails.
    """
    inputs = draw(op, sizes, DTYPES[dtype], device)
    if not op.check(inputs, op.run(inputs, backend), backend):
        return []
    calls = {provider: build(provider, op, inputs) for provider in (backend, SDPA)}
    rounds, hidden = {}, {}
    for provider, call in calls.items():
        call()
        hidden[provider] = measure.hide_host(call)
        once = max(measure.time_rounds(call, 1)[0], 1e-6)
        rounds[provider] = max(1, min(MAX_ROUNDS, round(seconds / len(calls) / REPEATS / once)))
    taken: dict[str, list[float]] = {provider: [] for provider in calls}
    for repeat in range(REPEATS):
        for provider in list(calls)[:: 1 if repeat % 2 == 0 else -1]:
            taken[provider] += measure.time_rounds(
                calls[provider], rounds[provider], hidden[provider].flushes
            )
    yardstick = measure.percentiles(taken[SDPA])[1]
    rows = []
    for provider, call in calls.items():
        row = measure.result_row(
            op.name,
            [sizes.batch, sizes.heads, sizes.tokens, sizes.head_dim],
            dtype,
            device,
            provider,
            taken[provider],
            work=_work(provider, op, sizes),
            yardstick=yardstick,
            peak_mib=_peak_mib(provider, op, inputs, sizes, call),
            saved_mib=_saved_mib(provider, op, inputs, call),
            hidden=hidden[provider],
        )
        more = {"key_tokens": sizes.key_tokens, "value_dim": sizes.value_dim, "rounds": len(taken[provider])}
        rows.append(row | more | {"version": __version__})
    return rows


def _work(provider: str, op: Op, sizes: Sizes) -> float | None:
    """The FLOPs of the op by its formula; for SDPA those of plain attention."""
    flops = op_named("attention").flops if provider == SDPA else op.flops
    return flops(sizes) if flops else None


def _peak_mib(provider: str, op: Op, inputs: Inputs, sizes: Sizes, call: Any) -> float | None:
    if inputs.query.device.type == "cuda":
        return measure.cuda_peak_mib(call)
    arguments = (provider, op.name, sizes, inputs.query.dtype)
    return measure.fresh_process_rise_mib(prepare, *arguments, preload="qalign_kernels.bench.ops")


def _saved_mib(provider: str, op: Op, inputs: Inputs, call: Any) -> float | None:
    tensors: Sequence[Tensor] = inputs
    return measure.saved_mib(call, tensors)[0] if op.learned and provider != SDPA else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as text, one line for each."""
    lines = []
    for row in rows:
        batch, heads, tokens, head_dim = row["shape"]
        size = f"{batch},{heads},{tokens},{head_dim}"
        size += f" keys {row['key_tokens']}" if row["key_tokens"] != tokens else ""
        size += f" values {row['value_dim']}" if row["value_dim"] != head_dim else ""
        lines.append([row["op"], size, *("-" if row[key] is None else row[key] for key in SHOWN)])
    return measure.aligned(HEAD, lines)


def run(options: argparse.Namespace) -> int:
    """Measure the chosen ops and print the table; returns the exit status."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a device of this machine, got cuda, but torch finds no GPU")
    dtype = options.dtype or ("bf16" if device == "cuda" else "fp32")
    sizes = _sizes(options)
    if any("topk" in name for name in options.op) and sizes.key_tokens < TOPK:
        raise ValueError(
            f"--key-tokens: expected at least {TOPK} for a top-{TOPK} op, got {sizes.key_tokens}"
        )
    backend = choose_backend(options.backend, sizes, DTYPES[dtype], device)
    if device == "cuda":
        measure.use_cuda()
    print(f"qalign_kernels {__version__}, torch {torch.__version__}, {measure.device_name(device)}")
    print("results outside the error budget against float64 have no figures", flush=True)
    rows: list[dict[str, Any]] = []
    wrong = []
    with torch.no_grad(), drafting(options.json) as draft:
        for name in options.op:
            measured = measure_op(op_named(name), backend, sizes, dtype, device, options.seconds)
            rows += measured
            wrong += [] if measured else [name]
            lines = ",\n".join(json.dumps(row) for row in rows)
            draft(f"[\n{lines}\n]\n")  # after every op, so that an interrupted run keeps its rows
    if rows:
        print(table(rows))
    for row in rows:
        if row["host_bound"]:
            print(f"{row['op']} {row['provider']}: host-bound, so the time is that of its launches")
    for name in wrong:
        print(f"FAILED {name} on {backend}: outside the error budget against float64, so no speed is shown")
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    top = _command_line.Parser(
        prog="python -m qalign_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _command_line.add_command(top, sys.modules[__name__])
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return _command_line.main(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
