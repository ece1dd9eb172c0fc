"""What a type checker says of a user's script."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qalign
import qalign_kernels
from qalign.methods import _names

pytest.importorskip("mypy")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import dataclasses
from typing import Any
import torch
from torch import Tensor
import qalign
import qalign_kernels
from qalign import *
from qalign_kernels import Segment, attention, similarity_argmax

@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Editing):
    weight: float = 0.5

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        return attention(take(q, output), site.reference(k, v, reference), scale=site.scale)

picture: Any = None
q = k = v = torch.zeros(1, 2, 4, 8)
"""
TRANSFER = "qalign.pipelines.appearance_transfer.AppearanceTransfer"
DISTILLATION = "qalign.pipelines.attention_distillation.AttentionDistillation"
BOUNDED = "qalign.pipelines.bounded_attention.BoundedAttention"
TYPES = {
    "AppearanceTransferPipeline.embedded()": f"{TRANSFER}Pipeline",
    "AppearanceTransferPipeline.from_pipe(picture)": f"{TRANSFER}Pipeline",
    "AppearanceTransferXLPipeline.from_pipe(picture)": f"{TRANSFER}XLPipeline",
    "AppearanceTransferPipeline.embedded()(picture, picture)": f"{TRANSFER}Output",
    "AppearanceTransferPipeline.embedded().invert(picture, picture)": "qalign.sampling.inversion.Inversion",
    "AttentionDistillationPipeline.embedded()": f"{DISTILLATION}Pipeline",
    "AttentionDistillationXLPipeline.from_pipe(picture)": f"{DISTILLATION}XLPipeline",
    "AttentionDistillationPipeline.embedded()(picture)": f"{DISTILLATION}Output",
    "AttentionDistillationPipeline.embedded().expand(picture, 64, 64)": f"{DISTILLATION}Output",
    "BoundedAttentionPipeline.embedded()": f"{BOUNDED}Pipeline",
    "BoundedAttentionXLPipeline.from_pipe(picture)": f"{BOUNDED}XLPipeline",
    "BoundedAttentionPipeline.embedded()('a', [])": f"{BOUNDED}Output",
    "attach(picture, Own())": "qalign.processors.attach.Control",
    "attach(picture, Own(weight=0.3)).__enter__()": "qalign.processors.attach.Control",
    "attention(q, Segment(k, v))": "torch._tensor.Tensor",
    "similarity_argmax(q, k).score": "torch._tensor.Tensor",
}


@pytest.fixture
def reveal(tmp_path):
    """What mypy reveals of expressions, with the project's settings: the cache of `make lint` serves."""

    def run(expressions):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT + "\n".join(f"reveal_type({expression})" for expression in expressions))
        found = subprocess.run(
            [sys.executable, "-m", "mypy", script], cwd=ROOT, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return re.findall(r'Revealed type is "(.*)"', found.stdout)

    return run


@pytest.mark.slow
def test_types_are_those_of_the_library(reveal) -> None:
    assert dict(zip(TYPES, reveal(TYPES))) == TYPES


def test_type_checkers_see_the_classes_of_the_table() -> None:
    tree = ast.parse((ROOT / "qalign/methods/_classes.py").read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert {each.name: node.module for node in found for each in node.names} == _names.MODULES


@pytest.mark.slow
def test_every_public_name_has_a_type(reveal) -> None:
    names = [f"{package.__name__}.{name}" for package in (qalign, qalign_kernels) for name in package.__all__]
    revealed = dict(zip(names, reveal(names)))
    assert len(revealed) == len(names) and "Any" not in revealed.values()
