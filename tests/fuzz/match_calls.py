"""Random calls of the two searches for similar tokens."""

import functools
from typing import Any

import torch
from torch import Tensor

import qalign_kernels as qk
from tests.fuzz import formulas
from tests.fuzz.call import Call, rows_of, sees_hit
from tests.fuzz.draw import Draw
from tests.fuzz.formulas import rows, rows_gradient, shared_bits
from tests.fuzz.rounding import Approx


class MatchCall(Call):
    """similarity_argmax and similarity_topk; `k` is 0 for the former."""

    def has_gradient(self, backend):
        return True

    def run(self, leaves, backend):
        k, settings = self.settings["k"], {n: x for n, x in self.settings.items() if n != "k"}
        if k:
            found = qk.similarity_topk(leaves["query"], leaves["reference"], k, **settings, backend=backend)
        else:
            found = qk.similarity_argmax(leaves["query"], leaves["reference"], **settings, backend=backend)
        return [found.score, found.index]

    @functools.cached_property
    def table(self) -> Approx:
        joint = self.settings["heads"] == "joint"
        reference = rows(self.exact("reference"), self.settings["batch_index"])
        return formulas.scores(self.exact("query"), reference, self.settings["similarity"], joint)

    @functools.cached_property
    def admissible(self) -> Tensor:
        bits = shared_bits(self.settings["query_labels"], self.settings["reference_labels"])
        return bits.expand(self.table.value.shape)

    def truth(self, results, backend):
        """The scores at the chosen tokens, after the choice itself has been judged."""
        index = results[1].unsqueeze(-1) if results[1].dim() == 3 else results[1]
        chosen = index.clamp(min=0).long()
        table = self.table.value.masked_fill(~self.admissible, float("-inf"))
        packed = 0 if self.settings.get("exact", True) else 2.0**-15
        slack = self.table.error + packed * self.table.value.abs()
        k = index.shape[-1]
        spoilt = self.reached(self.hits, results, backend)[0] if self.hits else results[0].isnan()
        clean = ~(spoilt if spoilt.dim() == 3 else spoilt.any(-1))
        best = table.sort(-1, descending=True).values[..., :k]
        at = table.gather(-1, chosen).masked_fill(index < 0, float("-inf"))
        regret = (best - at).masked_fill(best == at, 0)
        assert (index < table.shape[-1]).all() and (index >= -1).all(), "index out of range"
        doubled = (index.unsqueeze(-1) == index.unsqueeze(-2)) & (index >= 0).unsqueeze(-1)
        assert (doubled.sum(-1) <= 1).all(), "a token is chosen twice"
        allowed = 2 * slack.amax(-1, keepdim=True)
        assert (regret <= allowed)[clean].all(), f"a better token exists: {regret[clean].max():.3g}"
        if self._sums_are_exact() and not packed:
            first = table.sort(dim=-1, descending=True, stable=True).indices[..., :k]
            first = first.masked_fill(best == float("-inf"), -1)
            assert torch.equal(index[clean], first.int()[clean]), "a tie does not go to the lowest index"
        error = (self.table.error + packed * self.table.value.abs()).gather(-1, chosen)
        value = Approx(at, error, self.table.unit)
        return [value.map(lambda x: x.reshape(results[0].shape))]

    def _sums_are_exact(self) -> bool:
        whole = all((x == x.round()).all() and (x.abs() <= 2).all() for x in self.leaves.values())
        return whole and self.settings["similarity"] == "dot"

    def gradients(self, grads, backend):
        _, index = self.run(self.leaves, backend)
        index = index.unsqueeze(-1) if index.dim() == 3 else index
        grad = grads[0].map(lambda x: x.reshape(index.shape)).where(index >= 0)
        onehot = (index.unsqueeze(-1) == torch.arange(self.table.value.shape[-1])).double()
        moved = Approx(
            *(torch.einsum("bgik,bgikj->bgij", x, onehot) for x in (grad.value, grad.error)), grad.unit
        )
        query, reference = self.exact("query"), rows(self.exact("reference"), self.settings["batch_index"])
        heads, joint = query.value.shape[1], self.settings["heads"] == "joint"

        def flat(x: Approx) -> Approx:
            return x.map(lambda y: y.transpose(1, 2).flatten(2).unsqueeze(1)) if joint else x

        def unflat(x: Approx) -> Approx:
            return x.map(lambda y: y.squeeze(1).unflatten(2, (heads, -1)).transpose(1, 2)) if joint else x

        query, reference = flat(query), flat(reference)
        similarity = self.settings["similarity"]
        units = [formulas.unit_vectors(x) if similarity == "cosine" else x for x in (query, reference)]
        found = {
            "query": formulas.features_gradient(query, moved @ units[1], similarity),
            "reference": formulas.features_gradient(reference, moved.mT @ units[0], similarity),
        }
        found = {name: unflat(x) for name, x in found.items()}
        found["reference"] = rows_gradient(
            found["reference"], self.settings["batch_index"], self.leaves["reference"].shape[0]
        )
        return found

    def reached(self, hits, results, backend):
        reference = hits["reference"][rows_of(self.settings, hits["reference"])]
        bad = {"query": hits["query"], "reference": reference}
        if self.settings["heads"] == "joint":
            bad = {name: x.transpose(1, 2).flatten(2).unsqueeze(1) for name, x in bad.items()}
        row = sees_hit(bad, "query", "reference", None, self.admissible)
        return [row.expand(results[0].shape) if results[0].dim() == 4 else row.squeeze(-1)]

    def lost(self, reached):
        """The first of the k scores says that a row has a NaN."""
        if reached.dim() == 3:
            return reached
        return reached & (torch.arange(reached.shape[-1]) == 0)


def draw_match(draw: Draw, topk: bool) -> Call:
    s = draw.sizes
    index = draw.batch_index()
    content = draw.one(None, "ties")
    leaves = {
        "query": draw.features(s.batch, s.query_tokens, s.head_dim, content),
        "reference": draw.features(
            s.batch if index is None else s.ref_batch, s.key_tokens, s.head_dim, content
        ),
    }
    labelled = draw.flag()
    settings: dict[str, Any] = {
        "similarity": draw.one("cosine", "dot"),
        "heads": draw.one("joint", "per_head"),
        "batch_index": index,
        "query_labels": draw.labels(s.query_tokens) if labelled else None,
        "reference_labels": draw.labels(s.key_tokens) if labelled else None,
        "k": draw.one(1, min(3, s.key_tokens), min(17, s.key_tokens)) if topk else 0,
    }
    if not topk:
        settings["exact"] = draw.one(True, True, False)
    others = {name: settings[name] for name in ("batch_index", "query_labels", "reference_labels")}
    return MatchCall(s.dtype, leaves, others, settings, tuple(leaves))
