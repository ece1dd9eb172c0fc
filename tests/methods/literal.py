"""The published formulas, written out map by map and row by row. They are the truth for the methods."""

import math

import torch
from torch import Tensor


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[N, C] to [H, N, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def project(attn, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [H, N, d] of hidden states [N, C]."""
    return tuple(heads_of(layer(hidden), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v))


def logits(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return logits(q, k).softmax(-1) @ v


def adain(x: Tensor, y: Tensor) -> Tensor:
    """Over tokens, per head and channel; unbiased variance + 1e-5."""
    normalised = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()
    return normalised * (y.var(1, keepdim=True) + 1e-5).sqrt() + y.mean(1, keepdim=True)


def contrasted(p: Tensor, contrast: float) -> Tensor:
    """Around each row's mean, clipped, and not renormalised."""
    mean = p.mean(-1, keepdim=True)
    return ((p - mean) * contrast + mean).clip(0, 1)


def cross_image(attn, out, app, struct, *, contrast=1.67, **_) -> Tensor:
    (q, _, _), (_, k, v) = project(attn, out), project(attn, app)
    return contrasted(logits(q, k).softmax(-1), contrast) @ v


def cosine(one: Tensor, two: Tensor) -> Tensor:
    """Of queries [H, N, d], all heads together: [N, N]."""
    one, two = (x.transpose(0, 1).flatten(1) for x in (one, two))
    return (one / one.norm(dim=-1, keepdim=True)) @ (two / two.norm(dim=-1, keepdim=True)).mT


def qalign(attn, out, app, struct, *, contrast=1.67, **_) -> Tensor:
    """Align queries, rearrange keys and values in memory, attend them."""
    (q, _, _), (ref_q, k, v) = project(attn, out), project(attn, app)
    match = cosine(q, ref_q).argmax(1)
    return contrasted(logits(q, k[:, match]).softmax(-1), contrast) @ v[:, match]


def qalign_warp(attn, out, app, struct, **_) -> Tensor:
    """The appearance's own attention output, at the match of output and structure together."""
    q, struct_q, (ref_q, k, v) = project(attn, out)[0], project(attn, struct)[0], project(attn, app)
    match = (cosine(q, ref_q) + cosine(struct_q, ref_q)).argmax(1)
    return plain(ref_q, k, v)[:, match]


def visual_style(attn, out, app, struct, **_) -> Tensor:
    (q, _, _), (_, k, v) = project(attn, out), project(attn, app)
    return plain(q, k, v)


def masactrl(attn, out, app, struct, *, union=False, masks=None, **_) -> Tensor:
    (q, own_k, own_v), (_, k, v) = project(attn, out), project(attn, app)
    if union:
        return plain(q, torch.cat([k, own_k], 1), torch.cat([v, own_v], 1))
    if masks is None:
        return plain(q, k, v)
    source, target = masks  # bool [N] each
    scores = logits(q, k)
    lowest = torch.finfo(scores.dtype).min
    ones = torch.ones_like(scores[0, 0])
    foreground = (scores + ones.masked_fill(~source, lowest)).softmax(-1) @ v
    background = (scores + ones.masked_fill(source, lowest)).softmax(-1) @ v
    inside = target[:, None].to(scores.dtype)
    return foreground * inside + background * (1 - inside)


def style_id(attn, out, app, struct, *, gamma=0.75, temperature=1.5, **_) -> Tensor:
    q, content, (_, k, v) = project(attn, out)[0], project(attn, struct)[0], project(attn, app)
    return (temperature * logits(gamma * content + (1 - gamma) * q, k)).softmax(-1) @ v


def z_star(attn, out, app, struct, *, scale=1.2, **_) -> Tensor:
    (q, own_k, own_v), (_, k, v) = project(attn, out), project(attn, app)
    return torch.cat([scale * logits(q, k), logits(q, own_k)], -1).softmax(-1) @ torch.cat([v, own_v], 1)


def style_aligned(attn, out, app, struct, *, scale=1.0, shift=0.0, values=False, shared=True, **_) -> Tensor:
    (q, own_k, own_v), (ref_q, k, v) = project(attn, out), project(attn, app)
    q, own_k = adain(q, ref_q), adain(own_k, k)
    if values:
        own_v, v = adain(own_v, v), adain(v, v)
    if not shared:
        return plain(q, own_k, own_v)
    k = adain(k, k)  # as published, the reference's too
    scores = logits(q, torch.cat([own_k, scale * k], 1))
    scores[..., own_k.shape[1] :] += shift
    return scores.softmax(-1) @ torch.cat([own_v, v], 1)


def bounded(attn, out, app, struct, *, labels, **_) -> Tensor:
    q, k, v = project(attn, out)
    scores = logits(q, k)
    for i, mine in enumerate(labels.tolist()):
        for j, other in enumerate(labels.tolist()):
            if mine and other and mine != other:
                scores[:, i, j] = torch.finfo(scores.dtype).min
    return scores.softmax(-1) @ v


def seal(attn, out, app, struct, *, tau=0.15, delta=3.0, top=1, joint=True, blend="average", **_) -> Tensor:
    (q, own_k, own_v), (_, k, v) = project(attn, out), project(attn, app)
    one, two = (x.transpose(0, 1).flatten(1)[None].expand(len(q), -1, -1) if joint else x for x in (q, k))
    similarity = (one / one.norm(dim=-1, keepdim=True)) @ (two / two.norm(dim=-1, keepdim=True)).mT
    found, best = similarity.topk(top, -1)
    w = delta * (found[..., :1] > tau).to(q.dtype)
    if blend == "keys_values":
        one_k, one_v = (x.gather(1, best[..., :1].expand(-1, -1, x.shape[2])) for x in (k, v))
        return plain(q, (own_k + w * one_k) / (1 + w), (own_v + w * one_v) / (1 + w))
    values = v.unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    best_values = values.gather(2, best.unsqueeze(-1).expand(*best.shape, v.shape[2]))
    weights = logits(q, k).gather(2, best).softmax(-1)
    infused = (weights.unsqueeze(2) @ best_values).squeeze(2)
    base = plain(q, own_k, own_v)
    return {
        "average": (base + w * infused) / (1 + w),
        "add": base + w * infused,
        "extrapolate": base + w * (infused - base),
    }[blend]


def eye_for_an_eye(attn, out, app, struct, *, structure_step=False, masks=None, **_) -> Tensor:
    if structure_step:
        return plain(*project(attn, struct))
    swapped = out.clone()
    source, target = masks or [torch.ones_like(out[:, 0]).bool()] * 2  # of the appearance, of the output
    for i, h in enumerate(out):
        if target[i]:
            cosine = app @ h / (h.norm() * app.norm(dim=-1))
            swapped[i] = app[cosine.masked_fill(~source, -torch.inf).argmax()]
    return plain(*project(attn, swapped))


def nearest(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """[N] of a mask [h, w], as torch's `interpolate` resizes by default."""
    return torch.nn.functional.interpolate(mask[None, None].double(), grid).flatten()


def ctrl_x(attn, out, app, struct, *, structure=True, appearance=True, **_) -> Tensor:
    def norm(x):
        return (x - x.mean(-2, keepdim=True)) / x.std(-2, keepdim=True)

    if appearance:
        q, k = project(attn, norm(struct if structure else out))[0], project(attn, norm(app))[1]
        features = heads_of(app, attn.heads)
        p = logits(q, k).softmax(-1)
        mean = p @ features
        deviation = (p @ features.square() - mean.square()).clamp(min=0).sqrt()
        out = (deviation * norm(heads_of(out, attn.heads)) + mean).transpose(0, 1).flatten(1)
    q, k, v = project(attn, out)
    if structure:
        q, k, _ = project(attn, struct)
    return plain(q, k, v)


def reference_only(attn, out, app, struct, *, fidelity=0.0, **_) -> Tensor:
    (q, own_k, own_v), (_, k, v) = project(attn, out), project(attn, app)
    both = plain(q, torch.cat([own_k, k], 1), torch.cat([own_v, v], 1))
    return fidelity * plain(q, own_k, own_v) + (1 - fidelity) * both


def free_custom(attn, out, app, struct, *, weights=(3.0,), masks=None, **_) -> Tensor:
    """The references are `app` and, with two weights, `struct`."""
    q, own_k, own_v = project(attn, out)
    scores, values = [logits(q, own_k)], [own_v]
    for number, (reference, weight) in enumerate(zip((app, struct), weights)):
        _, k, v = project(attn, reference)
        mask = torch.ones_like(reference[:, 0]) if masks is None else masks[number].to(reference.dtype)
        bias = weight * mask
        scores.append(logits(q, k) + bias.masked_fill(bias == 0, torch.finfo(bias.dtype).min))
        values.append(v)
    return torch.cat(scores, -1).softmax(-1) @ torch.cat(values, 1)


def dream_matcher(attn, out, app, struct, *, grid=None, tau=0.4, foreground=None, labels=None, **_) -> Tensor:
    (q, k, v), (ref_q, _, ref_v) = project(attn, out), project(attn, app)
    height, width = grid or (math.isqrt(len(out)),) * 2
    one, two = (x.transpose(0, 1).flatten(1) for x in (q, ref_q))
    similarity = (one / one.norm(dim=-1, keepdim=True)) @ (two / two.norm(dim=-1, keepdim=True)).mT
    if labels is not None:
        ref_labels, own_labels = labels
        for i, label in enumerate(own_labels.tolist()):
            if label in ref_labels:
                similarity[i, ref_labels != label] = -math.inf
    there, back = similarity.argmax(1).tolist(), similarity.argmax(0).tolist()
    foreground = torch.ones(len(out)) if foreground is None else foreground
    value = v.clone()
    for i in range(len(out)):
        end = back[there[i]]
        distance = math.dist((i // width, i % width), (end // width, end % width))
        if foreground[i] and distance < tau * height * (foreground > 0).sum().item() / len(out):
            value[:, i] = ref_v[:, there[i]]
    return plain(q, k, value)


def consistory(attn, out, app, struct, *, subject=None, **_) -> Tensor:
    (q, own_k, own_v), (_, k, v) = project(attn, out), project(attn, app)
    seen = torch.ones(len(app), dtype=torch.bool) if subject is None else subject
    return plain(q, torch.cat([own_k, k[:, seen]], 1), torch.cat([own_v, v[:, seen]], 1))


# -- cross-attention of one row, [N, C] with the prompt [T, C']


def project_cross(attn, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        heads_of(layer(x), attn.heads)
        for layer, x in ((attn.to_q, hidden), (attn.to_k, context), (attn.to_v, context))
    )


def bounded_cross(attn, hidden, context, *, labels, subjects, filters, eos, optimized=False) -> Tensor:
    """The published additive mask, column by column; label 0 is background."""
    q, k, v = project_cross(attn, hidden, context)
    scores = logits(q, k)
    lowest = torch.finfo(scores.dtype).min
    mask = torch.zeros_like(scores[0])
    for places in (*subjects.values(), filters):
        for place in places:
            mask[:, place] = lowest
    for i, mine in enumerate(labels.tolist()):
        for label, places in subjects.items():
            if mine == label or (optimized and mine == 0):
                for place in places:
                    mask[i, place] = 0
        if mine == 0 and not optimized:
            mask[i, eos] = lowest
    return (scores + mask).softmax(-1) @ v


def automatic_mask(maps: list[Tensor], places, size: int) -> Tensor:
    """MasaCtrl's mask, bool [size²], of one row's maps [H, n, T], one from each layer, on square grids."""
    mean = torch.stack([each.mean(0) for each in maps]).mean(0)
    side = math.isqrt(len(mean))
    image = mean.view(side, side, -1)[..., list(places)].sum(-1)
    image = (image - image.min()) / (image.max() - image.min())
    rows = [int(place * side / size) for place in range(size)]
    return (image[rows][:, rows] >= 0.1).flatten()


# -- modules that are no attention, of all rows [output, appearance, structure] of each guidance part


def injected(y: Tensor) -> Tensor:
    """A residual block's output [B, C, h, w], the structure's in the output rows."""
    rows = list(y)
    for output in range(0, len(rows), 3):
        rows[output] = rows[output + 2]
    return torch.stack(rows)


def shared_group_norm(norm, x: Tensor) -> Tensor:
    """Of [B, C, h, w], each output row with the appearance below it, which is dropped afterwards."""
    rows = []
    for number, row in enumerate(x):
        both = torch.cat([row, x[number + 1] if number % 3 == 0 else row], dim=-2)
        groups = both.reshape(norm.num_groups, -1)
        normalised = (groups - groups.mean(1, keepdim=True)) / (
            groups.var(1, unbiased=False, keepdim=True) + norm.eps
        ).sqrt()
        normalised = normalised.reshape(both.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]
        rows.append(normalised[..., : x.shape[-2], :])
    return torch.stack(rows)
