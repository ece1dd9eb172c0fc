"""Every op under the transforms of torch.func: the values of the reference, or one error; never silence."""

import pytest
import torch
from torch import func
from torch.autograd import functional

import qalign_kernels as qk
from tests.kernels.calls import CALLS, inputs

FIRST = {name.split()[0]: name for name in reversed(CALLS)}.values()  # one call of each op
NAMES = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]
ALL = (0, 1, 2, 3)


class Case:
    """A call of an op as a function of its leaves, and three items for vmap."""

    def __init__(self, name, backend):
        x = inputs(tokens=5)
        self.leaves = tuple(x.leaves())
        self.items = tuple(torch.stack([leaf, leaf.flip(2), 0.7 * leaf]) for leaf in self.leaves)
        self.run = lambda *leaves: CALLS[name](x.of(list(leaves)), backend)

    def loss(self, *leaves):
        return weighted(self.run(*leaves))

    def few(self, *leaves):
        return self.run(*leaves).flatten()[:3]

    def losses(self, *items):
        return weighted(torch.vmap(self.run)(*items))


def weighted(output):
    return (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum()


def recorded(function, leaves):
    """The output and the gradients, by autograd around whatever `function` does."""
    learned = [leaf.clone().requires_grad_() for leaf in leaves]
    output = function(*learned)
    grads = torch.autograd.grad(weighted(output), learned, allow_unused=True, materialize_grads=True)
    return output.detach(), *grads


def batched(case):
    learned = [leaf.clone().requires_grad_() for leaf in case.leaves]
    output = case.run(*learned)
    weights = torch.stack([torch.ones_like(output), torch.linspace(-1, 1, output.numel()).view_as(output)])
    grads = torch.autograd.grad(output, learned, weights, is_grads_batched=True, allow_unused=True)
    return [torch.zeros(2, *x.shape) if grad is None else grad for grad, x in zip(grads, learned)]


RIGHT = {
    "vmap": lambda case: torch.vmap(case.run)(*case.items),
    "vmap of queries, another axis": lambda case: torch.vmap(case.run, (1, None, None, None), out_dims=-1)(
        case.items[0].movedim(0, 1), *case.leaves[1:]
    ),
    "vmap of vmap": lambda case: torch.vmap(torch.vmap(case.run, (0, None, None, None)), (None, 0, 0, 0))(
        *case.items
    ),
    "vmap inside autograd": lambda case: recorded(torch.vmap(case.run), case.items),
    "grad": lambda case: func.grad(case.loss, ALL)(*case.leaves),
    "vjp": lambda case: func.vjp(case.run, *case.leaves)[1](torch.ones_like(case.run(*case.leaves))),
    "grad by item": lambda case: torch.vmap(func.grad(case.loss, ALL))(*case.items),
    "grad of vmap": lambda case: func.grad(case.losses, ALL)(*case.items),
    "jacrev": lambda case: func.jacrev(case.few, ALL)(*case.leaves),
    "jacobian": lambda case: functional.jacobian(case.few, case.leaves),
    "jacobian, vectorised": lambda case: functional.jacobian(case.few, case.leaves, vectorize=True),
    "batched gradients": batched,
}
SECOND = {
    "grad of grad": lambda case: func.grad(
        lambda *leaves: sum(grad.square().sum() for grad in func.grad(case.loss, ALL)(*leaves)), ALL
    )(*case.leaves),
    "hvp": lambda case: functional.hvp(case.loss, case.leaves, case.leaves)[1],
}
FORWARD = {
    "jvp": lambda case: func.jvp(case.run, case.leaves, case.leaves)[1],
    "jvp of vmap": lambda case: func.jvp(torch.vmap(case.run), case.items, case.items)[1],
    "jvp by item": lambda case: torch.vmap(lambda *x: func.jvp(case.run, x, case.leaves)[1])(*case.items),
    "jvp of grad": lambda case: func.jvp(func.grad(case.loss, ALL), case.leaves, case.leaves)[1],
    "grad of jvp": lambda case: func.grad(lambda *leaves: func.jvp(case.loss, leaves, case.leaves)[1], ALL)(
        *case.leaves
    ),
}


def check(transform, name, error=None):
    """The tiled op gives what the reference gives; where `error` is given, it may raise that instead."""
    expected = transform(Case(name, "reference"))
    try:
        found = transform(Case(name, "tiled"))
    except RuntimeError as raised:
        assert error is not None and error in str(raised) and len(str(raised).splitlines()) == 1, raised
        return
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_transforms_give_the_reference_values(name):
    for transform in RIGHT.values():
        check(transform, name)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_right_or_raise(name):
    for transform in SECOND.values():
        check(transform, name, "expected one derivative, got a second one")


@pytest.mark.parametrize("name", NAMES)
def test_nested_tangents_are_right_or_raise(name):
    for transform in FORWARD.values():
        check(transform, name, "expected a tensor without a forward-mode tangent")


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_vmap_maps_labels_counts_and_rows(backend):
    """Integer tensors have items, too: each item reads its own."""
    x = inputs(tokens=5)

    def call(labels, counts, rows):
        segment = qk.Segment(x.key, x.value, labels=labels, counts=counts, batch_index=rows)
        return qk.attention(x.query, segment, query_labels=x.labels, backend=backend)

    items = [torch.stack([y, y.flip(-1)]) for y in (x.labels, x.counts, torch.arange(2, dtype=torch.int32))]
    expected = torch.stack([call(*item) for item in zip(*items)])
    assert torch.equal(torch.vmap(call)(*items), expected)
    assert not torch.equal(expected[0], expected[1])
