"""Stage "ceilings": the most that this GPU reaches in copies, a large matmul, and single instructions."""

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qalign_kernels.bench import measure
from qalign_kernels.bench.measure import percentiles

from ..running import arguments
from .environment import nvidia_smi

COPY_MIB = 1024
MATMUL_SIZE = 8192
CLOCK_FIELD = "clocks.sm"


def times(call: Callable[[], Any], seconds: float) -> list[float]:
    """Time single calls for about `seconds`, in seconds, with an empty L2 cache before each."""
    call()
    torch.cuda.synchronize()
    start = time.monotonic()
    result: list[float] = []
    while len(result) < 5 or time.monotonic() - start < seconds:
        measure.before_round()
        before = measure.stamp()
        call()
        result.append(measure.stamp() - before)
    return result


def copy(seconds: float) -> dict[str, Any]:
    """Measure how many bytes a device copy reads and writes per second."""
    source = torch.randint(256, (COPY_MIB << 20,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    p20, p50, p80 = percentiles(times(lambda: target.copy_(source), seconds))
    moved = 2 * source.numel()
    return {
        "name": "copy",
        "unit": "GB/s",
        "value": moved / p50 / 1e9,
        "p20_ms": p20 * 1e3,
        "p50_ms": p50 * 1e3,
        "p80_ms": p80 * 1e3,
    }


def large_matmul() -> Callable[[], Tensor]:
    """Make the matmul that defines shares. Its data are random: zeros cost less power and run faster."""
    left, right, product = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    return lambda: torch.matmul(left, right, out=product)


def matmul_tflops(seconds: float) -> float:
    """Convert the time of one `large_matmul`."""
    return 2 * MATMUL_SIZE**3 / seconds / 1e12


def matmul(seconds: float) -> dict[str, Any]:
    """Measure `large_matmul` and the clock rates while it runs."""
    call = large_matmul()
    with Clocks() as clocks:
        p20, p50, p80 = percentiles(times(call, seconds))
    figures = {
        "p20_ms": p20 * 1e3,
        "p50_ms": p50 * 1e3,
        "p80_ms": p80 * 1e3,
        "sm_mhz_while_running": clocks.summary(),
    }
    return {"name": "matmul bf16 8192^3", "unit": "TFLOP/s", "value": matmul_tflops(p50), **figures}


class Clocks:
    """The SM clock, read by nvidia-smi several times a second."""

    def __enter__(self) -> "Clocks":
        self._readings: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._stop.wait(0.05):
            value = nvidia_smi(CLOCK_FIELD).get(CLOCK_FIELD, "").removesuffix(" MHz")
            if not value.isdigit():
                return
            self._readings.append(float(value))

    def summary(self) -> list[float] | None:
        """Give the smallest, the median and the largest reading."""
        return (
            [min(self._readings), statistics.median(self._readings), max(self._readings)]
            if self._readings
            else None
        )


def main() -> int:
    options = arguments.parser(__doc__).parse_args()
    measure.use_cuda()
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    share = options.seconds / 12
    for name, reach in (("copy", copy), ("matmul", matmul), ("instruction rates", _rates)):
        try:
            found = reach(share)
            rows += found if isinstance(found, list) else [found]
        except Exception as error:  # the other ceilings may work
            problems.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
        arguments.write(options.out, "ceilings", rows=rows, problems=problems)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _rates(seconds: float) -> list[dict[str, Any]]:
    from .instruction_rates import measure

    return measure(seconds)
