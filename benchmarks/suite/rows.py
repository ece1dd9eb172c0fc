"""Result files: the row of a timed call, the same on every device, and how files are written and read.

A file is written whole or not at all. A list has one row a line. `kind_of` tells what a file holds.
"""

import functools
import json
import math
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qalign_kernels._files import replacing
from qalign_kernels.bench import measure

from .shapes import PROCESSOR

TIMES, COMPILED, HOST, VALIDATION, STAGE = "times", "static", "host", "validate", "gpu"  # the kinds of files


class Row(NamedTuple):
    """Time and memory of one provider, for one op at one shape. None means that it was not measured.

    Attributes:
        shape: [batch, heads, tokens, head_dim].
        tflops: by the definition of the op, for every provider.
        peak_mib: memory beyond the inputs, the output included.
        saved_mib: what autograd keeps for the backward pass.
        ratio_to_sdpa: time over that of SDPA on the same shape in the same run.
        unique_fraction: fraction of reference tokens that were matched, U/N.
        host_us: time that the host takes to launch one call.
        host_bound: whether the eager times are those of the host.
        layout: of the inputs, one of `shapes.LAYOUTS`; None in files older than this field.
        graph_p50_ms: as `p50_ms`, of a replay of the captured CUDA graph.
        ceiling_tflops: what a large matmul reached between the same rounds.
        implementation: the kernel family that ran, where torch chose it.
        asked_fraction: U/N for which the inputs were drawn; None where matches are by chance.
        layers: shapes of all layers, where the row is one step through a whole UNet.
        gradient_difference: relative to the gradient of the plain pipeline.
    """

    device: str
    torch: str
    triton: str | None
    op: str
    shape: list[int]
    dtype: str
    provider: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    tflops: float | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    ratio_to_sdpa: float | None = None
    unique_fraction: float | None = None
    host_us: float | None = None
    host_bound: bool = False
    layout: str | None = None
    commit: str = "unknown"
    graph_p20_ms: float | None = None
    graph_p50_ms: float | None = None
    graph_p80_ms: float | None = None
    graph_tflops: float | None = None
    ceiling_tflops: float | None = None
    implementation: str | None = None
    output_mib: float | None = None
    asked_fraction: float | None = None
    layers: list[list[int]] | None = None
    gradient_difference: float | None = None

    @property
    def ceiling_share(self) -> float | None:
        """The throughput of the graph over that of the matmul; None where either was not measured."""
        if self.graph_tflops is None or self.ceiling_tflops is None:
            return None
        return self.graph_tflops / self.ceiling_tflops


def timed_row(*arguments: Any, layout: str = PROCESSOR, **figures: Any) -> Row:
    """Make the row of `measure.result_row`, with the layout of the inputs and the commit of the checkout."""
    return Row(**measure.result_row(*arguments, **figures), layout=layout, commit=commit())


@functools.cache
def commit() -> str:
    """Name the checkout by its short hash, with "+" where files differ from it, or "unknown"."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = _output([*git, "rev-parse", "--short", "HEAD"])
        changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write(file: Path, content: Any) -> None:
    """Replace the file as a whole by the JSON of a list of rows or of a dictionary."""
    with replacing(file) as unfinished:
        unfinished.write_text(text(content), encoding="utf-8")


def text(content: Any) -> str:
    """Lay out JSON, a list with one row a line; numbers that are not finite become null."""
    plain = _plain(content)
    if isinstance(plain, list):
        return "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in plain) + "\n]\n"
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"


def _plain(content: Any) -> Any:
    if isinstance(content, Row):
        return _plain(content._asdict())
    if isinstance(content, dict):
        return {name: _plain(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read(file: Path) -> tuple[str, Any]:
    """Read a result file.

    Returns:
        Its kind, and what it holds: a list of `Row`s where the kind is TIMES, else as in the JSON.

    Raises:
        ValueError: the file, what was expected, and what it holds.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected JSON rows, got {error}") from None
    kind = kind_of(content)
    if kind is None:
        raise ValueError(f"{file}: expected a list of rows as `speed --json` writes it, got something else")
    return kind, parse(content) if kind == TIMES else content


def parse(content: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Make rows of what a file of times holds; fields that it lacks are those that were not measured."""
    return [Row(**row) for row in content]


def cells(row: Row, names: Iterable[str]) -> list[object]:
    """List the named fields of a row for a table; "-" stands for what was not measured."""
    values = (getattr(row, name) for name in names)
    return ["-" if value is None else value for value in values]


def kind_of(content: Any) -> str | None:
    """Tell what a result file holds by its fields; None where no command writes such a file."""
    if isinstance(content, dict):
        if "stage" in content:
            return STAGE
        return VALIDATION if {"device", "rows"} <= content.keys() else None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        return None
    if content and all("spill_bytes" in row for row in content):
        return COMPILED
    if content and all("kernels_us" in row for row in content):
        return HOST
    return (
        TIMES if all(Row._field_defaults.keys() | row.keys() == {*Row._fields} for row in content) else None
    )
