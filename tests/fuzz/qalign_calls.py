"""Random calls of qalign_attention with each refinement."""

import functools
from typing import Any

import torch
from torch import Tensor

import qalign_kernels as qk
from tests.fuzz import formulas
from tests.fuzz.call import Call, Grads, sees_hit
from tests.fuzz.draw import Draw
from tests.fuzz.formulas import Attention, gather, gather_gradient, rows, rows_gradient, shared_bits
from tests.fuzz.rounding import Approx


class QAlignCall(Call):
    def has_gradient(self, backend):
        fast = self.settings["refinement"] in ("rearranged", "soft") and self.settings["contrast"] == 1.0
        return backend != "triton" or fast

    def run(self, leaves, backend):
        settings = {name: x for name, x in self.settings.items() if name not in self.others}
        optional = {name: leaves[name] for name in ("match_query", "own_key") if name in leaves}
        four = [leaves[name] for name in ("query", "ref_query", "ref_key", "ref_value")]
        return [qk.qalign_attention(*four, **optional, **settings, **self.others, backend=backend)]

    def match(self, backend: str) -> qk.Match:
        """The choice of the same backend, which the calls of similarity_argmax and similarity_topk judge."""
        s = self.settings
        settings = {
            "similarity": s["similarity"],
            "heads": s["heads"],
            "query_labels": self.others["query_labels"],
            "reference_labels": self.others["ref_labels"],
            "batch_index": self.others["batch_index"],
            "backend": backend,
        }
        query, reference = self.leaves[self.aligned], self.leaves["ref_query"]
        if s["refinement"] == "topk":
            return qk.similarity_topk(query, reference, s["topk"], **settings)
        return qk.similarity_argmax(query, reference, **settings)

    @property
    def aligned(self) -> str:
        return "match_query" if "match_query" in self.leaves else "query"

    def row(self, name: str) -> Approx:
        return rows(self.exact(name), self.others["batch_index"])

    def attention(self, key: Approx, value: Approx, **more: Any) -> Attention:
        every = torch.ones(1, dtype=torch.bool)
        given = {
            "query": self.exact("query"),
            "scale": self.scale,
            "counts": torch.ones(1),
            "seen": every,
            "dtype": self.dtype,
            "contrast": self.settings["contrast"],
        }
        return Attention(key=key, value=value, **(given | more))

    @property
    def bits(self) -> Tensor:
        return shared_bits(self.others["query_labels"], self.others["ref_labels"])

    @functools.cached_property
    def pair(self) -> tuple[Approx, Approx]:
        similarity = self.settings["similarity"]
        names = (self.exact(self.aligned), self.row("ref_query"))
        return tuple(formulas.features(x, similarity, self.dtype) for x in names)

    def _features_gradients(self, grads: tuple[Approx, Approx]) -> Grads:
        similarity = self.settings["similarity"]
        query, reference = (
            formulas.features_gradient(x, grad.rounded(self.dtype), similarity)
            for x, grad in zip((self.exact(self.aligned), self.row("ref_query")), grads)
        )
        return {self.aligned: query, "ref_query": reference}

    def refined(self, backend: str) -> Attention:
        """The last attention of the refinement: all but "none" and "warped_output", whose choice follows."""
        name, key, value = self.settings["refinement"], self.row("ref_key"), self.row("ref_value")
        tokens = key.value.shape[2]
        if name == "rearranged":
            counts = qk.match_counts(self.match(backend).index, tokens, backend="reference").unsqueeze(2)
            return self.attention(key, value, counts=counts, seen=self.bits)
        if name == "topk":
            index = self.match(backend).index
            chosen = (index.unsqueeze(-1) == torch.arange(tokens)).any(-2)
            total = torch.full((1, 1, 1, 1), self.settings["topk"], dtype=torch.float64)
            return self.attention(key, value, seen=chosen, total=total)
        if name == "warped_values":
            index = self.match(backend).index
            own = self.exact("own_key")
            return self.attention(own, gather(value, index), counts=(index >= 0).unsqueeze(2))
        if name == "warped_output":
            labels = self.others["ref_labels"]
            bits = shared_bits(labels, labels)
            return self.attention(key, value, query=self.row("ref_query"), seen=bits, contrast=1.0)
        if name == "guided":
            query, reference = self.pair
            guide = (query @ reference.mT).scaled(self.settings["strength"])
            return self.attention(key, value, seen=self.bits, guide=guide)
        assert name == "soft"
        present = self.bits.any(-1).unsqueeze(2).expand(key.value.shape[0], 1, 1, -1)
        inner = [self.inner(x).output()[0] for x in (key, value)]
        return self.attention(*inner, counts=present)

    def inner(self, value: Approx) -> Attention:
        """The softmax over the similarity that "soft" mixes keys and values with."""
        query, reference = self.pair
        more = {"query": query, "scale": self.settings["strength"], "seen": self.bits, "contrast": 1.0}
        return self.attention(reference, value, **more)

    def truth(self, results, backend):
        name = self.settings["refinement"]
        if name == "none":
            return [gather(self.row("ref_value"), self.match(backend).index)]
        output = self.refined(backend).output()[0]
        return [gather(output, self.match(backend).index)] if name == "warped_output" else [output]

    def gradients(self, grads, backend):
        name, (grad,) = self.settings["refinement"], grads
        tokens = self.leaves["ref_key"].shape[2]
        found: Grads = {}
        if name in ("none", "warped_output"):
            index = self.match(backend).index.expand(-1, self.leaves["query"].shape[1], -1)
            grad = gather_gradient(grad.where((index >= 0).unsqueeze(-1)), index, tokens).rounded(self.dtype)
        if name == "none":
            found["ref_value"] = grad
        else:
            refined = self.refined(backend)
            after = refined.gradients(grad)
            found = {"query": after.query, "ref_key": after.key, "ref_value": after.value}
        if name == "warped_output":
            found["ref_query"] = found.pop("query")
        if name == "warped_values":
            index = self.match(backend).index.expand(-1, self.leaves["query"].shape[1], -1)
            found["own_key"] = found.pop("ref_key")
            value = found["ref_value"].rounded(self.dtype).where((index >= 0).unsqueeze(-1))
            found["ref_value"] = gather_gradient(value, index, tokens)
        if name == "guided":
            query, reference = self.pair
            moved = after.guide.scaled(self.settings["strength"])
            added = self._features_gradients((moved @ reference, moved.mT @ query))
            found = self._sum(found, added)
        if name == "soft":
            key, value = (
                self.inner(self.row(x)).gradients(found.pop(x).rounded(self.dtype))
                for x in ("ref_key", "ref_value")
            )
            both = [
                a.rounded(self.dtype) + b.rounded(self.dtype)
                for a, b in ((key.query, value.query), (key.key, value.key))
            ]
            found = self._sum(found, self._features_gradients((both[0], both[1])))
            found |= {"ref_key": key.value, "ref_value": value.value}
        batch = self.leaves["ref_key"].shape[0]
        return {
            leaf: rows_gradient(x, self.others["batch_index"], batch) if leaf.startswith("ref_") else x
            for leaf, x in found.items()
        }

    def _sum(self, found: Grads, added: Grads) -> Grads:
        """Two ways to one leaf: each part is rounded before they are added."""
        parts = {
            name: found[name].rounded(self.dtype) + x.rounded(self.dtype) if name in found else x
            for name, x in added.items()
        }
        return found | parts

    def reached(self, hits, results, backend):
        name, index_rows = self.settings["refinement"], self.others["batch_index"]
        rows_ = slice(None) if index_rows is None else index_rows.long()
        bad = {leaf: x[rows_] if leaf.startswith("ref_") else x for leaf, x in hits.items()}
        heads, tokens = self.leaves["query"].shape[1], self.leaves["ref_key"].shape[2]
        shape = (*self.leaves["query"].shape[:3], tokens)
        if name in ("guided", "soft"):
            seen = self.bits.expand(shape)
            similar = sees_hit(bad, self.aligned, "ref_query", None, seen)
            if name == "guided":
                return [similar | sees_hit(bad, "query", "ref_key", "ref_value", seen)]
            mixed = {
                leaf: similar | (seen.double() @ bad[f"ref_{leaf}"].double() > 0) for leaf in ("key", "value")
            }
            return [
                sees_hit(mixed | {"query": bad["query"]}, "query", "key", "value", self.refined(backend).seen)
            ]
        index, score = self.match(backend)
        lost = score.isnan() if score.dim() == 3 else score[..., 0].isnan()
        lost = lost.unsqueeze(-1).expand(-1, heads, -1, -1)
        if name == "none":
            return [taken(index, bad["ref_value"]) | lost]
        seen = self.refined(backend).seen
        if name == "warped_values":
            values = {
                "query": bad["query"],
                "key": bad["own_key"],
                "value": taken(index, bad["ref_value"]) | lost,
            }
            return [sees_hit(values, "query", "key", "value", seen)]
        if name == "warped_output":
            return [taken(index, sees_hit(bad, "ref_query", "ref_key", "ref_value", seen)) | lost]
        return [sees_hit(bad, "query", "ref_key", "ref_value", seen) | lost]


def taken(index: Tensor, hit: Tensor) -> Tensor:
    """Where the gather by `index` takes an element that is hit."""
    return gather(Approx(hit.double(), hit.double(), 0.0), index).value > 0


def draw_qalign(draw: Draw, refinement: str) -> Call:
    s = draw.sizes
    index, content = draw.batch_index(), draw.one(None, "ties")
    batch = s.batch if index is None else s.ref_batch
    leaves = {
        "query": draw.features(s.batch, s.query_tokens, s.head_dim, content),
        "ref_query": draw.features(batch, s.key_tokens, s.head_dim, content),
        "ref_key": draw.features(batch, s.key_tokens, s.head_dim),
        "ref_value": draw.features(batch, s.key_tokens, s.value_dim),
    }
    if draw.flag():
        leaves["match_query"] = draw.features(s.batch, s.query_tokens, s.head_dim, content)
    if refinement == "warped_values":
        leaves["own_key"] = draw.features(s.batch, s.query_tokens, s.head_dim)
    labelled = draw.flag()
    settings = {
        "refinement": refinement,
        "similarity": draw.one("cosine", "dot"),
        "heads": draw.one("joint", "per_head"),
        "topk": draw.one(1, min(3, s.key_tokens)),
        "strength": draw.one(20.0, 1.0, -2.0),
        "scale": draw.scale(),
        "contrast": draw.contrast(),
    }
    others = {
        "batch_index": index,
        "query_labels": draw.labels(s.query_tokens) if labelled else None,
        "ref_labels": draw.labels(s.key_tokens) if labelled else None,
    }
    learned = {
        "none": ("ref_value",),
        "warped_output": ("ref_query", "ref_key", "ref_value"),
        "warped_values": ("query", "own_key", "ref_value"),
        "guided": tuple(leaves),
        "soft": tuple(leaves),
    }.get(refinement, ("query", "ref_key", "ref_value"))
    return QAlignCall(s.dtype, leaves, others, settings, learned)
