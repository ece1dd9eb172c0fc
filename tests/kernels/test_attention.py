"""attention: what must hold whatever computes it, then numbers against float64."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from qalign_kernels import Segment, attention, attention_with_lse, match_counts, rearrange_kv
from qalign_kernels.testing import judge, judge_exact, judge_formula, random_features, random_integers

pytestmark = pytest.mark.usefixtures("poisoned")
HEAD_DIMS = (32, 40, 64, 80, 96, 128, 160)


@pytest.fixture
def qkv(device):
    """query [2, 2, 21, 40], key and value [2, 2, 37, 40]."""
    shapes = (2, 2, 21, 40), (2, 2, 37, 40), (2, 2, 37, 40)
    return [random_features(*shape, seed=i, device=device) for i, shape in enumerate(shapes)]


def masked(query, key, value, bias):
    """SDPA with a bias added to the logits; a row without keys gives zeros."""
    output = sdpa(query, key, value, attn_mask=bias.to(query.dtype))
    return output.masked_fill((bias == float("-inf")).all(-1, keepdim=True), 0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_neutral_settings_are_sdpa(precision, head_dim, device):
    backend, dtype = precision
    query, key, value = (
        random_features(1, 2, n, head_dim, seed=n, dtype=dtype, device=device) for n in (19, 35, 35)
    )
    output = attention(query, Segment(key, value), backend=backend)
    assert output.dtype == dtype and output.is_contiguous()
    assert judge_formula(output, sdpa, query, key, value, reduction=head_dim).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiled_on_cpu_is_sdpa_bit_by_bit(dtype):
    query, key, value = (random_features(2, 3, n, 40, seed=n, dtype=dtype) for n in (50, 77, 78))
    assert torch.equal(
        attention(query, Segment(key, value[:, :, 1:]), backend="tiled"), sdpa(query, key, value[:, :, 1:])
    )


def test_order_of_keys_does_not_matter(backend, qkv):
    query, key, value = qkv
    order = torch.randperm(key.shape[2], generator=torch.Generator().manual_seed(5)).to(key.device)
    output = attention(query, Segment(key[:, :, order], value[:, :, order]), backend=backend)
    assert judge_formula(output, sdpa, query, key, value, reduction=40).passed


def test_segments_are_their_concatenation(backend, qkv):
    query, key, value = qkv
    segments = [Segment(key[:, :, a:b], value[:, :, a:b]) for a, b in ((0, 5), (5, 6), (6, 37))]
    assert judge_formula(
        attention(query, segments, backend=backend), sdpa, query, key, value, reduction=40
    ).passed


def test_segments_carry_their_own_scale_and_shift(backend, qkv):
    query, key, value = qkv
    segments = [
        Segment(key[:, :, :11], value[:, :, :11], logit_scale=1.3, logit_shift=-0.5),
        Segment(key[:, :, 11:], value[:, :, 11:], logit_scale=0.7, logit_shift=0.9),
    ]
    output, lse = attention_with_lse(query, segments, scale=0.2, backend=backend)
    first = torch.arange(37, device=query.device) < 11

    def logits(query, key, value):
        return 0.2 * query @ key.mT * torch.where(first, 1.3, 0.7) + torch.where(first, -0.5, 0.9)

    assert judge_formula(output, lambda *qkv: logits(*qkv).softmax(-1) @ qkv[2], *qkv, reduction=40).passed
    assert judge_formula(lse, lambda *qkv: logits(*qkv).logsumexp(-1), *qkv, reduction=40).passed


def test_segments_merge_by_their_log_sum_exp(backend, qkv):
    query, key, value = qkv
    parts = [
        attention_with_lse(query, Segment(key[:, :, part], value[:, :, part]), backend=backend)
        for part in (slice(9), slice(9, None))
    ]
    weights = torch.stack([part.lse for part in parts]).softmax(0).unsqueeze(-1)
    merged = sum(weight * part.output for weight, part in zip(weights, parts))
    assert judge_formula(merged, sdpa, query, key, value, reduction=40).passed


def test_a_single_key_is_its_value(backend, device):
    query, key, value = (random_features(2, 2, n, 40, seed=n, device=device) for n in (5, 1, 1))
    output, lse = attention_with_lse(query, Segment(key, value), backend=backend)
    assert judge_formula(output, lambda v: v.expand(-1, -1, 5, -1), value, reduction=40).passed
    assert judge_formula(lse, lambda q, k: (q @ k.mT).squeeze(-1) / 40**0.5, query, key, reduction=40).passed


def test_single_query_single_key(backend, device):
    one = random_features(1, 1, 1, 32, seed=0, device=device)
    assert judge_formula(
        attention(one, Segment(one, one), backend=backend), lambda x: x, one, reduction=32
    ).passed


def test_contrast_one_is_attention(backend, qkv):
    query, key, value = qkv
    segment = Segment(key, value)
    assert torch.equal(
        attention(query, segment, contrast=1.0, backend=backend), attention(query, segment, backend=backend)
    )
    assert judge_formula(
        attention(query, segment, contrast=1.0 + 1e-9, backend=backend), sdpa, query, key, value, reduction=40
    ).passed


def test_contrast_clips_each_weight(backend, qkv):
    def contrasted(query, key, value):
        weights = (query @ key.mT / 40**0.5).softmax(-1)
        return (1.67 * (weights - 1 / 37) + 1 / 37).clamp(0, 1) @ value

    query, key, value = qkv
    assert judge_formula(
        attention(query, Segment(key, value), contrast=1.67, backend=backend), contrasted, *qkv, reduction=40
    ).passed


@pytest.mark.parametrize(("attended", "row_sum"), [(1, 1.0), (8, 1.669), (64, 1.660), (512, 1.586)])
def test_contrasted_weights_are_not_renormalised(backend, attended, row_sum, device):
    # mass spread evenly on a few of 4096 keys; with values of one the output is the sum of the weights
    key = torch.zeros(1, 1, 4096, 32, device=device)
    key[:, :, :attended, 0] = 60
    query = torch.zeros(1, 1, 1, 32, device=device)
    query[..., 0] = 1
    output = attention(query, Segment(key, torch.ones_like(key)), scale=1.0, contrast=1.67, backend=backend)
    assert output.sub(row_sum).abs().max().item() < 5e-4
    exact = min(attended * 1.67 / attended - 0.67 * attended / 4096, 1.0 if attended == 1 else math.inf)
    assert judge(output, torch.full_like(output, exact), torch.full_like(output.double(), exact), 4096).passed


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_counts_repeat_keys(backend, contrast, qkv):
    query, key, value = qkv
    counts = random_integers(0, 4, 2, 1, 37, seed=3, device=query.device)
    output = attention(query, Segment(key, value, counts=counts), contrast=contrast, backend=backend)
    for row in range(2):
        times = counts[row, 0]

        def repeated(query, key, value, times=times, row=row):
            key, value = (x[row : row + 1].repeat_interleave(times, dim=2) for x in (key, value))
            return attention(
                query[row : row + 1], Segment(key, value), contrast=contrast, backend="reference"
            )

        assert judge_formula(output[row : row + 1], repeated, *qkv, reduction=40).passed


def test_counts_of_each_head(backend, qkv):
    query, key, value = qkv
    counts = random_integers(0, 3, 2, 2, 37, seed=4, device=query.device)
    output = attention(query, Segment(key, value, counts=counts), backend=backend)
    for head in range(2):
        one_head = [x[:, head : head + 1] for x in qkv]

        def alone(query, key, value, head=head):
            return attention(
                query, Segment(key, value, counts=counts[:, head : head + 1]), backend="reference"
            )

        assert judge_formula(output[:, head : head + 1], alone, *one_head, reduction=40).passed


def test_heads_may_count_different_numbers_of_keys(backend, qkv):
    query, key, value = qkv
    counts = random_integers(1, 3, 2, 2, 37, seed=4, device=query.device)
    counts[:, 1, ::3] = 0
    output = attention(query, Segment(key, value, counts=counts), backend=backend)
    assert judge_formula(
        output,
        lambda *x: attention(x[0], Segment(*x[1:], counts=counts), backend="reference"),
        *qkv,
        reduction=40,
    ).passed


def test_counts_of_a_map_are_the_rearranged_keys(backend, qkv):
    query, key, value = qkv
    index = random_integers(-1, 37, 2, 2, 29, seed=6, device=query.device)
    output = attention(
        query, Segment(key, value, counts=match_counts(index, 37, backend=backend)), backend=backend
    )

    def gathered(query, key, value):
        present = (index >= 0).float().log().unsqueeze(2)
        return masked(query, *rearrange_kv(key, value, index, backend="reference"), present)

    assert judge_formula(output, gathered, *qkv, reduction=40).passed


def test_a_shift_of_log_r_is_r_copies(backend, qkv):
    # StyleAligned's identity: a shared segment shifted by ln r weighs as if its keys came r times
    query, key, value = qkv
    other_key, other_value = (random_features(2, 2, 13, 40, seed=s, device=query.device) for s in (7, 8))
    output = attention(
        query,
        [Segment(key, value), Segment(other_key, other_value, logit_shift=math.log(3))],
        backend=backend,
    )

    def copied(query, key, value, other_key, other_value):
        return sdpa(query, torch.cat([key, *[other_key] * 3], 2), torch.cat([value, *[other_value] * 3], 2))

    assert judge_formula(output, copied, *qkv, other_key, other_value, reduction=40).passed


def test_labels_are_a_mask(backend, qkv):
    query, key, value = qkv
    query_labels = random_integers(1, 8, 2, 21, seed=9, device=query.device)
    query_labels[:, 0], query_labels[:, 1] = 0, -1  # one that sees nothing, one that is background
    key_labels = random_integers(1, 8, 1, 37, seed=10, device=query.device)
    key_labels[:, 3] = -(2**31)  # the sign bit is a label like any other
    output, lse = attention_with_lse(
        query, Segment(key, value, labels=key_labels), query_labels=query_labels, backend=backend
    )
    bias = ((query_labels.unsqueeze(-1) & key_labels.unsqueeze(-2)) != 0).double().log().unsqueeze(1)
    assert judge_formula(output, lambda *x: masked(*x, bias), *qkv, reduction=40).passed
    assert judge_formula(
        lse, lambda q, k, v: (q @ k.mT / 40**0.5 + bias.to(q.dtype)).logsumexp(-1), *qkv, reduction=40
    ).passed
    assert judge_exact(output[:, :, 0], torch.zeros_like(output[:, :, 0])).passed


@pytest.mark.parametrize("contrast", [1.0, 1.67])
@pytest.mark.parametrize("how", ["counts", "labels"])
def test_no_key_to_see_gives_zeros(backend, how, contrast, qkv):
    query, key, value = qkv
    if how == "counts":
        segment, query_labels = (
            Segment(key, value, counts=torch.zeros(2, 1, 37, dtype=torch.int32, device=query.device)),
            None,
        )
    else:
        segment = Segment(key, value, labels=torch.full((1, 37), 2, dtype=torch.int32, device=query.device))
        query_labels = torch.full((1, 21), 1, dtype=torch.int32, device=query.device)
    output, lse = attention_with_lse(
        query, segment, contrast=contrast, query_labels=query_labels, backend=backend
    )
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))


def test_segment_without_visible_keys_is_absent(backend, qkv):
    query, key, value = qkv
    nothing = Segment(
        key,
        100 * value,
        counts=torch.zeros(2, 1, 37, dtype=torch.int32, device=query.device),
        logit_shift=50.0,
    )
    for segments in ([nothing, Segment(key, value)], [Segment(key, value), nothing]):
        assert judge_formula(attention(query, segments, backend=backend), sdpa, *qkv, reduction=40).passed


def test_batch_index_is_explicit_indexing(backend, qkv):
    query, key, value = qkv
    rows = torch.tensor([1, 1], dtype=torch.int32, device=query.device)
    counts = random_integers(0, 3, 2, 1, 37, seed=11, device=query.device)
    indexed = attention(query, Segment(key, value, counts=counts, batch_index=rows), backend=backend)

    def explicit(query, key, value):
        return attention(query, Segment(key[[1, 1]], value[[1, 1]], counts=counts), backend="reference")

    assert judge_formula(indexed, explicit, *qkv, reduction=40).passed
    one_row = torch.zeros(2, dtype=torch.int32, device=query.device)
    shared = attention(query, Segment(key[:1], value[:1], batch_index=one_row), backend=backend)
    assert judge_formula(
        shared,
        lambda q, k, v: sdpa(q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)),
        *qkv,
        reduction=40,
    ).passed


@pytest.mark.parametrize("value_dim", [32, 64, 160])
def test_values_of_another_width(backend, value_dim, qkv):
    query, key, _ = qkv
    value = random_features(2, 2, 37, value_dim, seed=12, device=query.device)
    assert judge_formula(
        attention(query, Segment(key, value), backend=backend), sdpa, query, key, value, reduction=40
    ).passed


def test_strides_do_not_matter(backend, device):
    packed = random_features(
        2, 37, 3, 2, 48, seed=13, device=device
    )  # [B, N, qkv, H, D + 8], as a fused projection leaves it
    query, key, value = packed[..., 5:45].permute(2, 0, 3, 1, 4)
    output = attention(query, Segment(key, value), backend=backend)
    assert output.is_contiguous()
    assert judge_formula(output, sdpa, query, key, value, reduction=40).passed
    shared = key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1)
    assert judge_formula(
        attention(query, Segment(*shared), backend=backend), sdpa, query, *shared, reduction=40
    ).passed


def test_offsets_past_two_gigabytes(backend, far):
    near = far.contiguous()
    assert judge_formula(
        attention(far, Segment(far, far), backend=backend), sdpa, near, near, near, reduction=32
    ).passed


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_nan_gives_nan_and_stays_in_its_rows(backend, contrast, qkv):
    query, key, value = (x.clone() for x in qkv)
    query[0, 0, 3, 7] = float("nan")
    output, lse = attention_with_lse(query, Segment(key, value), contrast=contrast, backend=backend)
    bad = torch.zeros(2, 2, 21, dtype=torch.bool, device=query.device)
    bad[0, 0, 3] = True
    assert torch.equal(output.isnan().all(-1), bad) and torch.equal(output.isnan().any(-1), bad)
    assert torch.equal(lse.isnan(), bad)
    key[1, 0, 5, 0] = float("nan")
    bad[1, 0] = True
    assert torch.equal(
        attention(query, Segment(key, value), contrast=contrast, backend=backend).isnan().all(-1), bad
    )


def test_large_logits_do_not_overflow(backend, device):
    query, key, value = (random_features(1, 1, 20, 32, seed=s, device=device) for s in range(3))
    output = attention(100 * query, Segment(key, value), scale=10.0, backend=backend)
    best = (query @ key.mT).argmax(-1)
    assert judge(output, value[0, 0, best], value[0, 0, best].double(), 32).passed


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_repeats_are_equal_in_every_bit(backend, contrast, qkv):
    query, key, value = qkv
    segments = [
        Segment(key, value, counts=random_integers(0, 3, 2, 1, 37, seed=1, device=query.device)),
        Segment(key, value, logit_shift=0.3),
    ]
    first, second = (
        attention_with_lse(query, segments, contrast=contrast, backend=backend) for _ in range(2)
    )
    assert torch.equal(first.output, second.output) and torch.equal(first.lse, second.lse)


def test_with_lse_returns_the_same_output(backend, qkv):
    query, key, value = qkv
    segment = Segment(key, value, counts=random_integers(0, 3, 2, 1, 37, seed=1, device=query.device))
    pair = attention_with_lse(query, segment, backend=backend)

    def plain(query, key, value):
        return attention(query, Segment(key, value, counts=segment.counts), backend="reference")

    assert judge_formula(pair.output, plain, *qkv, reduction=40).passed
    assert pair.lse.dtype == torch.float32 and pair.lse.shape == (2, 2, 21)


def test_half_precision_returns_a_float32_lse(precision, device):
    backend, dtype = precision
    query, key, value = (random_features(1, 2, 18, 64, seed=s, dtype=dtype, device=device) for s in range(3))
    output, lse = attention_with_lse(query, Segment(key, value), backend=backend)
    assert output.dtype == dtype and lse.dtype == torch.float32

    def formula(query, key):
        accumulate = torch.promote_types(query.dtype, torch.float32)
        return (query.to(accumulate) @ key.to(accumulate).mT / 8).logsumexp(-1)

    assert judge_formula(lse, formula, query, key, reduction=64).passed


@pytest.mark.parametrize("contrast", [1.0, 1.67])
@pytest.mark.parametrize("with_lse", [False, True])
def test_gradients_are_those_of_the_formula(contrast, with_lse, qkv):
    query, key, value = (x.double() for x in qkv)
    other = random_features(1, 2, 13, 40, seed=15).double().to(query.device)
    rows = torch.zeros(2, dtype=torch.int32, device=query.device)
    options = {
        "counts": random_integers(0, 3, 2, 1, 37, seed=16, device=query.device),
        "labels": random_integers(1, 8, 1, 37, seed=17, device=query.device),
    }
    query_labels = random_integers(0, 8, 2, 21, seed=18, device=query.device)

    def gradients(backend):
        leaves = [x.detach().clone().requires_grad_() for x in (query, key, value, other)]
        segments = [
            Segment(*leaves[1:3], **options),
            Segment(leaves[3], 2 * leaves[3], logit_scale=0.8, logit_shift=0.4, batch_index=rows),
        ]
        output, lse = attention_with_lse(
            leaves[0], segments, contrast=contrast, query_labels=query_labels, backend=backend
        )
        loss = (output * torch.sin(torch.arange(output.numel(), device=output.device)).view_as(output)).sum()
        return torch.autograd.grad(loss + (lse.cos().sum() if with_lse else 0), leaves)

    for actual, truth in zip(gradients("tiled"), gradients("reference")):
        assert judge(actual, truth, truth, 40).passed


@pytest.mark.parametrize("tokens", [1, 6, 15, 16, 17])
def test_nan_query_with_few_keys_gives_nan(backend, tokens, device):
    """torch's fused kernel on the CPU gives zeros below a vector register of keys."""
    query, key, value = (random_features(1, 2, n, 16, seed=n, device=device) for n in (5, tokens, tokens))
    query[0, 0, 3, 2] = float("nan")
    expected = torch.zeros(1, 2, 5, dtype=torch.bool, device=device)
    expected[0, 0, 3] = True
    labels = torch.ones((1, tokens), dtype=torch.int32, device=device)
    counts = torch.ones((1, 1, tokens), dtype=torch.int32, device=device)
    for more in ({}, {"labels": labels}, {"counts": counts}):
        found = attention_with_lse(
            query,
            Segment(key, value, **more),
            query_labels=labels[:, :1].expand(1, 5).contiguous(),
            backend=backend,
        )
        assert torch.equal(found.output.isnan().all(-1), expected)
        assert torch.equal(found.lse.isnan(), expected)


def written_out(query, keys, values, bias):
    """Attention over all keys at once, with a bias [.., N_q or 1, N_k]. A row without keys gives zeros."""
    empty = (bias == float("-inf")).all(-1, keepdim=True)
    logits = query @ torch.cat(keys, 2).mT / query.shape[3] ** 0.5 + bias.to(query.dtype)
    return logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ torch.cat(values, 2)


@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128, 160])
@pytest.mark.parametrize("case", ["plain", "labels", "counts", "segments"])
def test_gradients_against_float64(backend, case, head_dim, device):
    """Query 0 and key 0 have labels of their own, and key 0 the count 0: their gradients are 0, not NaN."""
    tokens = (35,) if case != "segments" else (21, 14)
    query, *tensors = (
        random_features(1, 1, n, head_dim, seed=i, device=device)
        for i, n in enumerate((19, *tokens, *tokens))
    )
    query_labels, key_labels = (1 << random_integers(0, 3, 1, n, seed=n, device=device) for n in (19, 35))
    query_labels[:, 0], key_labels[:, 0] = 8, 16
    counts = random_integers(0, 4, 1, 1, tokens[0], seed=5, device=device)
    counts[..., 0] = 0
    options: list[dict] = [{} for _ in tokens]
    bias = torch.zeros(1, 1, 1, 35, dtype=torch.float64, device=device)
    if case in ("labels", "segments"):
        for part, labels in zip(options, key_labels.split(tokens, 1)):
            part["labels"] = labels
        bias = bias + ((query_labels.unsqueeze(-1) & key_labels.unsqueeze(-2)) != 0).double().log().unsqueeze(
            1
        )
    if case in ("counts", "segments"):
        options[0]["counts"] = counts
        bias = bias + torch.cat(
            [counts.double(), torch.ones(1, 1, 35 - tokens[0], dtype=torch.float64, device=device)], 2
        ).log().unsqueeze(2)
    weight = random_features(1, 1, 19, head_dim, seed=9, device=device)

    def gradients(attend, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (query, *tensors)]
        output = attend(leaves[0], leaves[1 : 1 + len(tokens)], leaves[1 + len(tokens) :])
        return torch.autograd.grad((output * weight.to(dtype)).sum(), leaves)

    def ours(query, keys, values):
        segments = [Segment(*pair, **part) for *pair, part in zip(keys, values, options)]
        return attention(
            query, segments, query_labels=query_labels if "labels" in options[0] else None, backend=backend
        )

    yardstick, truth = (
        gradients(lambda *x: written_out(*x, bias), dtype) for dtype in (torch.float32, torch.float64)
    )
    actual = gradients(ours, torch.float32)
    for gradient, same, right in zip(actual, yardstick, truth):
        assert judge(gradient, same, right, 4 * head_dim).passed
    if case in ("labels", "segments"):
        assert (actual[0][:, :, 0] == 0).all()
    if case != "plain":
        assert all((x[:, :, 0] == 0).all() for x in (actual[1], actual[1 + len(tokens)]))


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_only_the_reference_has_a_second_derivative(backend, contrast, qkv):
    if backend == "triton" and contrast != 1.0:
        pytest.skip("no gradient at all")
    query, key, value = (x.requires_grad_() for x in qkv)
    output = attention(query, Segment(key, value), contrast=contrast, backend=backend)
    gradients = torch.autograd.grad(output.square().sum(), (query, key, value), create_graph=True)
    if backend == "reference":
        assert all(
            x.norm() > 0
            for x in torch.autograd.grad(sum(x.square().sum() for x in gradients), (query, key, value))
        )
        return
    for gradient in gradients:
        with pytest.raises(
            RuntimeError,
            match="attention: expected one derivative, got a second one: only backend='reference'",
        ):
            gradient.sum().backward(retain_graph=True)


def test_gradient_of_one_input_alone(qkv):
    query, key, value = qkv
    for wanted in range(3):
        leaves = [x.detach().clone().requires_grad_(i == wanted) for i, x in enumerate((query, key, value))]
        attention(leaves[0], Segment(*leaves[1:]), backend="tiled").square().sum().backward()
        copies = [x.detach().double().requires_grad_(i == wanted) for i, x in enumerate((query, key, value))]
        sdpa(*copies).square().sum().backward()
        truth = copies[wanted].grad
        assert judge(leaves[wanted].grad, truth.float(), truth, 37 * 40).passed
