"""Messages for bad input: argument, expected, got, in one line. Each message is written here in full."""

import math

import numpy
import pytest
import torch

from qalign_kernels import (
    Segment,
    attention,
    attention_with_lse,
    distillation_loss,
    label_mass,
    match_counts,
    mean_attention_map,
    qalign_attention,
    rearrange_kv,
    similarity_argmax,
    similarity_topk,
    use_backend,
)

Q = torch.zeros(2, 4, 5, 32)
K = torch.zeros(2, 4, 7, 32)
V = torch.zeros(2, 4, 7, 48)
INDEX = torch.zeros(2, 1, 5, dtype=torch.int32)
FLOATS = "float16, bfloat16, float32 or float64"


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def attend(
    query=Q, key=K, value=V, *, backend="tiled", query_labels=None, scale=None, contrast=1.0, **segment
):
    return attention(
        query,
        Segment(key, value, **segment),
        query_labels=query_labels,
        scale=scale,
        contrast=contrast,
        backend=backend,
    )


def align(query=Q, ref_query=K, ref_key=K, ref_value=V, **options):
    return qalign_attention(query, ref_query, ref_key, ref_value, **({"backend": "tiled"} | options))


CASES = [
    # rank, type, dtype, device, emptiness
    (
        lambda: similarity_argmax(Q[0], K),
        ValueError,
        "query: expected [B, H, N, D] with every size at least 1, got float32 [4, 5, 32]",
    ),
    (
        lambda: similarity_argmax(Q, [1, 2]),
        TypeError,
        "reference: expected a tensor [B, H, N, D], got list [1, 2]",
    ),
    (lambda: similarity_argmax(Q.int(), K), TypeError, f"query: expected {FLOATS}, got int32 [2, 4, 5, 32]"),
    (
        lambda: similarity_argmax(Q, K.half()),
        TypeError,
        "reference: expected the dtype of query, float32, got float16 [2, 4, 7, 32]",
    ),
    (
        lambda: similarity_argmax(Q, K.to("meta")),
        ValueError,
        "reference: expected the device of query, cpu, got meta",
    ),
    (
        lambda: similarity_argmax(Q[:, :, :0], K),
        ValueError,
        "query: expected [B, H, N, D] with every size at least 1, got float32 [2, 4, 0, 32]",
    ),
    (lambda: attend(None), TypeError, "query: expected a tensor [B, H, N, D], got None"),
    (
        lambda: attend(key=K[..., None]),
        ValueError,
        "key: expected [B, H, N, D] with every size at least 1, got float32 [2, 4, 7, 32, 1]",
    ),
    (
        lambda: attend(value=V.double()),
        TypeError,
        "value: expected the dtype of query, float32, got float64 [2, 4, 7, 48]",
    ),
    (lambda: attend(key=K.bool()), TypeError, f"key: expected {FLOATS}, got bool [2, 4, 7, 32]"),
    (
        lambda: attend(key=K.to("meta"), value=V),
        ValueError,
        "key: expected the device of query, cpu, got meta",
    ),
    (
        lambda: attend(key=K[:, :, :0], value=V[:, :, :0]),
        ValueError,
        "key: expected [B, H, N, D] with every size at least 1, got float32 [2, 4, 0, 32]",
    ),
    (
        lambda: align(ref_value=V.half()),
        TypeError,
        "ref_value: expected the dtype of query, float32, got float16 [2, 4, 7, 48]",
    ),
    (lambda: align(ref_key="K"), TypeError, "ref_key: expected a tensor [B, H, N, D], got str 'K'"),
    (
        lambda: label_mass(Q, K.half(), ints(2, 7), 3),
        TypeError,
        "key: expected the dtype of query, float32, got float16 [2, 4, 7, 32]",
    ),
    (
        lambda: mean_attention_map(Q, K.to("meta")),
        ValueError,
        "key: expected the device of query, cpu, got meta",
    ),
    (
        lambda: rearrange_kv(K, V.to("meta"), INDEX),
        ValueError,
        "value: expected the device of key, cpu, got meta",
    ),
    # sizes
    (
        lambda: similarity_argmax(Q, K[..., :16]),
        ValueError,
        "reference: expected head_dim=32, got float32 [2, 4, 7, 16]",
    ),
    (
        lambda: similarity_argmax(Q, K[:, :2]),
        ValueError,
        "reference: expected heads=4, got float32 [2, 2, 7, 32]",
    ),
    (
        lambda: similarity_argmax(Q, K[:1]),
        ValueError,
        "reference: expected batch=2, that of query, or a batch_index, got batch=1",
    ),
    (lambda: attend(key=K[..., :16]), ValueError, "key: expected head_dim=32, got float32 [2, 4, 7, 16]"),
    (lambda: attend(value=V[:, :, :6]), ValueError, "value: expected tokens=7, got float32 [2, 4, 6, 48]"),
    (lambda: attend(value=V[:1]), ValueError, "value: expected batch=2, got float32 [1, 4, 7, 48]"),
    (
        lambda: attend(key=K[:1], value=V[:1]),
        ValueError,
        "key: expected batch=2, that of query, or a batch_index, got batch=1",
    ),
    (
        lambda: align(ref_query=K[:, :, :6]),
        ValueError,
        "ref_key: expected tokens=6, got float32 [2, 4, 7, 32]",
    ),
    (
        lambda: align(ref_query=K[:1], ref_key=K[:1], ref_value=V[:1]),
        ValueError,
        "ref_query: expected batch=2, that of query, or a batch_index, got batch=1",
    ),
    (lambda: mean_attention_map(Q, K[:1]), ValueError, "key: expected batch=2, got float32 [1, 4, 7, 32]"),
    (
        lambda: rearrange_kv(K, V[:, :3], INDEX),
        ValueError,
        "value: expected heads=4, got float32 [2, 3, 7, 48]",
    ),
    # integers: labels, counts, rows, maps
    (
        lambda: attend(labels=ints(2, 7)),
        ValueError,
        "query_labels: expected int32 bit sets [B=2 or 1, N_q=5], because labels is given, got None",
    ),
    (
        lambda: attend(labels=ints(2, 6), query_labels=ints(1, 5)),
        ValueError,
        "labels: expected int32 [B=2 or 1, N_k=7], got int32 [2, 6]",
    ),
    (
        lambda: attend(labels=ints(2, 7).long(), query_labels=ints(1, 5)),
        TypeError,
        "labels: expected int32 [B=2 or 1, N_k=7], got int64 [2, 7]",
    ),
    (
        lambda: attend(labels=ints(2, 7), query_labels=ints(5)),
        ValueError,
        "query_labels: expected int32 [B=2 or 1, N_q=5], got int32 [5]",
    ),
    (
        lambda: attend(labels=ints(2, 7).to("meta"), query_labels=ints(1, 5)),
        ValueError,
        "labels: expected device cpu, got meta",
    ),
    (
        lambda: attend(counts=ints(2, 3, 7)),
        ValueError,
        "counts: expected int32 [B=2, 1 or H=4, N_k=7], got int32 [2, 3, 7]",
    ),
    (
        lambda: attend(counts=ints(2, 1, 7).float()),
        TypeError,
        "counts: expected int32 [B=2, 1 or H=4, N_k=7], got float32 [2, 1, 7]",
    ),
    (
        lambda: attend(counts=[1] * 7),
        TypeError,
        "counts: expected int32 [B=2, 1 or H=4, N_k=7], got list [1, 1, 1, 1, 1, 1, ...]",
    ),
    (lambda: attend(batch_index=ints(3)), ValueError, "batch_index: expected int32 [B=2], got int32 [3]"),
    (
        lambda: attend(batch_index=ints(2).long()),
        TypeError,
        "batch_index: expected int32 [B=2], got int64 [2]",
    ),
    (
        lambda: similarity_argmax(Q, K, query_labels=ints(2, 5)),
        ValueError,
        "reference_labels: expected int32 bit sets, because query_labels is given, got None",
    ),
    (
        lambda: similarity_argmax(Q, K, reference_labels=ints(2, 7)),
        ValueError,
        "query_labels: expected int32 bit sets, because reference_labels is given, got None",
    ),
    (
        lambda: similarity_argmax(Q, K, query_labels=ints(2, 5), reference_labels=ints(2, 5)),
        ValueError,
        "reference_labels: expected int32 [B=2 or 1, N_k=7], got int32 [2, 5]",
    ),
    (
        lambda: align(query_labels=ints(2, 5)),
        ValueError,
        "ref_labels: expected int32 bit sets, because query_labels is given, got None",
    ),
    (
        lambda: align(query_labels=ints(3, 5), ref_labels=ints(2, 7)),
        ValueError,
        "query_labels: expected int32 [B=2 or 1, N_q=5], got int32 [3, 5]",
    ),
    (
        lambda: match_counts(INDEX.long(), 7),
        TypeError,
        "index: expected int32 [B=2, G=1, N_q=5], got int64 [2, 1, 5]",
    ),
    (
        lambda: match_counts(INDEX[0], 7),
        ValueError,
        "index: expected int32 [B, 1 or H, N_q] with every size at least 1, got int32 [1, 5]",
    ),
    (lambda: match_counts([0], 7), TypeError, "index: expected int32 [B, 1 or H, N_q], got list [0]"),
    (lambda: match_counts(INDEX, 0), ValueError, "num_tokens: expected an integer of at least 1, got int 0"),
    (
        lambda: rearrange_kv(K, V, ints(2, 3, 5)),
        ValueError,
        "index: expected int32 [B=2, 1 or H=4, N_q], got int32 [2, 3, 5]",
    ),
    (
        lambda: rearrange_kv(K, V, INDEX.long()),
        TypeError,
        "index: expected int32 [B=2, 1 or H=4, N_q], got int64 [2, 1, 5]",
    ),
    (lambda: rearrange_kv(K, V, None), TypeError, "index: expected int32 [B=2, 1 or H=4, N_q], got None"),
    (
        lambda: rearrange_kv(K, V, ints(2, 1, 0)),
        ValueError,
        "index: expected int32 [B=2, 1 or H=4, N_q], got int32 [2, 1, 0]",
    ),
    (
        lambda: label_mass(Q, K, ints(2, 5), 3),
        ValueError,
        "key_labels: expected int32 [B=2 or 1, N_k=7], got int32 [2, 5]",
    ),
    (
        lambda: label_mass(Q, K, ints(2, 7).long(), 3),
        TypeError,
        "key_labels: expected int32 [B=2 or 1, N_k=7], got int64 [2, 7]",
    ),
    (
        lambda: label_mass(Q, K, ints(2, 7), 0),
        ValueError,
        "num_labels: expected an integer of at least 1, got int 0",
    ),
    (
        lambda: label_mass(Q, K, ints(2, 7), 3, counts=ints(1, 1, 7)),
        ValueError,
        "counts: expected int32 [B=2, 1 or H=4, N_k=7], got int32 [1, 1, 7]",
    ),
    # settings
    (
        lambda: similarity_argmax(Q, K, similarity="cos"),
        ValueError,
        "similarity: expected one of cosine, dot, got 'cos'",
    ),
    (
        lambda: similarity_argmax(Q, K, heads="all"),
        ValueError,
        "heads: expected one of joint, per_head, got 'all'",
    ),
    (lambda: similarity_topk(Q, K, 8), ValueError, "k: expected an integer from 1 to N_k=7, got int 8"),
    (lambda: similarity_topk(Q, K, 0), ValueError, "k: expected an integer from 1 to N_k=7, got int 0"),
    (lambda: similarity_topk(Q, K, 2.0), ValueError, "k: expected an integer from 1 to N_k=7, got float 2.0"),
    (
        lambda: align(refinement="hard"),
        ValueError,
        "refinement: expected one of rearranged, guided, topk, warped_values, warped_output, soft, none, "
        "got 'hard'",
    ),
    (lambda: align(similarity=None), ValueError, "similarity: expected one of cosine, dot, got None"),
    (lambda: align(heads=8), ValueError, "heads: expected one of joint, per_head, got 8"),
    (
        lambda: align(refinement="topk", topk=8),
        ValueError,
        "topk: expected an integer from 1 to N_k=7, got int 8",
    ),
    (
        lambda: align(refinement="warped_values"),
        ValueError,
        "own_key: expected [B, H, N_q, D] for refinement='warped_values', got None",
    ),
    (lambda: align(match_query=K), ValueError, "match_query: expected tokens=5, got float32 [2, 4, 7, 32]"),
    (
        lambda: align(own_key=Q),
        ValueError,
        "own_key: expected None for refinement='rearranged', got float32 [2, 4, 5, 32]",
    ),
    (
        lambda: align(refinement="warped_values", own_key=K),
        ValueError,
        "own_key: expected tokens=5, got float32 [2, 4, 7, 32]",
    ),
    (
        lambda: align(refinement="guided", strength=math.inf),
        ValueError,
        "strength: expected a finite number, got inf",
    ),
    (
        lambda: align(refinement="topk", contrast=-1),
        ValueError,
        "contrast: expected a finite number above 0, got -1",
    ),
    (
        lambda: align(refinement="none", scale=math.nan),
        ValueError,
        "scale: expected a finite number, got nan",
    ),
    (lambda: attend(contrast=0.0), ValueError, "contrast: expected a finite number above 0, got 0.0"),
    (lambda: attend(contrast="1"), TypeError, "contrast: expected a number, got str '1'"),
    (lambda: attend(scale=math.nan), ValueError, "scale: expected a finite number, got nan"),
    (lambda: attend(scale=True), TypeError, "scale: expected a number, got bool True"),
    (lambda: attend(logit_shift=-math.inf), ValueError, "logit_shift: expected a finite number, got -inf"),
    (lambda: attend(logit_scale=None), TypeError, "logit_scale: expected a number, got None"),
    (
        lambda: label_mass(Q, K, ints(2, 7), 3, scale=math.inf),
        ValueError,
        "scale: expected a finite number, got inf",
    ),
    (lambda: mean_attention_map(Q, K, scale="big"), TypeError, "scale: expected a number, got str 'big'"),
    # segments
    (lambda: attention(Q, []), ValueError, "segments: expected at least one Segment, got none"),
    (
        lambda: attention(Q, K),
        TypeError,
        "segments: expected a Segment or a sequence of them, got float32 [2, 4, 7, 32]",
    ),
    (lambda: attention(Q, None), TypeError, "segments: expected a Segment or a sequence of them, got None"),
    (
        lambda: attention(Q, [K, V]),
        TypeError,
        "segments: expected Segment objects, got float32 [2, 4, 7, 32]",
    ),
    (lambda: attention_with_lse(Q, [Segment(K, V), (K, V)]), TypeError, None),
    (
        lambda: attention(Q, [Segment(K, V), Segment(K, K)]),
        ValueError,
        "segments[1].value: expected head_dim=48, got float32 [2, 4, 7, 32]",
    ),
    (
        lambda: attention(Q, [Segment(K, V), Segment(K, V, labels=ints(1, 7))]),
        ValueError,
        "query_labels: expected int32 bit sets [B=2 or 1, N_q=5], because segments[1].labels is given, "
        "got None",
    ),
    (
        lambda: attention(Q, [Segment(K[:, :2], V), Segment(K, V)]),
        ValueError,
        "segments[0].key: expected heads=4, got float32 [2, 2, 7, 32]",
    ),
    # backends
    (
        lambda: attend(backend="cuda"),
        ValueError,
        "backend: expected one of auto, triton, tiled, reference, got 'cuda'",
    ),
    (
        lambda: match_counts(INDEX, 7, backend="numpy"),
        ValueError,
        "backend: expected one of auto, triton, tiled, reference, got 'numpy'",
    ),
    (
        lambda: use_backend("fast").__enter__(),
        ValueError,
        "backend: expected one of auto, triton, tiled, reference, got 'fast'",
    ),
]

RANGE = "a number between -2^127 and 2^127"
LAYOUT = "a dense tensor, of layout torch.strided"
NESTED = torch.nested.nested_tensor([Q[0], Q[1]])
OTHER_CASES = [
    # numbers that no kernel can hold, and values of other libraries
    (lambda: attend(scale=10**400), ValueError, f"scale: expected {RANGE}, got int of 1329 bits"),
    (lambda: attend(scale=1e39), ValueError, f"scale: expected {RANGE}, got float 1e+39"),
    (lambda: align(strength=-(10**39)), ValueError, f"strength: expected {RANGE}, got int of 130 bits"),
    (lambda: attend(logit_shift=3e38), ValueError, f"logit_shift: expected {RANGE}, got float 3e+38"),
    (
        lambda: attend(scale=1e20, logit_scale=1e20),
        ValueError,
        "logit_scale: expected a number that times scale=1e+20 is at most 2^127, got float 1e+20",
    ),
    (lambda: attend(scale=numpy.float32("nan")), ValueError, None),
    (
        lambda: mean_attention_map(Q, K, scale=torch.ones(2)),
        TypeError,
        "scale: expected a number, got float32 [2]",
    ),
    (lambda: attend(contrast=torch.ones((), requires_grad=True)), TypeError, None),
    (lambda: attend(contrast=numpy.bool_(True)), TypeError, None),
    (
        lambda: match_counts(INDEX, 2**63),
        ValueError,
        "num_tokens: expected an integer of at most 2147483647, got int 9223372036854775808",
    ),
    (lambda: label_mass(Q, K, ints(2, 7), 2**70), ValueError, None),
    (
        lambda: similarity_topk(Q, K, 2**63),
        ValueError,
        "k: expected an integer from 1 to N_k=7, got int 9223372036854775808",
    ),
    (lambda: align(refinement="topk", topk=10**5000), ValueError, None),
    (lambda: similarity_topk(Q, K, numpy.float64(2)), ValueError, None),
    (lambda: similarity_topk(Q, K, torch.ones((), dtype=torch.bool)), ValueError, None),
    (
        lambda: similarity_argmax(Q, K, similarity=numpy.array(["cosine"])),
        ValueError,
        "similarity: expected one of cosine, dot, got ndarray array(['cosine'], dtype='<U6')",
    ),
    (lambda: align(heads=numpy.array(["joint", "joint"])), ValueError, None),
    (lambda: align(refinement=torch.zeros(2)), ValueError, None),
    (lambda: attend(backend=["tiled"]), ValueError, None),
    (lambda: similarity_argmax(Q, K, exact=2), TypeError, "exact: expected True or False, got int 2"),
    # sparse and nested tensors
    (
        lambda: attend(key=K.to_sparse()),
        TypeError,
        f"key: expected {LAYOUT}, got float32 [2, 4, 7, 32] of layout torch.sparse_coo",
    ),
    (lambda: attend(query=NESTED), TypeError, f"query: expected {LAYOUT}, got float32 nested tensor"),
    (lambda: attend(counts=ints(2, 1, 7).to_sparse()), TypeError, None),
    (lambda: attend(query_labels=ints(2, 5).to_sparse_csr()), TypeError, None),
    (lambda: align(batch_index=ints(2).to_sparse()), TypeError, None),
    (lambda: match_counts(INDEX.to_sparse(), 7), TypeError, None),
    (lambda: rearrange_kv(K, V, torch.nested.nested_tensor([INDEX[0], INDEX[1]])), TypeError, None),
    (lambda: label_mass(Q, K, ints(2, 7).to_sparse(), 3), TypeError, None),
    (lambda: distillation_loss(Q, Q, NESTED, K), TypeError, None),
]


@pytest.mark.parametrize("convert", [numpy.float32, numpy.float64, torch.tensor, int, numpy.int64])
def test_numbers_of_other_libraries_serve(convert):
    """As SDPA takes them: numpy scalars and tensors without axes."""
    query, key, value = torch.randn(3, 1, 1, 6, 16).unbind(0)

    def outputs(two, backend):
        segment = Segment(key, value, logit_scale=two, logit_shift=two)
        yield attention(query, segment, scale=two, contrast=two, backend=backend)
        options = {"refinement": "guided", "strength": two, "scale": two}
        yield qalign_attention(query, key, key, value, backend=backend, **options)
        yield mean_attention_map(query, key, scale=two, backend=backend)
        if convert not in (numpy.float32, numpy.float64):
            two = torch.tensor(2) if convert is torch.tensor else two
            yield similarity_topk(query, key, two, backend=backend).score
            yield qalign_attention(query, key, key, value, refinement="topk", topk=two, backend=backend)
            yield match_counts(ints(1, 1, 3), two, backend=backend)

    for backend in ("reference", "tiled"):
        for found, expected in zip(outputs(convert(2.0), backend), outputs(2, backend)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_message(call, error, message):
    assert_one_line(call, error, message)


@pytest.mark.parametrize(("call", "error", "message"), OTHER_CASES)
def test_message_for_values_of_other_libraries(call, error, message):
    assert_one_line(call, error, message)


def assert_one_line(call, error, message):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and ": expected " in text and ", got " in text
    if message is not None:
        assert text == message


def test_long_values_are_shortened_to_one_line():
    with pytest.raises(TypeError) as caught:
        attend(key=torch.zeros(50, 50).numpy())
    text = str(caught.value)
    assert (
        text.startswith("key: expected a tensor [B, H, N, D], got ndarray ")
        and "\n" not in text
        and len(text) < 120
    )


def refused(call):
    """What an explicit "triton" says where it cannot run."""
    with pytest.raises(RuntimeError) as caught:
        call()
    text = str(caught.value)
    assert (
        "\n" not in text
        and text.startswith("backend: expected a backend that can run ")
        and " here, got 'triton': " in text
    )
    return text.split("'triton': ")[1]


@pytest.fixture
def triton_here(device):
    """Tensors on which Triton runs, on the GPU or interpreted."""
    from qalign_kernels._backends import triton_refusal

    tensors = [x.to(device) for x in (Q, K, V)]
    if refusal := triton_refusal(tensors[0], ()):
        pytest.skip(refusal)
    return tensors


def test_triton_refuses_float64(triton_here):
    query, key, value = (x.double() for x in triton_here)
    calls = [
        lambda: attention(query, Segment(key, value), backend="triton"),
        lambda: similarity_argmax(query, key, backend="triton"),
        lambda: rearrange_kv(key, value, INDEX.to(key.device), backend="triton"),
        lambda: mean_attention_map(query, key, backend="triton"),
        lambda: qalign_attention(query, key, key, value, backend="triton"),
    ]
    for call in calls:
        assert refused(call) == "dtype float64 is not supported, only float16, bfloat16 and float32"


def test_triton_refuses_gradients(triton_here):
    query, key, value = (x.clone().requires_grad_() for x in triton_here)
    calls = [
        lambda: attention(query, Segment(key, value), contrast=1.67, backend="triton"),
        lambda: rearrange_kv(key, value, INDEX.to(key.device), backend="triton"),
        lambda: mean_attention_map(query, key, backend="triton"),
        lambda: qalign_attention(query, key, key, value, refinement="guided", backend="triton"),
        lambda: qalign_attention(query, key, key, value, refinement="topk", topk=2, backend="triton"),
    ]
    for call in calls:
        assert refused(call) == "the Triton kernels have no gradient of this call; the tiled backend has"
    with torch.no_grad():
        assert attention(query, Segment(key, value), backend="triton").shape == (2, 4, 5, 48)


def test_triton_refuses_what_no_kernel_serves(triton_here):
    query, key, value = triton_here
    odd = refused(lambda: attention(query[..., :24], Segment(key[..., :24], value), backend="triton"))
    assert odd == "head_dim (24, 48) is not supported, only (16, 32, 40, 48, 64, 80, 96, 128, 160)"
    many = torch.zeros(2, 4, 70, 32, device=key.device)
    assert (
        refused(lambda: similarity_topk(query, many, 65, backend="triton"))
        == "k=65 is not supported, only k up to 64"
    )
    labels = ints(1, 7).to(key.device)
    assert (
        refused(lambda: label_mass(query, key, labels, 129, backend="triton"))
        == "num_labels=129 is not supported, only up to 128"
    )


def test_triton_refuses_the_cpu_without_its_interpreter(monkeypatch):
    from qalign_kernels import _backends

    monkeypatch.setattr(_backends, "interpreted", lambda: False)
    monkeypatch.setattr(_backends, "triton_problem", lambda: None)
    reason = refused(lambda: attend(backend="triton"))
    assert (
        reason == "Triton does not run on device cpu (TRITON_INTERPRET=1 interprets the kernels on the CPU)"
    )
    monkeypatch.setattr(_backends, "triton_problem", lambda: "triton does not import (ImportError: broken)")
    assert refused(lambda: attend(backend="triton")) == "triton does not import (ImportError: broken)"


def test_a_bad_environment_default_is_named(monkeypatch):
    from qalign_kernels import _backends

    monkeypatch.setattr(_backends, "_default", "gpu")
    with pytest.raises(ValueError) as caught:
        similarity_argmax(Q, K)
    assert str(caught.value) == "QALIGN_BACKEND: expected one of auto, triton, tiled, reference, got 'gpu'"


def test_auto_takes_tiled_for_unserved_head_dims():
    query, key = Q[..., :24], K[..., :24]
    assert attention(query, Segment(key, key)).shape == query.shape
