"""Random calls of attention over segments."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import qalign_kernels as qk
from qalign_kernels import Segment
from tests.fuzz import formulas
from tests.fuzz.call import Call, rows_of, sees_hit
from tests.fuzz.draw import Draw
from tests.fuzz.formulas import Attention, rows, rows_gradient, shared_bits


@dataclass
class AttentionCall(Call):
    segments: list[dict[str, Any]] = field(default_factory=list)
    op: Callable[..., Any] = qk.attention

    def has_gradient(self, backend):
        return backend != "triton" or self.settings["contrast"] == 1.0

    def run(self, leaves, backend):
        parts = [
            Segment(leaves[f"key{i}"], leaves[f"value{i}"], **more) for i, more in enumerate(self.segments)
        ]
        found = self.op(leaves["query"], parts, **self.settings, backend=backend)
        return [found] if isinstance(found, Tensor) else [found.output, found.lse]

    @functools.cached_property
    def formula(self) -> Attention:
        query_labels = self.settings["query_labels"]
        batch, heads, queries, _ = self.leaves["query"].shape
        columns: dict[str, list[Any]] = {"key": [], "value": []}
        scales, shifts, counts, seen = [], [], [], []
        for i, more in enumerate(self.segments):
            tokens = self.leaves[f"key{i}"].shape[2]
            for name in columns:
                columns[name].append(rows(self.exact(f"{name}{i}"), more.get("batch_index")))
            scales.append(torch.full((tokens,), more["logit_scale"] * self.scale, dtype=torch.float64))
            shifts.append(torch.full((tokens,), more["logit_shift"], dtype=torch.float64))
            given = more.get("counts")
            each = torch.ones(1, 1, tokens) if given is None else given
            counts.append(each.expand(batch, heads, -1).unsqueeze(2).double())
            bits = shared_bits(query_labels, more.get("labels"))
            seen.append(bits.expand(batch, heads, queries, tokens))
        return Attention(
            self.exact("query"),
            *(formulas.side_by_side(columns[name], 2) for name in columns),
            torch.cat(scales),
            torch.cat(counts, -1),
            torch.cat(seen, -1),
            self.dtype,
            torch.cat(shifts),
            self.settings["contrast"],
            torch.cat(counts, -1).sum(-1, keepdim=True),
        )

    def truth(self, results, backend):
        return list(self.formula.output())[: len(results)]

    def gradients(self, grads, backend):
        found = self.formula.gradients(*grads)
        result = {"query": found.query}
        begin = 0
        for i, more in enumerate(self.segments):
            batch, _, tokens, _ = self.leaves[f"key{i}"].shape
            part = slice(begin, begin := begin + tokens)
            for name, whole in (("key", found.key), ("value", found.value)):
                result[f"{name}{i}"] = rows_gradient(whole[:, :, part], more.get("batch_index"), batch)
        return result

    def reached(self, hits, results, backend):
        joined = {"query": hits["query"]}
        for name in ("key", "value"):
            parts = [
                hits[f"{name}{i}"][rows_of(more, hits[f"{name}{i}"])] for i, more in enumerate(self.segments)
            ]
            joined[name] = torch.cat(parts, 2)
        output = sees_hit(joined, "query", "key", "value", self.formula.seen)
        lse = sees_hit(joined, "query", "key", None, self.formula.seen).squeeze(-1)
        return [output, lse][: len(results)]


def draw_attention(draw: Draw, op: Callable[..., Any] = qk.attention) -> Call:
    s = draw.sizes
    leaves = {"query": draw.features(s.batch, s.query_tokens, s.head_dim)}
    segments: list[dict[str, Any]] = []
    labelled = draw.flag()
    others: dict[str, Tensor | None] = {}
    for i in range(draw.one(1, 1, 2, 3)):
        tokens = s.key_tokens if i == 0 else draw.one(1, 5, 40)
        index = draw.batch_index()
        leaves[f"key{i}"] = draw.features(s.ref_batch if index is not None else s.batch, tokens, s.head_dim)
        leaves[f"value{i}"] = draw.features(leaves[f"key{i}"].shape[0], tokens, s.value_dim)
        more = {
            "batch_index": index,
            "counts": draw.counts(tokens) if draw.flag() else None,
            "labels": draw.labels(tokens) if labelled and draw.flag() else None,
            "logit_scale": draw.one(1.0, 1.3, -0.5),
            "logit_shift": draw.one(0.0, 0.7, -2.0),
        }
        segments.append(more)
        others |= {f"{name}{i}": x for name, x in more.items() if isinstance(x, Tensor)}
    settings = {"scale": draw.scale(), "contrast": draw.contrast()}
    settings["query_labels"] = draw.labels(s.query_tokens) if labelled else None
    tensors = others | {"query_labels": settings["query_labels"]}
    return AttentionCall(s.dtype, leaves, tensors, settings, tuple(leaves), segments=segments, op=op)
