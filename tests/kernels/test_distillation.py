"""distillation_loss: the formula, its gradient, what it refuses, and that no ideal output is held."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn.functional import l1_loss
from torch.nn.functional import scaled_dot_product_attention as sdpa

from qalign_kernels import Segment, attention, distillation_loss
from qalign_kernels.testing import judge, judge_formula, random_features, random_integers
from qalign_kernels.tiled import _blocks

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def tensors(device):
    """output [2, 2, 21, 40], query, ref_key [2, 2, 37, 40] and ref_value."""
    return [random_features(2, 2, n, 40, seed=i, device=device) for i, n in enumerate((21, 21, 37, 37))]


def formula(output, query, ref_key, ref_value, bias=None, scale=None):
    """The plain pipeline: the ideal output by SDPA, a row without keys is zero, L1."""
    rows = (query.shape[0], -1, -1, -1)
    with torch.no_grad():
        ideal = sdpa(
            query,
            ref_key.expand(rows),
            ref_value.expand(rows),
            attn_mask=None if bias is None else bias.to(query.dtype),
            scale=scale,
        )
        if bias is not None:
            ideal = ideal.masked_fill((bias == float("-inf")).all(-1, keepdim=True), 0)
    accumulate = torch.promote_types(output.dtype, torch.float32)
    return l1_loss(output.to(accumulate), ideal.to(accumulate))


def signs(loss, output):
    """sign(output - ideal), from the gradient."""
    return torch.autograd.grad(loss, output)[0] * output.numel()


@pytest.mark.parametrize("head_dim", [40, 64, 128, 160])
def test_loss_is_the_mean_distance_to_the_ideal(precision, head_dim, device):
    backend, dtype = precision
    tensors = [
        random_features(2, 2, n, head_dim, seed=i, dtype=dtype, device=device)
        for i, n in enumerate((19, 19, 35, 35))
    ]
    loss = distillation_loss(*tensors, backend=backend)
    assert loss.dtype == torch.float32 and loss.shape == ()
    # the ideal is of the inputs' precision, and so is the distance to it
    assert judge_formula(
        loss.to(dtype), lambda *x: formula(*x).to(x[0].dtype), *tensors, reduction=head_dim
    ).passed


def test_gradient_is_the_sign(backend, tensors):
    output = tensors[0].requires_grad_()
    ideal = sdpa(*(x.double() for x in tensors[1:]))
    (gradient,) = torch.autograd.grad(3 * distillation_loss(*tensors, backend=backend), output)
    difference = output.detach().double() - ideal
    assert difference.abs().min() > 1e-6  # no sign hangs on rounding
    assert gradient.dtype == output.dtype
    torch.testing.assert_close(gradient, (3 * difference.sign() / output.numel()).float(), rtol=1e-6, atol=0)


def test_gradient_reaches_the_output_only(backend, tensors):
    output, *others = (x.requires_grad_() for x in tensors)
    loss = distillation_loss(output, *others, backend=backend)
    gradients = torch.autograd.grad(loss, [output, *others], allow_unused=True)
    assert gradients[0] is not None and gradients[1:] == (None, None, None)


def test_queries_learn_through_the_output(tensors):
    # as in the method: the ideal uses the queries of the output, and only the output has a gradient
    def gradients(loss, precision):
        query, key, value = (x.to(precision).detach().requires_grad_() for x in (tensors[0], *tensors[:2]))
        ref = [x.to(precision) for x in tensors[2:]]
        return torch.autograd.grad(
            loss(attention(query, Segment(key, value), backend="reference"), query, *ref), (query, key, value)
        )

    truth, plain = (gradients(formula, precision) for precision in (torch.float64, torch.float32))
    for ours, yardstick, true in zip(
        gradients(lambda *x: distillation_loss(*x, backend="tiled"), torch.float32), plain, truth
    ):
        assert judge(ours, yardstick, true, reduction=40).passed


def test_one_reference_serves_the_batch(backend, tensors):
    output, query, key, value = tensors
    loss = distillation_loss(output, query, key[:1], value[:1], backend=backend)
    assert judge_formula(loss, formula, output, query, key[:1], value[:1], reduction=40).passed
    assert loss == distillation_loss(
        output, query, *(x[:1].repeat(2, 1, 1, 1) for x in (key, value)), backend=backend
    )


def test_several_images_are_their_concatenation(backend, tensors):
    output, query, key, value = tensors
    parts = [slice(0, 9), slice(9, 10), slice(10, 37)]
    keys, values = ([x[:, :, part] for part in parts] for x in (key, value))
    assert judge_formula(
        distillation_loss(output, query, keys, values, backend=backend), formula, *tensors, reduction=40
    ).passed


def test_scale(backend, tensors):
    loss = distillation_loss(*tensors, scale=-0.31, backend=backend)
    assert judge_formula(loss, lambda *x: formula(*x, scale=-0.31), *tensors, reduction=40).passed


def label_sets(device):
    """For 21 queries and 37 keys: query 0 has no label, query 1 is background, label 8 is in no key."""
    query_labels, ref_labels = (1 << random_integers(0, 3, 2, n, seed=n, device=device) for n in (21, 37))
    query_labels[:, 0], query_labels[:, 1], query_labels[:, 2] = 0, -1, 8
    return query_labels, ref_labels


def test_labels_mask_the_ideal_by_query_rows(backend, tensors):
    query_labels, ref_labels = label_sets(tensors[0].device)
    bias = ((query_labels.unsqueeze(-1) & ref_labels.unsqueeze(-2)) != 0).double().log().unsqueeze(1)
    loss = distillation_loss(*tensors, query_labels=query_labels, ref_labels=ref_labels, backend=backend)
    assert judge_formula(loss, lambda *x: formula(*x, bias=bias), *tensors, reduction=40).passed


def test_labels_of_one_image_of_two(backend, tensors):
    output, query, key, value = tensors
    query_labels, ref_labels = label_sets(output.device)
    bias = ((query_labels.unsqueeze(-1) & ref_labels[:1].unsqueeze(-2)) != 0).double().log().unsqueeze(1)
    bias[..., 30:] = 0
    keys, values = ([x[:, :, :30], x[:, :, 30:]] for x in (key, value))
    loss = distillation_loss(
        output,
        query,
        keys,
        values,
        query_labels=query_labels,
        ref_labels=[ref_labels[:1, :30], None],
        backend=backend,
    )
    assert judge_formula(loss, lambda *x: formula(*x, bias=bias), *tensors, reduction=40).passed


def test_label_without_keys_gives_ideal_zero(backend, tensors):
    output, query, key, value = tensors
    query_labels, ref_labels = label_sets(output.device)
    output = output.clone()
    output[0, :, 2], output[1, :, 2] = 0, 1
    output.requires_grad_()
    loss = distillation_loss(
        output, query, key, value, query_labels=query_labels, ref_labels=ref_labels, backend=backend
    )
    direction = signs(loss, output)
    assert loss.isfinite() and direction.isfinite().all()
    assert (direction[0, :, 2] == 0).all()
    torch.testing.assert_close(direction[1, :, 2], torch.ones_like(direction[1, :, 2]))


@pytest.mark.slow
def test_gradient_is_zero_where_the_output_is_ideal(precision, device):
    backend, dtype = precision
    query, key, value = (
        random_features(2, 2, n, 40, seed=n, dtype=dtype, device=device) for n in (70, 90, 91)
    )
    value = value[:, :, 1:]
    output = attention(query, Segment(key, value), backend=backend)
    assert distillation_loss(output, query, key, value, backend=backend) == 0
    output[:, :, 3] += 1
    expected = torch.zeros_like(output)
    expected[:, :, 3] = 1
    loss = distillation_loss(output.requires_grad_(), query, key, value, backend=backend)
    gradient = torch.autograd.grad(loss, output)[0]
    assert torch.equal(gradient, (expected.float() / output.numel()).to(dtype))


def test_values_of_another_width_and_any_strides(backend, device):
    query, key = (
        random_features(2, n, 2, 48, seed=n, device=device).transpose(1, 2)[..., 5:45] for n in (21, 37)
    )
    output, value = (random_features(2, n, 2, 64, seed=n, device=device).transpose(1, 2) for n in (21, 37))
    loss = distillation_loss(output.requires_grad_(), query, key, value, backend=backend)
    assert judge_formula(loss, formula, output, query, key, value, reduction=40).passed
    dense = output.detach().contiguous().requires_grad_()
    assert torch.equal(
        signs(loss, output), signs(distillation_loss(dense, query, key, value, backend=backend), dense)
    )


def test_nan_gives_nan(backend, tensors):
    tensors[1][1, 0, 3, 7] = float("nan")
    assert distillation_loss(*tensors, backend=backend).isnan()


def test_repeats_are_equal_in_every_bit(backend, tensors):
    assert distillation_loss(*tensors, backend=backend) == distillation_loss(*tensors, backend=backend)


@pytest.mark.parametrize("block_bytes", [1, 20_000])
def test_rows_in_tiles_of_any_size(block_bytes, tensors, monkeypatch):
    query_labels, ref_labels = label_sets("cpu")
    tensors = [x.cpu() for x in tensors]
    tensors[0].requires_grad_()
    for labels in ({}, {"query_labels": query_labels, "ref_labels": ref_labels}):
        whole = distillation_loss(*tensors, **labels, backend="tiled")
        with monkeypatch.context() as patch:
            patch.setattr(_blocks, "CPU_BLOCK_BYTES", block_bytes)
            tiled = distillation_loss(*tensors, **labels, backend="tiled")
            assert torch.equal(signs(tiled, tensors[0]), signs(whole, tensors[0]))
        torch.testing.assert_close(tiled, whole, rtol=1e-6, atol=0)


def test_gradcheck(backend):
    if backend == "triton":
        pytest.skip("no float64")
    output, *others = (
        random_features(1, 2, n, 8, seed=i, dtype=torch.float64) for i, n in enumerate((3, 3, 5, 5))
    )
    assert gradcheck(lambda x: distillation_loss(x, *others, backend=backend), output.requires_grad_())


def test_only_the_reference_has_a_second_derivative(backend, tensors):
    output = tensors[0].requires_grad_()
    loss = distillation_loss(*tensors, backend=backend)
    (gradient,) = torch.autograd.grad(loss.square(), output, create_graph=True)
    if backend == "reference":
        slope = torch.autograd.grad(loss, output, retain_graph=True)[0]  # of loss²: 2 Σ_i slope_i · slope
        torch.testing.assert_close(torch.autograd.grad(gradient.sum(), output)[0], 2 * slope.sum() * slope)
        return
    with pytest.raises(RuntimeError, match="distillation_loss: expected one derivative"):
        gradient.sum().backward()


def test_signs_are_what_is_saved(tensors):
    output = tensors[0].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        distillation_loss(*tensors, backend="tiled")
    assert [(x.dtype, x.shape) for x in saved] == [(torch.int8, output.shape)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    output, query, key, value = (random_features(2, 2, n, 8, seed=n, dtype=dtype) for n in (7, 7, 9, 9))
    labels = [1 << random_integers(0, 3, 2, n, seed=n) for n in (7, 9)]
    absent = torch.empty(0, dtype=torch.int32)
    op = torch.ops.qalign_kernels.distillation_loss.default
    for learned in (False, True):
        more = [labels[1], absent], labels[0], 0.3, learned, "auto"
        assert set(
            opcheck(
                op, (output.requires_grad_(learned), query, [key, key[:1]], [value, value[:1]], *more)
            ).values()
        ) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(2, 2, 20, 40)}, "output: expected tokens=21"),
        ({"ref_key": torch.zeros(3, 2, 37, 40)}, "ref_key: expected batch=2, that of query, or 1"),
        ({"ref_value": torch.zeros(2, 2, 36, 40)}, "ref_value: expected tokens=37"),
        ({"ref_value": torch.zeros(2, 2, 37, 32)}, "ref_value: expected head_dim=40"),
        (
            {"ref_key": [torch.zeros(2, 2, 37, 40)] * 2},
            "ref_value: expected a sequence of 2, one for each ref_key, got float32",
        ),
        ({"ref_key": []}, "ref_key: expected a tensor"),
        (
            {"ref_labels": torch.zeros(2, 37, dtype=torch.int32)},
            "query_labels: expected int32 bit sets .*, because ref_labels is given, got None",
        ),
        ({"query_labels": torch.zeros(2, 21)}, "query_labels: expected int32"),
        ({"output": torch.zeros(2, 2, 21, 40).half()}, "output: expected the dtype of query, float32"),
        ({"scale": float("nan")}, "scale: expected a finite number"),
        ({"backend": "fast"}, "backend: expected one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"output": (21, 40), "query": (21, 40), "ref_key": (37, 40), "ref_value": (37, 40)}
    arguments = {name: torch.zeros(2, 2, *size) for name, size in arguments.items()} | change
    with pytest.raises((TypeError, ValueError), match=message):
        distillation_loss(**arguments)
