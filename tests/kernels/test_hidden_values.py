"""What labels and counts hide takes no part. What is seen shows, as a NaN too, in the rows that see it."""

import math

import pytest
import torch

from qalign_kernels import _backends
from qalign_kernels.tiled import _labels as tiled_labels
from qalign_kernels.tiled import _seen
from tests.kernels.calls import CALLS, Inputs, gradients, inputs

HIDDEN = [0, 7]  # tokens that hold what nothing may read, among them the one that stands in for "no match"
POISONS = (math.nan, math.inf)
HIDING = [name for name in CALLS if "labels" in name or "counts" in name]
# in these ops queries also see what their labels hide, or the tensor has no labels
SEEN = {
    "distillation_loss labels": {"value"},
    "qalign_attention warped_values labels rows": {"query"},
    "qalign_attention soft labels rows": {"query"},
}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _inputs():
    """Inputs of which some tokens have no label and no multiplicity."""
    x = inputs()
    labels, counts = x.labels.clone(), x.counts.clone()
    labels[:, HIDDEN], counts[:, :, HIDDEN] = 0, 0
    return x._replace(labels=labels, counts=counts)


def _hidden_leaves(name):
    if name == "match_counts":
        return []
    leaves = ["key", "value"] if "counts" in name else ["query", "reference", "key", "value"]
    return [leaf for leaf in leaves if leaf not in SEEN.get(name, ())]


def _poisoned(x, leaves, tokens, poison):
    changed = {leaf: getattr(x, leaf).clone() for leaf in leaves}
    for tensor in changed.values():
        tensor[:, :, tokens] = poison
        tensor[:, :, tokens[-1]] *= -1
    return x._replace(**changed)


def _skip_without_triton():
    if refusal := _backends.triton_refusal(torch.empty(1), ()):
        pytest.skip(refusal)


def _gradients(call, x, backend):
    """The gradients; none where Triton refuses them."""
    try:
        return gradients(call, x, backend)
    except RuntimeError as error:
        if backend != "triton" or "gradient" not in str(error):
            raise
        return []


def _check(name, backend, poisons):
    call, x = CALLS[name], _inputs()
    expected, slopes = call(x, backend), _gradients(call, x, backend)
    # Triton computes the rows that a hidden NaN reached again, and sums them in another order
    near = {"rtol": 1e-3, "atol": 1e-5} if backend == "triton" else {"rtol": 1e-5, "atol": 1e-6}
    for poison in poisons:
        dirty = _poisoned(x, _hidden_leaves(name), HIDDEN, poison)
        torch.testing.assert_close(call(dirty, backend), expected, **near)
        for found, clean in zip(_gradients(call, dirty, backend), slopes, strict=True):
            torch.testing.assert_close(found, clean, **near)
            assert found is None or found.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("name", HIDING)
def test_hidden_tokens_take_no_part(name, backend):
    """Neither results nor gradients change, and no gradient reaches the hidden tokens."""
    _check(name, backend, POISONS)


@pytest.mark.parametrize("name", [name for name in HIDING if "labels" in name])
def test_more_label_sets_than_groups_hide_too(name, monkeypatch):
    """The tiled path of devices, and of more label sets than it groups queries by."""
    monkeypatch.setattr(tiled_labels, "MOST_GROUPS", 0)
    monkeypatch.setattr(_seen, "on_host", lambda x: False)
    _check(name, "tiled", POISONS)


@pytest.mark.slow
@pytest.mark.parametrize("by_label", [False, True])
@pytest.mark.parametrize("name", HIDING)
def test_interpreted_kernels_hide_too(name, by_label, monkeypatch):
    _skip_without_triton()
    if by_label:
        from qalign_kernels._triton import _labels

        monkeypatch.setattr(_labels, "SORTED_FROM", 1)
    _check(name, "triton", POISONS[:1] if by_label else POISONS)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_seen_shows_in_the_same_rows(name):
    _compare_with_reference(name, "tiled")


@pytest.mark.slow
@pytest.mark.parametrize("name", HIDING)
def test_interpreted_kernels_show_the_same_rows(name):
    _skip_without_triton()
    _compare_with_reference(name, "triton")


def _compare_with_reference(name, backend):
    """Each leaf holds a NaN or an infinity at a token that some queries see."""
    call, x = CALLS[name], _inputs()
    for leaf in Inputs._fields[:4]:
        for poison in POISONS if leaf == "value" else POISONS[:1]:
            dirty = _poisoned(x, [leaf], [1], poison)
            found, expected = call(dirty, backend), call(dirty, "reference")
            assert torch.equal(found.isnan(), expected.isnan()), (leaf, poison)
            assert torch.equal(found.isinf(), expected.isinf()), (leaf, poison)
