"""The choice of a backend, the imports of the package, and the outputs that fake implementations promise."""

import ast
import importlib
import importlib.metadata
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import qalign_kernels
from qalign_kernels import Segment, _backends, attention, env, similarity_argmax, use_backend
from qalign_kernels.testing import random_features
from qalign_kernels.validation import command as validate

PACKAGE = Path(qalign_kernels.__file__).parent
ROOT = PACKAGE.parent

BLOCKERS = {
    "absent": "raise ModuleNotFoundError(\"No module named 'triton'\")",
    "broken": "return importlib.machinery.ModuleSpec(name, self)",
}
BLOCK = """
import importlib.machinery, sys
class Blocker:
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        raise OSError("libtriton.so: undefined symbol")
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            {statement}
sys.meta_path.insert(0, Blocker())
"""
USE = """
import torch
from qalign_kernels import Segment, attention, qalign_attention
q, k, v = (torch.randn(1, 2, n, 40, generator=torch.Generator().manual_seed(n)) for n in (9, 12, 12))
assert torch.equal(attention(q, Segment(k, v)), attention(q, Segment(k, v), backend="tiled"))
assert qalign_attention(q, k, k, v).shape == q.shape
try:
    attention(q, Segment(k, v), backend="triton")
except RuntimeError as error:
    print(error)
from qalign_kernels.env import main
main()
"""


def run(code, **environment):
    """A fresh interpreter's output; the interpreter of Triton is off unless asked for."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "QALIGN_BACKEND")
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=120,
    )


@pytest.mark.parametrize("how", BLOCKERS)
def test_everything_but_triton_works_without_it(how):
    result = run(BLOCK.format(statement=BLOCKERS[how]) + USE)
    assert result.returncode == 0, result.stderr
    message, *report = result.stdout.splitlines()
    assert message.startswith(
        "backend: expected a backend that can run attention here, got 'triton': triton does not import ("
    )
    assert any(line.startswith("triton          triton does not import (") for line in report)
    assert any(line.split()[:3] == ["similarity_argmax", "float32", "tiled"] for line in report)


def test_import_needs_torch_only_and_environment_sets_default():
    code = """
import sys, torch
before = set(sys.modules)
import qalign_kernels
heavy = {"triton", "diffusers", "transformers", "accelerate", "PIL"}
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & heavy))
print(qalign_kernels._backends.requested(None))
"""
    result = run(code, QALIGN_BACKEND="reference")
    assert result.stdout.splitlines() == ["[]", "reference"], result.stderr


def imported_modules(path):
    """Every module that a file imports, absolute, whether at the top or inside a function."""
    package = ["qalign_kernels", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def test_implementations_never_import_each_other():
    implementations = ("reference", "tiled", "_triton")
    for own in implementations:
        files = list((PACKAGE / own).glob("*.py"))
        assert len(files) > 4
        for path in files:
            for module in imported_modules(path):
                if module.startswith("qalign_kernels"):
                    assert module.startswith(f"qalign_kernels.{own}"), f"{path.name} imports {module}"


def test_kernels_import_neither_diffusers_nor_qalign():
    for path in PACKAGE.rglob("*.py"):
        tops = {module.split(".")[0] for module in imported_modules(path)}
        assert not tops & {"diffusers", "transformers", "qalign", "numpy"}, path
        assert "triton" not in tops or path.parent.name == "_triton", path


def test_one_stem_in_every_place():
    for stem in ("similarity", "rearrange", "attention", "probe", "qalign_attention"):
        for place in (".", "reference", "tiled", "_triton"):
            assert (PACKAGE / place / f"{stem}.py").is_file(), (place, stem)


def test_an_explicit_backend_never_falls_back(monkeypatch):
    query, key = (random_features(1, 1, n, 32, seed=n) for n in (4, 5))

    class Broken:
        @staticmethod
        def attention(*_, **__):
            raise NotImplementedError

    monkeypatch.setattr(_backends, "implementation", lambda backend, stem: Broken)
    for backend in ("tiled", "reference"):
        with pytest.raises(NotImplementedError):
            attention(query, Segment(key, key), backend=backend)


def test_auto_says_why_once(caplog):
    tensor = torch.empty(1, 1, 1, 40, dtype=torch.float64, device="meta")
    _backends._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="qalign_kernels"):
        for _ in range(3):
            assert _backends.select("attention", "auto", tensor, (40,)) == "tiled"
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("attention runs on tiled PyTorch, not on Triton: ")


def test_auto_on_the_cpu_is_tiled():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert _backends.select("attention", "auto", torch.empty(1, dtype=dtype), (40,)) == "tiled"


def test_use_backend_nests_and_restores():
    assert _backends.requested("tiled") == "tiled"
    outside = _backends.requested(None)
    with use_backend("reference"):
        assert _backends.requested(None) == "reference"
        with use_backend("tiled"):
            assert _backends.requested(None) == "tiled"
            assert _backends.requested("reference") == "reference"
        assert _backends.requested(None) == "reference"
        with pytest.raises(KeyError), use_backend("tiled"):
            raise KeyError
        assert _backends.requested(None) == "reference"
    assert _backends.requested(None) == outside


def test_use_backend_reaches_the_calls_inside(monkeypatch):
    taken = []
    implementation = _backends.implementation
    monkeypatch.setattr(
        _backends,
        "implementation",
        lambda backend, stem: taken.append((backend, stem)) or implementation(backend, stem),
    )
    query = random_features(1, 2, 8, 32, seed=0)
    for name in ("reference", "tiled"):
        taken.clear()
        with use_backend(name):
            similarity_argmax(query, query)
        assert taken == [(name, "similarity")]


def features(*shape, dtype):
    return torch.zeros(shape).to(dtype)


def calls(dtype):
    """One call of each registered op: its name, and its arguments as CPU tensors."""
    query, key, value = (
        features(2, 4, 5, 40, dtype=dtype),
        features(3, 4, 7, 40, dtype=dtype),
        features(3, 4, 7, 64, dtype=dtype),
    )
    integers = {
        "rows": (2,),
        "query_labels": (1, 5),
        "key_labels": (2, 7),
        "index": (2, 1, 5),
        "topk": (2, 4, 5, 3),
        "counts": (2, 4, 7),
    }
    made = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in integers.items()}
    rows, query_labels, key_labels, index, topk, counts = made.values()
    segments = ([key], [value], [], [counts], [key_labels], [rows], query_labels, [1.0], [0.0], 0.0, 0.2, 1.0)
    score = torch.float32 if dtype != torch.float64 else torch.float64
    grad, lse = features(2, 4, 5, 64, dtype=dtype), torch.zeros(2, 4, 5, dtype=score)
    return {
        "similarity_argmax": (query, key, "cosine", True, query_labels, key_labels, rows, True, "tiled"),
        "similarity_topk": (query, key, 3, "dot", False, query_labels, key_labels, rows, "tiled"),
        "matched_score_backward": (lse[..., None], query, key, topk, "cosine", rows),
        "match_counts": (index, 7, "tiled"),
        "take_rows": (value[:2], index, "tiled"),
        "take_rows_backward": (grad, index, 7),
        "unit_features": (query, key, "tiled"),
        "attention": (query, *segments, True, False, "tiled"),
        "attention_backward": (grad, lse, grad, lse, query, *segments, [True, False, True], "tiled"),
        "topk_attention": (query, key, value, topk, 0.2, 1.0, rows, "tiled"),
        "topk_attention_backward": (grad, query, key, value, topk, 0.2, 1.67, rows),
        "rearranged_attention": (
            query,
            query,
            key,
            key,
            value,
            "cosine",
            "joint",
            0.2,
            1.0,
            query_labels,
            key_labels,
            rows,
            "tiled",
        ),
        "label_mass": (query, key[:2], key_labels, 6, 0.2, counts, "tiled"),
        "label_mass_backward": (
            lse[..., None],
            lse[..., None],
            query,
            key[:2],
            key_labels,
            1,
            0.2,
            counts,
            [True, False],
            "tiled",
        ),
        "mean_attention_map": (query, key[:2], 0.2, "tiled"),
        "mean_attention_map_backward": (torch.zeros(2, 5, 7, dtype=score), query, key[:2], 0.2),
        "distillation_loss": (
            features(2, 4, 5, 64, dtype=dtype),
            query,
            [key[:1]],
            [value[:1]],
            [key_labels],
            query_labels,
            0.2,
            True,
            "tiled",
        ),
        "distillation_loss_backward": (
            torch.zeros((), dtype=score),
            torch.zeros(2, 4, 5, 64, dtype=torch.int8),
            dtype,
        ),
    }


def tensors_of(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def test_every_registered_op_is_in_the_table():
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("qalign_kernels::")
    }
    assert registered == set(calls(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", calls(torch.float32))
def test_fakes_promise_what_the_op_returns(name, dtype):
    """A fake CUDA call, which needs no GPU, has the shapes, dtypes and strides of the op on the CPU."""
    op, arguments = getattr(torch.ops.qalign_kernels, name).default, calls(dtype)[name]
    real = tensors_of(op(*arguments))
    with FakeTensorMode():
        on_gpu = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"), arguments
        )
        fake = tensors_of(op(*on_gpu))
    assert len(fake) == len(real)
    for promised, returned in zip(fake, real):
        assert promised.device.type == "cuda"
        assert (promised.shape, promised.dtype, promised.stride()) == (
            returned.shape,
            returned.dtype,
            returned.stride(),
        )


@pytest.mark.parametrize(
    "refinement", ["rearranged", "guided", "topk", "warped_values", "warped_output", "soft", "none"]
)
def test_the_public_path_runs_on_fake_cuda_tensors(refinement):
    with FakeTensorMode():
        query, reference, value = (
            torch.empty(rows, 8, 64, 40, dtype=torch.bfloat16, device="cuda") for rows in (3, 1, 1)
        )
        rows = torch.zeros(3, dtype=torch.int32, device="cuda")
        own_key = query if refinement == "warped_values" else None
        output = qalign_kernels.qalign_attention(
            query, reference, reference, value, refinement=refinement, own_key=own_key, batch_index=rows
        )
    assert output.shape == query.shape and output.dtype == torch.bfloat16 and output.device.type == "cuda"


NOT_REPORTED = {
    "unit_features",
    *(name for name in calls(torch.float32) if name.endswith("_backward")),
    "take_rows",
    "rearranged_attention",
}


def test_env_says_what_auto_takes_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_backends, "interpreted", lambda: False)
    monkeypatch.setattr(_backends, "triton_problem", lambda: None)
    with FakeTensorMode():
        table = env.choices(torch.device("cuda"))
    assert {op for op, _ in table} == set(calls(torch.float32)) - NOT_REPORTED | {"rearrange_kv"}
    for (op, dtype), (chosen, reason) in table.items():
        served = dtype != "float64" or op == "match_counts"
        assert chosen == ("triton" if served else "tiled")
        assert reason == (
            "the Triton kernels support it"
            if served
            else "dtype float64 is not supported, only float16, bfloat16 and float32"
        )
    assert all(chosen == "tiled" for chosen, _ in env.choices(torch.device("cpu")).values())


@pytest.fixture
def versions(monkeypatch):
    """Give Triton and numpy another version until the test ends."""

    def install(triton, numpy=None):
        monkeypatch.setattr(importlib.import_module("triton"), "__version__", triton)
        if numpy is not None:
            installed = importlib.metadata.version
            monkeypatch.setattr(
                importlib.metadata, "version", lambda name: numpy if name == "numpy" else installed(name)
            )
        _backends.triton_problem.cache_clear()
        _backends.interpreter_problem.cache_clear()

    importlib.import_module("triton.language")
    yield install
    monkeypatch.undo()
    _backends.triton_problem.cache_clear()
    _backends.interpreter_problem.cache_clear()


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.5.0+git1234"])
def test_unsupported_triton_is_named(version, versions):
    """Triton 3.5 raised a CompilationError in the call, where "auto" should take the tiled path."""
    versions(triton=version)
    with FakeTensorMode():
        refusal = _backends.triton_refusal(torch.empty(1, device="cuda"), (64,))
        chosen = _backends.select("attention", "auto", torch.empty(1, device="cuda"), (64,))
    assert refusal == f"Triton {version} is not supported, only 3.6 and newer" and chosen == "tiled"
    assert refusal in env.report()


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0.0"])
def test_supported_triton_serves(version, versions):
    versions(triton=version, numpy="2.3.5")
    assert _backends.triton_problem() is None and _backends.interpreter_problem() is None


def test_old_interpreter_beside_new_numpy_is_named(versions, monkeypatch):
    versions(triton="3.6.0", numpy="2.4.0")
    monkeypatch.setattr(_backends, "interpreted", lambda: True)
    refusal = _backends.triton_refusal(torch.empty(1), (64,))
    assert refusal.startswith("the interpreter of Triton 3.6.0 does not work with numpy 2.4.0")
    assert refusal in env.report() and refusal == validate._triton_state(torch.device("cpu"))[0]
    monkeypatch.setattr(_backends, "interpreted", lambda: False)
    with FakeTensorMode():  # a GPU does not interpret
        assert _backends.triton_refusal(torch.empty(1, device="cuda"), (64,)) is None


def test_report_needs_no_numpy(versions, monkeypatch):
    """torch does not require numpy; only the interpreter does."""

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    versions(triton="3.7.1")
    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(_backends, "interpreted", lambda: False)
    assert "interpreter off; Triton's interpreter needs numpy" in env.report()
    with FakeTensorMode():
        assert _backends.triton_refusal(torch.empty(1, device="cuda"), (64,)) is None
