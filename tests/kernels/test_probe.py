"""label_mass and mean_attention_map: where attention goes."""

import pytest
import torch
from torch.nn.functional import one_hot

from qalign_kernels import Segment, attention, label_mass, mean_attention_map
from qalign_kernels.testing import judge, judge_formula, random_features, random_integers

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def pair(device):
    """query [2, 2, 23, 40] and key [2, 2, 41, 40]."""
    return [random_features(2, 2, n, 40, seed=n, device=device) for n in (23, 41)]


def wide(*tensors):
    """At least float32, in which probabilities are defined."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def attention_map(query, key):
    query, key = wide(query, key)
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128, 160])
def test_mass_is_attention_to_an_indicator(precision, head_dim, device):
    backend, dtype = precision
    query, key = (random_features(1, 2, n, head_dim, seed=n, dtype=dtype, device=device) for n in (19, 35))
    labels = random_integers(0, 5, 1, 35, seed=0, device=device)
    mass = label_mass(query, key, labels, 5, backend=backend)
    assert mass.dtype == torch.float32 and mass.shape == (1, 2, 19, 5)

    def formula(query, key):
        probabilities = attention_map(query, key)
        return probabilities @ one_hot(labels.long(), 5).unsqueeze(1).to(probabilities.dtype)

    assert judge_formula(mass, formula, query, key, reduction=head_dim).passed


@pytest.mark.parametrize("num_labels", [1, 3, 17, 128])
def test_masses_sum_to_one(backend, num_labels, pair):
    labels = random_integers(0, num_labels, 2, 41, seed=1, device=pair[0].device)
    mass = label_mass(*pair, labels, num_labels, backend=backend)
    ones = torch.ones_like(mass[..., 0])
    assert bool((mass >= 0).all()) and judge(mass.sum(-1), ones, ones.double(), 41).passed


def test_mass_with_counts_is_mass_over_repeated_keys(backend, pair):
    counts = random_integers(0, 4, 2, 1, 41, seed=2, device=pair[0].device)
    labels = random_integers(0, 3, 1, 41, seed=3, device=pair[0].device)
    mass = label_mass(*pair, labels, 3, counts=counts, backend=backend)
    for row in range(2):
        times = counts[row, 0]

        def repeated(query, key, times=times, row=row):
            key, kept = (
                key[row : row + 1].repeat_interleave(times, dim=2),
                labels.repeat_interleave(times, dim=1),
            )
            return attention_map(query[row : row + 1], key) @ one_hot(kept.long(), 3).unsqueeze(1).to(
                query.dtype
            )

        assert judge_formula(mass[row : row + 1], repeated, *pair, reduction=41).passed


def test_counts_of_zero_give_no_mass(backend, pair):
    counts = torch.zeros(2, 2, 41, dtype=torch.int32, device=pair[0].device)
    mass = label_mass(
        *pair, torch.zeros(1, 41, dtype=torch.int32, device=pair[0].device), 2, counts=counts, backend=backend
    )
    assert torch.equal(mass, torch.zeros_like(mass))


def test_keys_out_of_range_belong_to_no_class(backend, pair):
    labels = random_integers(-2, 6, 2, 41, seed=4, device=pair[0].device)
    mass = label_mass(*pair, labels, 4, backend=backend)

    def formula(query, key):
        members = (labels.unsqueeze(-1) == torch.arange(4, device=labels.device)).unsqueeze(1).to(query.dtype)
        return attention_map(query, key) @ members

    assert judge_formula(mass, formula, *pair, reduction=41).passed


def test_mass_is_what_attention_computes_over_indicator_values(backend, pair):
    labels = random_integers(0, 32, 2, 41, seed=5, device=pair[0].device)
    indicator = one_hot(labels.long(), 32).unsqueeze(1).expand(-1, 2, -1, -1).float()
    over_values = attention(*pair[:1], Segment(pair[1], indicator), backend=backend)

    def formula(query, key):
        return attention_map(query, key) @ indicator.to(query.dtype)

    for result in (over_values, label_mass(*pair, labels, 32, backend=backend)):
        assert judge_formula(result, formula, *pair, reduction=41).passed


@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128, 160])
def test_mean_map_is_the_average_over_heads(precision, head_dim, device):
    backend, dtype = precision
    query, key = (random_features(1, 2, n, head_dim, seed=n, dtype=dtype, device=device) for n in (19, 35))
    result = mean_attention_map(query, key, backend=backend)
    assert result.dtype == torch.float32 and result.shape == (1, 19, 35)
    assert judge_formula(result, lambda *x: attention_map(*x).mean(1), query, key, reduction=head_dim).passed


@pytest.mark.parametrize("sizes", [(1, 1), (1, 70), (70, 1), (33, 65)])
def test_rows_of_the_mean_map_sum_to_one(backend, sizes, device):
    query, key = (random_features(2, 2, n, 40, seed=n, device=device) for n in sizes)
    sums = mean_attention_map(query, key, backend=backend).sum(-1)
    assert judge(sums, torch.ones_like(sums), torch.ones_like(sums).double(), sizes[1]).passed


def test_scale_is_the_scale_of_the_logits(backend, pair):
    query, key = pair
    result = mean_attention_map(query, key, scale=0.5, backend=backend)
    assert judge_formula(
        result, lambda q, k: (0.5 * q @ k.mT).softmax(-1).mean(1), query, key, reduction=41
    ).passed
    labels = random_integers(0, 3, 1, 41, seed=6, device=query.device)
    uniform = label_mass(query, key, labels, 3, scale=0.0, backend=backend)
    share = one_hot(labels.long(), 3).double().mean(1).view(1, 1, 1, 3).expand(2, 2, 23, 3)
    assert judge(uniform, share.float(), share, 41).passed


def test_strides_do_not_matter(backend, device):
    packed = random_features(2, 37, 2, 2, 48, seed=7, device=device)
    query, key = packed[..., 3:43].permute(2, 0, 3, 1, 4)
    labels = random_integers(0, 3, 2, 74, seed=8, device=device)[:, ::2]
    for keys in (key, key[:1].expand(2, -1, -1, -1)):
        members = one_hot(labels.long(), 3).unsqueeze(1)

        def formula(query, key, members=members):
            return attention_map(query, key) @ members.to(query.dtype)

        assert judge_formula(
            label_mass(query, keys, labels, 3, backend=backend), formula, query, keys, reduction=40
        ).passed
        average = mean_attention_map(query, keys, backend=backend)
        assert judge_formula(average, lambda *x: attention_map(*x).mean(1), query, keys, reduction=40).passed


def test_nan_gives_nan_and_stays_in_its_rows(backend, pair):
    query, key = (x.clone() for x in pair)
    query[0, 1, 4, 3] = float("nan")
    labels = random_integers(0, 3, 1, 41, seed=9, device=query.device)
    mass, average = (
        label_mass(query, key, labels, 3, backend=backend),
        mean_attention_map(query, key, backend=backend),
    )
    bad = torch.zeros(2, 2, 23, dtype=torch.bool, device=query.device)
    bad[0, 1, 4] = True
    assert torch.equal(mass.isnan().all(-1), bad) and torch.equal(mass.isnan().any(-1), bad)
    assert torch.equal(average.isnan().all(-1), bad.any(1)) and torch.equal(
        average.isnan().any(-1), bad.any(1)
    )


def test_repeats_are_equal_in_every_bit(backend, pair):
    labels = random_integers(0, 3, 1, 41, seed=10, device=pair[0].device)
    assert torch.equal(*(label_mass(*pair, labels, 3, backend=backend) for _ in range(2)))
    assert torch.equal(*(mean_attention_map(*pair, backend=backend) for _ in range(2)))


def mass_gradients(pair, labels, num_labels, counts, backend, dtype):
    """Of query and key, for masses weighted by random numbers."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in pair]
    mass = label_mass(*leaves, labels, num_labels, counts=counts, backend=backend)
    weight = random_features(*mass.shape, seed=13, device=mass.device).to(mass.dtype)
    return torch.autograd.grad((mass * weight).sum(), leaves)


@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128, 160])
@pytest.mark.parametrize(("num_labels", "counted"), [(4, False), (20, True)])
def test_gradient_of_mass_is_that_of_the_formula(precision, head_dim, num_labels, counted, device):
    backend, dtype = precision
    pair = [random_features(1, 1, n, head_dim, seed=n, dtype=dtype, device=device) for n in (19, 35)]
    labels = random_integers(-1, 5, 1, 35, seed=11, device=device)  # -1: of no class
    counts = random_integers(0, 3, 1, 1, 35, seed=12, device=device) if counted else None
    results = (
        mass_gradients(pair, labels, num_labels, counts, name, precise)
        for name, precise in ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
    )
    for actual, same, truth in zip(*results):
        assert actual.dtype == dtype and judge(actual, same, truth, 4 * head_dim).passed


def test_mass_of_a_keyless_label_has_no_gradient(backend, pair):
    query, key = (x.requires_grad_() for x in pair)
    labels = random_integers(0, 3, 2, 41, seed=11, device=query.device)
    mass = label_mass(query, key, labels, 5, backend=backend)
    for gradient in torch.autograd.grad(mass[..., 3:].sum(), (query, key)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_mass_without_keys_is_without_gradient(backend, pair):
    counts = torch.zeros(2, 1, 41, dtype=torch.int32, device=pair[0].device)
    labels = torch.zeros(1, 41, dtype=torch.int32, device=pair[0].device)
    for gradient in mass_gradients(pair, labels, 2, counts, backend, torch.float32):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_gradient_of_mass_is_attentions(backend, pair):
    """On Triton by the same kernels; the mass is what is saved beside the inputs."""
    if backend != "triton":
        pytest.skip("kernels")
    from qalign_kernels._triton import _launch

    names, labels = [], random_integers(0, 3, 1, 41, seed=11, device=pair[0].device)
    with _launch.watching(lambda kernel, *_: names.append(kernel.fn.__name__)):
        mass_gradients(pair, labels, 3, None, backend, torch.float32)
    gradients = [name for name in names if "gradient" in name]
    assert gradients == ["gradient_rows_kernel", "query_gradient_kernel", "key_gradient_kernel"]


def test_only_the_reference_differentiates_mass_twice(backend, pair):
    query, key = (x.requires_grad_() for x in pair)
    labels = random_integers(0, 3, 1, 41, seed=11, device=query.device)
    (gradient,) = torch.autograd.grad(
        label_mass(query, key, labels, 3, backend=backend).square().sum(), query, create_graph=True
    )
    if backend == "reference":
        assert torch.autograd.grad(gradient.square().sum(), query)[0].norm() > 0
        return
    with pytest.raises(RuntimeError, match="label_mass: expected one derivative, got a second"):
        gradient.sum().backward()


def test_mean_map_gradient_is_that_of_the_formula(pair):
    def gradients(dtype, backend):
        leaves = [x.detach().to(dtype).requires_grad_() for x in pair]
        return torch.autograd.grad(mean_attention_map(*leaves, backend=backend).cos().sum(), leaves)

    cases = (
        gradients(torch.float32, "tiled"),
        gradients(torch.float32, "reference"),
        gradients(torch.float64, "reference"),
    )
    for actual, same, truth in zip(*cases):
        assert judge(actual, same, truth, 41 * 40).passed
