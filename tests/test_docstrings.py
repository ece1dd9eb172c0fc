"""The examples in docstrings run, in the namespace that a reader is expected to have."""

import doctest
import functools
import importlib
import re

import pytest
import torch

import qalign_kernels
from tests.project import ROOT


def modules() -> list[str]:
    """The modules of both packages that show an example, by dotted name."""
    files = [file for package in ("qalign_kernels", "qalign") for file in (ROOT / package).rglob("*.py")]
    shown = [file.relative_to(ROOT) for file in files if ">>> " in file.read_text(encoding="utf-8")]
    names = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in shown]
    return sorted(set(names))


@functools.cache
def pictures() -> list[torch.Tensor]:
    """Two scenes [3, 32, 32] in 0 to 1."""
    return list(importlib.import_module("qalign.embedded.scenes").render([3, 11], size=32).image)


def namespace() -> dict:
    """What an example may use without an import: torch, a small pipeline, a prompt, two pictures, latents."""
    models = importlib.import_module("tests.processors.models")
    appearance, structure = pictures()
    noise = torch.randn(1, 4, models.SIZE, models.SIZE, generator=torch.Generator().manual_seed(0))
    return {
        "torch": torch,
        "pipe": models.make_pipe("sd15"),
        "prompt": "a photo of a zebra",
        "appearance": appearance,
        "structure": structure,
        "latents": noise[[0, 0, 0]],
    }


def fewer_steps(source: str) -> str:
    """The same example with two denoising steps where it has many."""
    return re.sub(r"(num_inference_steps\"? ?[=:] ?)\d+", r"\g<1>2", source)


def failures(test: doctest.DocTest, names: dict) -> str:
    """What doctest reports of an example that runs with these names; empty where it succeeds."""
    test.globs.update({**names, **test.globs})
    report: list[str] = []
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=options).run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name):
    pytest.importorskip("diffusers")
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    assert tests
    for test in tests:
        for example in test.examples:
            example.source = fewer_steps(example.source)
        assert not (report := failures(test, namespace())), report


@pytest.mark.parametrize("name", qalign_kernels.__all__)
def test_public_names_of_kernels_show_running_examples(name):
    """A new public op, class or context manager of `qalign_kernels` needs an example."""
    test, *_ = doctest.DocTestFinder().find(getattr(qalign_kernels, name), name)
    assert any(example.want for example in test.examples)
    assert not (report := failures(test, {"torch": torch})), report
