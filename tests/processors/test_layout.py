"""BatchLayout: roles, guidance halves and images per prompt, against rows written out by hand."""

import importlib

import pytest
import torch

from qalign import BatchLayout, Site

TRIPLET = ("output", "appearance", "structure")
ROLES = "3 roles (output, appearance, structure)"
SIX = f"batch: expected 6 or 12 rows = {ROLES} x 1 or 2 guidance parts x 2 images per prompt"


@pytest.mark.parametrize(
    ("layout", "batch", "expected"),
    [
        (BatchLayout(*TRIPLET), 3, {"output": (0,), "appearance": (1,), "structure": (2,), "other": (1, 2)}),
        (
            BatchLayout(*TRIPLET),
            6,
            {"output": (0, 3), "appearance": (1, 4), "structure": (2, 5), "other": (1, 2, 4, 5)},
        ),
        (
            BatchLayout(*TRIPLET, images_per_prompt=2),
            6,
            {"output": (0, 1), "appearance": (2, 3), "structure": (4, 5)},
        ),
        (
            BatchLayout(*TRIPLET, images_per_prompt=2),
            12,
            {"output": (0, 1, 6, 7), "appearance": (2, 3, 8, 9), "other": (2, 3, 4, 5, 8, 9, 10, 11)},
        ),
        (
            BatchLayout("appearance", "plain", "output"),
            3,
            {"output": (2,), "appearance": (0,), "other": (0, 1)},
        ),
        (
            BatchLayout("output", "output", "appearance"),
            6,
            {"output": (0, 1, 3, 4), "appearance": (2, 2, 5, 5), "other": (2, 5)},
        ),
        (
            BatchLayout("output", "appearance", "output", "appearance"),
            4,
            {"output": (0, 2), "appearance": (1, 3)},
        ),
        (BatchLayout("output", "appearance", guidance=True), 4, {"output": (0, 2), "appearance": (1, 3)}),
        (BatchLayout("appearance", "output", "appearance"), 6, {"output": (1, 4), "other": (0, 2, 3, 5)}),
    ],
)
def test_rows(layout, batch, expected) -> None:
    for role, rows in expected.items():
        assert layout.rows(role, batch) == rows
        index = layout.index(role, batch, torch.device("cpu"))
        assert index.dtype == torch.int32 and tuple(index.tolist()) == rows
        assert layout.index(role, batch, torch.device("cpu")) is index, "made anew at every call"


@pytest.mark.parametrize(
    ("layout", "batch", "expected"),
    [
        (BatchLayout("output", "appearance", "appearance"), 6, [[1, 4], [2, 5]]),
        (
            BatchLayout("appearance", "output", "structure", "appearance", images_per_prompt=2),
            8,
            [[0, 1], [6, 7]],
        ),
        (BatchLayout(*TRIPLET), 6, [[1, 4]]),
        (BatchLayout("output", "output", "appearance"), 3, [[2, 2]]),
        (BatchLayout("output", "appearance", "output", "appearance"), 4, [[1, 3]]),
        (BatchLayout("output").extended("appearance", "appearance"), 3, [[1], [2]]),
    ],
)
def test_references(layout, batch, expected) -> None:
    assert [rows.tolist() for rows in layout.references(batch, torch.device("cpu"))] == expected
    assert all(rows.dtype == torch.int32 for rows in layout.references(batch, torch.device("cpu")))


def test_every_row_is_an_output_or_another() -> None:
    for images in (1, 2, 3):
        layout = BatchLayout("plain", "output", "structure", "output", "appearance", images_per_prompt=images)
        for parts in (1, 2):
            batch = 5 * images * parts
            assert sorted(layout.rows("output", batch) + layout.rows("other", batch)) == list(range(batch))


def test_a_batch_of_outputs_has_no_other_rows() -> None:
    assert BatchLayout("output", "output").index("other", 2, torch.device("cpu")).shape == (0,)


def test_index_is_built_without_the_host() -> None:
    index = BatchLayout(*TRIPLET).index("appearance", 6, torch.device("meta"))
    assert index.device.type == "meta" and index.shape == (2,)


def test_index_made_in_inference_mode_serves_autograd() -> None:
    with torch.inference_mode():
        index = BatchLayout(*TRIPLET, images_per_prompt=5).index("output", 15, torch.device("cpu"))
    x = torch.ones(15, requires_grad=True)
    x.index_select(0, index).sum().backward()
    assert x.grad.sum() == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BatchLayout(),
            "roles: expected one or more of output, appearance, structure, plain, got 'none'",
        ),
        (
            lambda: BatchLayout("ouput"),
            "roles: expected one or more of output, appearance, structure, plain, got 'ouput'",
        ),
        (lambda: BatchLayout("output", guidance=2), "guidance: expected True, False or None, got 2"),
        (
            lambda: BatchLayout("output", images_per_prompt=0),
            "images_per_prompt: expected an integer of at least 1, got 0",
        ),
        (
            lambda: BatchLayout("output", "output", "output", "appearance", "appearance"),
            "roles: expected no appearance, one, or one for each of 3 outputs, got 2",
        ),
        (
            lambda: BatchLayout("output", "appearance", "appearance").rows("appearance", 3),
            "layout: expected one appearance, because this method reads only one, got 2 for one output",
        ),
        (
            lambda: BatchLayout("output", "structure", "structure"),
            "roles: expected no structure, one, or one for each of 1 outputs, got 2",
        ),
        (
            lambda: BatchLayout("output").references(1, torch.device("cpu")),
            "layout: expected a row of role 'appearance', got roles output",
        ),
        (
            lambda: BatchLayout(*TRIPLET, images_per_prompt=2).parts(9),
            f"{SIX}, got 9 rows",
        ),
        (
            lambda: BatchLayout(*TRIPLET, guidance=True).rows("output", 3),
            f"batch: expected 6 rows = {ROLES} x 2 guidance parts x 1 images per prompt, got 3 rows",
        ),
        (
            lambda: BatchLayout("output", "structure").rows("appearance", 2),
            "layout: expected a row of role 'appearance', got roles output, structure",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(make, message) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


def test_extended_layout_is_whole_when_constructed() -> None:
    layout = BatchLayout("output", "structure", guidance=True).extended("appearance", "structure")
    assert layout == BatchLayout("output", "plain", "appearance", "structure", guidance=True, unread=2)
    assert layout.rows("other", 8) == (1, 5)


def test_rows_are_resolved_once_for_a_layout(monkeypatch) -> None:
    module = importlib.import_module("qalign.context.layout")
    made = []

    def counted(*arguments):
        made.append(arguments)
        return make(*arguments)

    make = module._make_index
    module._cached_index.cache_clear()
    monkeypatch.setattr(module, "_make_index", counted)
    q = torch.zeros(6, 2, 4, 8)
    for _ in range(3):
        site = Site(BatchLayout(*TRIPLET))
        site.merge(q, q, q, q[site.output_rows(q)])
    assert sorted(role for _, role, *_ in made) == ["other", "output", "output"]  # int32, and int64 to write
