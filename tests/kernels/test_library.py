"""The registered ops under opcheck (schema, fake, gradient) and torch.compile (one graph)."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import qalign_kernels as qk
from qalign_kernels.attention import Guide, guided_attention
from qalign_kernels.qalign_attention import topk_attention
from qalign_kernels.testing import random_features, random_integers

OPS = torch.ops.qalign_kernels
NO_INTS = torch.empty(0, dtype=torch.int32)
LABELS = [1 << random_integers(0, 3, 2, n, seed=n) for n in (7, 9)]
ROWS = torch.tensor([1, 1], dtype=torch.int32)


def features(*tokens, head_dim=8, dtype=torch.float32, learned=False):
    return [
        random_features(2, 2, n, head_dim, seed=i, dtype=dtype).requires_grad_(learned)
        for i, n in enumerate(tokens)
    ]


def checked(op, *arguments):
    results = opcheck(op.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("joint", [True, False])
def test_opcheck_of_similarity(joint, dtype):
    query, reference = features(7, 9, dtype=dtype)
    checked(OPS.similarity_argmax, query, reference, "cosine", joint, None, None, None, True, "auto")
    checked(OPS.similarity_argmax, query, reference, "dot", joint, *LABELS, ROWS, False, "tiled")
    checked(OPS.similarity_topk, query, reference, 3, "cosine", joint, *LABELS, ROWS, "auto")


@pytest.mark.parametrize("groups", [1, 2])
def test_opcheck_of_rearrangement(groups):
    index = random_integers(-1, 9, 2, groups, 7, seed=0)
    checked(OPS.match_counts, index, 9, "auto")
    checked(OPS.take_rows, features(9, 1)[0], index, "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_probes(dtype):
    query, key = features(7, 9, dtype=dtype)
    checked(OPS.label_mass, query, key, random_integers(0, 4, 1, 9, seed=0), 4, 0.3, None, "auto")
    checked(
        OPS.label_mass,
        query,
        key,
        random_integers(0, 4, 2, 9, seed=0),
        4,
        0.3,
        random_integers(0, 3, 2, 1, 9, seed=1),
        "tiled",
    )
    checked(
        OPS.label_mass,
        *features(7, 9, dtype=dtype, learned=True),
        random_integers(0, 4, 1, 9, seed=0),
        4,
        0.3,
        None,
        "auto",
    )
    checked(OPS.mean_attention_map, query, key, 0.3, "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_label_mass_backward(dtype):
    query, key = features(7, 9, dtype=dtype)
    labels = random_integers(0, 4, 1, 9, seed=0)
    mass = OPS.label_mass(query, key, labels, 4, 0.3, None, "auto")
    checked(OPS.label_mass_backward, mass.sin(), mass, query, key, labels, 4, 0.3, None, [True, True], "auto")
    checked(
        OPS.label_mass_backward,
        mass.sin(),
        mass,
        query,
        key,
        labels,
        4,
        0.3,
        random_integers(0, 3, 2, 1, 9, seed=1),
        [False, True],
        "tiled",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_unit_features(dtype):
    checked(OPS.unit_features, *(x.transpose(1, 2) for x in features(7, 9, dtype=dtype)), "auto")


@pytest.mark.parametrize("batch_index", [None, ROWS])
def test_opcheck_of_topk_attention(batch_index):
    checked(
        OPS.topk_attention,
        *features(7, 9, 9),
        random_integers(-1, 9, 2, 1, 7, 3, seed=0),
        0.3,
        1.67,
        batch_index,
        "auto",
    )


def attention_arguments(guided, learned, dtype=torch.float32):
    """The arguments that the op and its gradient share, in the order of their schemas."""
    query, *keys, value, value2, guide_query, guide_key = features(
        7, 9, 5, 9, 5, 7, 9, dtype=dtype, learned=learned
    )
    counts = random_integers(0, 3, 2, 1, 9, seed=0)
    if guided:
        return (
            query,
            keys[:1],
            [value],
            [guide_query, guide_key],
            [counts],
            [LABELS[1]],
            [ROWS],
            LABELS[0],
            [1.0],
            [0.0],
            2.0,
            0.3,
            1.0,
        )
    absent = [NO_INTS, NO_INTS]
    return (
        query,
        keys,
        [value, value2],
        [],
        [counts, NO_INTS],
        absent,
        absent,
        None,
        [1.0, 1.3],
        [0.0, 0.2],
        0.0,
        0.3,
        1.67,
    )


@pytest.mark.parametrize("need_lse", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_opcheck_of_attention(guided, learned, need_lse):
    checked(OPS.attention, *attention_arguments(guided, learned), need_lse, learned, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_opcheck_of_attention_backward(guided, with_lse, dtype):
    arguments = attention_arguments(guided, False, dtype)
    (grad_output,) = features(7, dtype=dtype)
    grad_lse = (
        random_features(2, 2, 7, seed=5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        if with_lse
        else None
    )
    needs = [True] * (1 + len(arguments[1]) + len(arguments[2]) + len(arguments[3]))
    output, lse = OPS.attention(*arguments, True, False, "auto")
    checked(OPS.attention_backward, grad_output, grad_lse, output, lse, *arguments, needs, "auto")
    checked(
        OPS.attention_backward, grad_output, grad_lse, None, None, *arguments, [False, *needs[1:]], "tiled"
    )


CALLS = {
    "similarity_argmax": lambda q, r, k, v: (
        qk.similarity_argmax(q, r, query_labels=LABELS[0], reference_labels=LABELS[1]).score
    ),
    "similarity_topk": lambda q, r, k, v: (
        qk.similarity_topk(q, r, 3, heads="per_head", batch_index=ROWS).score
    ),
    "match_counts": lambda q, r, k, v: (
        qk.match_counts(qk.similarity_argmax(q, r).index, 9).float() * q.mean()
    ),
    "rearrange_kv": lambda q, r, k, v: qk.rearrange_kv(k, v, qk.similarity_argmax(q, r).index)[1],
    "attention": lambda q, r, k, v: qk.attention(
        q, [qk.Segment(k, v, logit_scale=1.2), qk.Segment(r, v)], contrast=1.67
    ),
    "attention_with_lse": lambda q, r, k, v: sum(
        x.sum() for x in qk.attention_with_lse(q, qk.Segment(k, v, labels=LABELS[1]), query_labels=LABELS[0])
    ),
    "guided_attention": lambda q, r, k, v: guided_attention(q, qk.Segment(k, v), Guide(q, r, 2.0)),
    "label_mass": lambda q, r, k, v: qk.label_mass(q, k, torch.arange(9, dtype=torch.int32)[None], 9),
    "distillation_loss": lambda q, r, k, v: qk.distillation_loss(q, q, [k, k[:1]], [v, v[:1]]),
    "mean_attention_map": lambda q, r, k, v: qk.mean_attention_map(q, k),
    "topk_attention": lambda q, r, k, v: topk_attention(q, k, v, qk.similarity_topk(q, r, 3).index),
    **{
        f"qalign_attention-{refinement}": lambda q, r, k, v, refinement=refinement: qk.qalign_attention(
            q, r, k, v, refinement=refinement, topk=3, own_key=q if refinement == "warped_values" else None
        )
        for refinement in ("rearranged", "guided", "topk", "warped_values", "warped_output", "soft", "none")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_compiles_to_one_graph_once(call, learned):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[call], fullgraph=True, backend=counter)
    for step in range(3):
        tensors = [x.detach().add(step).requires_grad_(learned) for x in features(7, 9, 9, 9)]
        expected, actual = CALLS[call](*tensors), compiled(*tensors)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        if learned:
            for ours, plain in zip(
                *(
                    torch.autograd.grad(x.sum(), tensors, allow_unused=True, retain_graph=True)
                    for x in (actual, expected)
                )
            ):
                torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
