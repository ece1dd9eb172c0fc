"""Random calls of the gathers, the measures of attention, and the distillation loss."""

import functools
from dataclasses import replace

import torch

import qalign_kernels as qk
from tests.fuzz import formulas
from tests.fuzz.call import Call, sees_hit
from tests.fuzz.draw import Draw
from tests.fuzz.formulas import Attention, gather, gather_gradient, shared_bits
from tests.fuzz.rounding import Approx


class RearrangeCall(Call):
    def run(self, leaves, backend):
        found = qk.rearrange_kv(leaves["key"], leaves["value"], self.others["index"], backend=backend)
        counts = qk.match_counts(self.others["index"], self.leaves["key"].shape[2], backend=backend)
        return [*found, counts]

    def truth(self, results, backend):
        index, tokens = self.others["index"], self.leaves["key"].shape[2]
        expected = (index.unsqueeze(-1) == torch.arange(tokens)).sum(2).int()
        assert torch.equal(results[2], expected), "counts"
        return [gather(self.exact(name), index) for name in ("key", "value")]

    def gradients(self, grads, backend):
        index, tokens = self.others["index"], self.leaves["key"].shape[2]
        index = index.expand(-1, self.leaves["key"].shape[1], -1)
        return {
            name: gather_gradient(grad.where((index >= 0).unsqueeze(-1)), index, tokens)
            for name, grad in zip(("key", "value"), grads)
        }

    def reached(self, hits, results, backend):
        index = self.others["index"]
        as_approx = [Approx(hits[name].double(), hits[name].double(), 0.0) for name in ("key", "value")]
        return [gather(x, index).value > 0 for x in as_approx]


def draw_rearrange(draw: Draw) -> Call:
    s = draw.sizes
    leaves = {
        "key": draw.features(s.batch, s.key_tokens, s.head_dim),
        "value": draw.features(s.batch, s.key_tokens, s.value_dim),
    }
    index = draw.integers(-1, draw.one(1, s.key_tokens), s.batch, draw.one(1, s.heads), s.query_tokens)
    return RearrangeCall(s.dtype, leaves, {"index": index}, {}, tuple(leaves))


class LabelMassCall(Call):
    def has_gradient(self, backend):
        return True

    def run(self, leaves, backend):
        return [
            qk.label_mass(
                leaves["query"], leaves["key"], self.others["key_labels"], **self.settings, backend=backend
            )
        ]

    @functools.cached_property
    def formula(self) -> Attention:
        labels, key = self.others["key_labels"], self.exact("key")
        classes = labels.unsqueeze(-1) == torch.arange(self.settings["num_labels"])
        members = classes.unsqueeze(1).expand(*key.value.shape[:2], -1, -1).double()
        counts = self.settings["counts"]
        counts = torch.ones(1) if counts is None else counts.unsqueeze(2)
        value = Approx(members, torch.zeros_like(members), key.unit)
        seen = torch.ones(1, dtype=torch.bool)
        result = torch.float64 if self.dtype == torch.float64 else torch.float32
        return Attention(self.exact("query"), key, value, self.scale, counts, seen, result)

    def truth(self, results, backend):
        return [self.formula.output()[0]]

    def gradients(self, grads, backend):
        formula = replace(self.formula, dtype=self.dtype)  # the gradient of the map may be rounded to it
        found = formula.gradients(grads[0])
        return {"query": found.query, "key": found.key}

    def reached(self, hits, results, backend):
        bad = sees_hit(hits, "query", "key", None, self.formula.seen)
        return [bad.expand(results[0].shape)]


def draw_label_mass(draw: Draw) -> Call:
    s = draw.sizes
    leaves = {
        "query": draw.features(s.batch, s.query_tokens, s.head_dim),
        "key": draw.features(s.batch, s.key_tokens, s.head_dim),
    }
    counts = draw.counts(s.key_tokens) if draw.flag() else None
    labels = draw.integers(-1, 6, draw.one(1, s.batch), s.key_tokens)
    settings = {"num_labels": draw.one(1, 4, 5), "scale": draw.scale(), "counts": counts}
    return LabelMassCall(s.dtype, leaves, {"key_labels": labels, "counts": counts}, settings, tuple(leaves))


class MeanMapCall(Call):
    def run(self, leaves, backend):
        return [qk.mean_attention_map(leaves["query"], leaves["key"], **self.settings, backend=backend)]

    @functools.cached_property
    def formula(self) -> Attention:
        key = self.exact("key")
        eye = torch.eye(key.value.shape[2], dtype=torch.float64).expand(*key.value.shape[:2], -1, -1)
        value = Approx(eye, torch.zeros_like(eye), key.unit)
        result = torch.float64 if self.dtype == torch.float64 else torch.float32
        every = torch.ones(1, dtype=torch.bool)
        return Attention(self.exact("query"), key, value, self.scale, torch.ones(1), every, result)

    def truth(self, results, backend):
        return [self.formula.output()[0].sum(1).scaled(1 / self.leaves["query"].shape[1])]

    def gradients(self, grads, backend):
        heads = self.leaves["query"].shape[1]
        each = grads[0].scaled(1 / heads).map(lambda x: x.unsqueeze(1).expand(-1, heads, -1, -1))
        found = self.formula.gradients(each)
        return {"query": found.query, "key": found.key}

    def reached(self, hits, results, backend):
        bad = sees_hit(hits, "query", "key", None, self.formula.seen).any(1)
        return [bad.expand(results[0].shape)]


def draw_mean_map(draw: Draw) -> Call:
    s = draw.sizes
    leaves = {
        "query": draw.features(s.batch, s.query_tokens, s.head_dim),
        "key": draw.features(s.batch, s.key_tokens, s.head_dim),
    }
    return MeanMapCall(s.dtype, leaves, {}, {"scale": draw.scale()}, tuple(leaves))


class DistillationCall(Call):
    def has_gradient(self, backend):
        return True

    def run(self, leaves, backend):
        n = self.settings["images"]
        keys, values = ([leaves[f"{name}{i}"] for i in range(n)] for name in ("key", "value"))
        labels = self.settings["ref_labels"]
        return [
            qk.distillation_loss(
                leaves["output"],
                leaves["query"],
                keys if n > 1 else keys[0],
                values if n > 1 else values[0],
                scale=self.settings["scale"],
                query_labels=self.others["query_labels"],
                ref_labels=labels if n > 1 or labels is None else labels[0],
                backend=backend,
            )
        ]

    @functools.cached_property
    def formula(self) -> Attention:
        batch, heads, queries, _ = self.leaves["query"].shape
        n, labels = self.settings["images"], self.settings["ref_labels"]
        whole = [
            formulas.side_by_side(
                [self.exact(f"{name}{i}").map(lambda x: x.expand(batch, -1, -1, -1)) for i in range(n)], 2
            )
            for name in ("key", "value")
        ]
        seen = [
            shared_bits(self.others["query_labels"], None if labels is None else labels[i]).expand(
                batch, heads, queries, self.leaves[f"key{i}"].shape[2]
            )
            for i in range(n)
        ]
        return Attention(
            self.exact("query"), *whole, self.scale, torch.ones(1), torch.cat(seen, -1), self.dtype
        )

    def _difference(self) -> Approx:
        return self.exact("output") - self.formula.output()[0]

    def truth(self, results, backend):
        size = self._difference().map(lambda x: x.abs().flatten())
        return [size.sum(0).scaled(1 / size.value.numel())]

    def gradients(self, grads, backend):
        difference = self._difference()
        unsure = (difference.value.abs() <= difference.error).double()
        sign = Approx(difference.value.sign(), 2 * unsure, difference.unit)
        return {"output": (sign * grads[0]).scaled(1 / difference.value.numel())}

    def reached(self, hits, results, backend):
        n, batch = self.settings["images"], self.leaves["query"].shape[0]
        joined = {
            name: torch.cat([hits[f"{name}{i}"].expand(batch, -1, -1, -1) for i in range(n)], 2)
            for name in ("key", "value")
        }
        bad = sees_hit(joined | {"query": hits["query"]}, "query", "key", "value", self.formula.seen)
        return [bad.any() | hits["output"].any()]


def draw_distillation(draw: Draw) -> Call:
    s = draw.sizes
    leaves = {
        "output": draw.features(s.batch, s.query_tokens, s.value_dim),
        "query": draw.features(s.batch, s.query_tokens, s.head_dim),
    }
    images = draw.one(1, 1, 2)
    labelled, labels = draw.flag(), []
    for i in range(images):
        tokens = s.key_tokens if i == 0 else draw.one(1, 5, 40)
        batch = draw.one(1, s.batch)
        leaves[f"key{i}"] = draw.features(batch, tokens, s.head_dim)
        leaves[f"value{i}"] = draw.features(batch, tokens, s.value_dim)
        labels.append(draw.labels(tokens) if labelled else None)
    others = {"query_labels": draw.labels(s.query_tokens) if labelled else None}
    others |= {f"ref_labels{i}": x for i, x in enumerate(labels)}
    settings = {"scale": draw.scale(), "images": images, "ref_labels": labels if labelled else None}
    return DistillationCall(s.dtype, leaves, others, settings, ("output",))
