"""What a type checker says of a user's script."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import qalign
import qalign_kernels

pytest.importorskip("mypy")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import dataclasses
from typing import Any
import torch
import qalign
import qalign_kernels
from qalign import *
from qalign_kernels import Segment, attention, similarity_argmax

@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Editing):
    weight: float = 0.5

    def edit(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor, reference: torch.Tensor, site: Site) -> torch.Tensor:
        return attention(take(q, output), site.reference(k, v, reference), scale=site.scale)

picture: Any = None
q = k = v = torch.zeros(1, 2, 4, 8)
"""
PIPELINES = "qalign.pipelines"
TYPES = {
    "AppearanceTransferPipeline.embedded()": f"{PIPELINES}.appearance_transfer.AppearanceTransferPipeline",
    "AppearanceTransferPipeline.from_pipe(picture)": f"{PIPELINES}.appearance_transfer.AppearanceTransferPipeline",
    "AppearanceTransferXLPipeline.from_pipe(picture)": f"{PIPELINES}.appearance_transfer.AppearanceTransferXLPipeline",
    "AppearanceTransferPipeline.embedded()(picture, picture)": f"{PIPELINES}.appearance_transfer.AppearanceTransferOutput",
    "AppearanceTransferPipeline.embedded().invert(picture, picture)": "qalign.inversion.Inversion",
    "AttentionDistillationPipeline.embedded()": f"{PIPELINES}.attention_distillation.AttentionDistillationPipeline",
    "AttentionDistillationXLPipeline.from_pipe(picture)": f"{PIPELINES}.attention_distillation.AttentionDistillationXLPipeline",
    "AttentionDistillationPipeline.embedded()(picture)": f"{PIPELINES}.attention_distillation.AttentionDistillationOutput",
    "AttentionDistillationPipeline.embedded().expand(picture, 64, 64)": f"{PIPELINES}.attention_distillation.AttentionDistillationOutput",
    "BoundedAttentionPipeline.embedded()": f"{PIPELINES}.bounded_attention.BoundedAttentionPipeline",
    "BoundedAttentionXLPipeline.from_pipe(picture)": f"{PIPELINES}.bounded_attention.BoundedAttentionXLPipeline",
    "BoundedAttentionPipeline.embedded()('a', [])": f"{PIPELINES}.bounded_attention.BoundedAttentionOutput",
    "attach(picture, Own())": "qalign.control.Control",
    "attach(picture, Own(weight=0.3)).__enter__()": "qalign.control.Control",
    "attention(q, Segment(k, v))": "torch._tensor.Tensor",
    "similarity_argmax(q, k).score": "torch._tensor.Tensor",
}


@pytest.fixture
def reveal(tmp_path):
    """What mypy reveals of expressions, with the project's settings: then what `make lint` has kept serves here too."""

    def run(expressions):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT + "\n".join(f"reveal_type({expression})" for expression in expressions))
        found = subprocess.run([sys.executable, "-m", "mypy", script], cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
        return re.findall(r'Revealed type is "(.*)"', found.stdout)

    return run


def test_types_are_those_of_the_library(reveal) -> None:
    assert dict(zip(TYPES, reveal(TYPES))) == TYPES


def test_every_public_name_has_a_type(reveal) -> None:
    names = [f"{package.__name__}.{name}" for package in (qalign, qalign_kernels) for name in package.__all__]
    revealed = dict(zip(names, reveal(names)))
    assert len(revealed) == len(names) and "Any" not in revealed.values()
