"""Calls of the joint argmax that no op makes: fewer keys, a batch index, counts, NaN.

The stage "right" judges them. On Hopper its own kernel serves them, elsewhere the general one.
"""

from typing import Any

import torch
from torch import Tensor

import qalign_kernels as qk
from qalign_kernels import _backends
from qalign_kernels.bench.checks import check_match
from qalign_kernels.bench.measure import Inputs

from ...tune.trials import Call

FEWER = 77  # the reference has so many tokens fewer
NAN_TOKEN = 5


def _fewer_keys(x: Inputs) -> Inputs:
    return x._replace(ref_query=x.ref_query[:, :, :-FEWER])


def _turned(x: Inputs) -> Tensor:
    """Make a batch index that is not the identity where the batch has two rows."""
    return torch.arange(x.query.shape[0], device=x.query.device, dtype=torch.int32).flip(0)


def _ragged(x: Inputs, backend: str) -> Any:
    return qk.similarity_argmax(x.query, _fewer_keys(x).ref_query, similarity="dot", backend=backend)


def _check_ragged(x: Inputs, match: Any, backend: str) -> bool:
    return check_match(_fewer_keys(x), match, "dot", True)


def _indexed(x: Inputs, backend: str) -> Any:
    return qk.similarity_argmax(x.query, x.ref_query, batch_index=_turned(x), backend=backend)


def _check_indexed(x: Inputs, match: Any, backend: str) -> bool:
    return check_match(x._replace(ref_query=x.ref_query[_turned(x).long()]), match, "cosine", True)


def _counted(x: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    module: Any = _backends.implementation(backend, "similarity")
    return module.counted_argmax(x.query, _fewer_keys(x).ref_query, "dot", True)


def _check_counted(x: Inputs, result: tuple[Tensor, Tensor], backend: str) -> bool:
    match, counts = result
    index = (~match & 0xFFFFFFFF).int()  # the lower half as `_tile.pack_match` packs it
    wanted, score = _ragged(x, backend)
    again = torch.zeros_like(counts).scatter_add_(2, index.long(), torch.ones_like(index))
    return (
        torch.equal(index, wanted)
        and torch.equal(counts, again)
        and _check_ragged(x, (index, score), backend)
    )


def _not_a_number(x: Inputs, backend: str) -> Any:
    query = x.query.clone()
    query[:, :, NAN_TOKEN, 0] = float("nan")
    return qk.similarity_argmax(query, x.ref_query, backend=backend)


def _check_not_a_number(x: Inputs, match: Any, backend: str) -> bool:
    clean = qk.similarity_argmax(x.query, x.ref_query, backend=backend)
    others = torch.arange(x.query.shape[2], device=x.query.device) != NAN_TOKEN
    return (
        bool(match.score[:, :, NAN_TOKEN].isnan().all() and (match.index[:, :, NAN_TOKEN] == 0).all())
        and torch.equal(match.index[:, :, others], clean.index[:, :, others])
        and torch.equal(match.score[:, :, others], clean.score[:, :, others])
    )


JOINT_CALLS = {
    "joint dot, fewer keys": Call(_ragged, _check_ragged),
    "joint, batch index": Call(_indexed, _check_indexed),
    "joint, counted": Call(_counted, _check_counted),
    "joint, NaN": Call(_not_a_number, _check_not_a_number),
}
