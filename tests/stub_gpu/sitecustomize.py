"""Replace the GPU by one that does nothing. Python runs this at its start where the folder is on its path.

Triton launches on `benchmarks.gpu.stub_driver`, "cuda" is the CPU, memory is zero, and every check passes.
The lists of what is measured are short. Packages that a machine with a GPU may lack cannot be imported.
"""

import contextlib
import os
import sys
import time
import types
from pathlib import Path

STANDING = []  # what has no reference ends
ABSENT = ("diffusers", "matplotlib", "PIL", "pandas", "pytest", "scipy", "transformers", "accelerate")


class Event:
    def __init__(self, enable_timing=False):
        self.time = 0.0

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return 1e3 * (later.time - self.time)


class Stream:
    cuda_stream = 0

    def wait_stream(self, other):
        pass


class Graph:
    def replay(self):
        pass


def stand_in() -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    from benchmarks.gpu.stub_driver import stub_driver

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            options = options or {}
            moved = [on_cpu(argument) for argument in arguments]
            return function(*moved, **{name: on_cpu(option) for name, option in options.items()})

    class Generator:
        def __new__(cls, device="cpu"):
            return generator("cpu")

    def zeroed(function):
        return lambda *arguments, **options: function(*arguments, **options).zero_()

    def on_cpu(value):
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        return "cpu" if value == "cuda" and isinstance(value, str) else value

    for standing in (stub_driver(Path(os.environ["STUB_DRIVER"])), OnCpu()):
        standing.__enter__()
        STANDING.append(standing)
    generator, torch.Generator = torch.Generator, Generator
    torch.empty, torch.Tensor.new_empty = zeroed(torch.empty), zeroed(torch.Tensor.new_empty)
    properties = types.SimpleNamespace(
        name="stub",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
    )
    cuda = {
        "is_available": lambda: True,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1 << 20,
        "reset_peak_memory_stats": lambda: None,
        "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    torch.backends.cudnn.version = lambda: None  # torch for CUDA looks for the capabilities of all devices


def shorten() -> None:
    from qalign_kernels.bench import measure, ops

    ops.OPS[:] = [
        op._replace(check=lambda inputs, result, backend: True) for op in ops.OPS
    ]  # before any copy

    from benchmarks.gpu import must_show, plan
    from benchmarks.gpu.must_show import DEFAULT, Bar, Line
    from benchmarks.gpu.stages import ceilings, details, right, sanitizer, validation
    from benchmarks.suite import shapes
    from benchmarks.suite.shapes import Shape
    from benchmarks.tune import candidates
    from qalign_kernels.validation import command as validate

    small = Shape("small", 1, 2, 64, 64)
    shapes.SHAPES[:] = [small]
    must_show.LINES[:] = [
        Line("it", "match_counts", small, "time ratio", Bar(9, DEFAULT), (Bar(9, DEFAULT),))
    ]
    measure.FLUSH_MIB = ceilings.COPY_MIB = 1
    ceilings.MATMUL_SIZE = 64
    plan.CORE_SHAPES, plan.CORE_OPS = ("small",), ("match_counts", "rearrange_kv")
    plan._thirds = lambda visits: [visits]
    plan.FRACTIONS = (0.55,) * 2
    plan.DATA_OPS = ("match_counts",)
    plan._op_names = lambda: ["match_counts", "rearrange_kv"]
    right.CORE_OPS, right.USUAL, right.RAGGED = plan.CORE_OPS, (small,), ()
    right.joint_calls = list
    right.OPS = [op for op in ops.OPS if op.name in plan.CORE_OPS]
    places = (("similarity", "packed", [64, 128, 4, 3]), ("similarity", "joint hopper", [128, 256, 8, 4]))
    places += tuple(
        ("attention", f"{mode} hopper", [128, 128, 8, 4]) for mode in ("softmax", "counted softmax")
    )
    candidates.rows = lambda: [
        {"op": op, "mode": mode, "family": "hopper", "head_dims": [64], "tiles": [tile]}
        for op, mode, tile in places
    ]
    validate.OPS = {name: validate.OPS[name] for name in ("match_counts", "rearrange_kv")}
    validation.CORE = ("match_counts",)
    sanitizer.program = lambda: None
    details.L2_MIB, details.TILE_ROUNDS = (1,), 2


def shorten_gluon() -> None:
    from benchmarks.gpu.stages import gluon_joint
    from benchmarks.suite import shapes

    shapes.SHAPES.append(shapes.Shape("gluon", 1, 2, 300, 64))
    gluon_joint.JOINT_SHAPES = gluon_joint.ATTENTION_SHAPES = ("gluon",)


if "STUB_DRIVER" in os.environ and "resource_tracker" not in " ".join(sys.orig_argv):
    sys.modules.update(dict.fromkeys(ABSENT))
    stand_in()
    shorten()
    if "gluon_joint" in sys.orig_argv:
        shorten_gluon()
