"""Bounded attention as its official code computes it: additive masks, whole maps, batch [empty; prompt].

Slow and plain on purpose, in any floating dtype, without `qalign`. Clusters of tokens come from outside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5


@dataclass
class Published:
    """The settings and the state that all layers share. Labels of subjects are their places in `boxes`."""

    boxes: Sequence[Sequence[float]]
    tokens: Sequence[Sequence[int]]  # of each subject
    eos: int
    filtered: Sequence[int]
    loss_layers: Sequence[str]  # blocks, without the name of the attention
    mask_layers: Sequence[str]
    cluster: Callable[[Tensor], Tensor]  # rows of a map [N, N] to clusters [N]
    guided: int = 15
    iterations: int = 5
    rates: tuple[float, float] = (8.0, 2.0)
    enough: float = 0.2
    refine_every: int = 5
    step: int = 0
    optimized: bool = False
    masks: Tensor | None = None  # [S, h, w] of the grid of the mask layers
    means: dict[bool, Tensor] = field(default_factory=dict)  # by is_cross
    counts: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    foreground: dict[bool, list] = field(default_factory=lambda: {True: [], False: []})
    background: dict[bool, list] = field(default_factory=lambda: {True: [], False: []})
    losses: list[tuple[int, float]] = field(default_factory=list)

    def box_masks(self, side: int) -> Tensor:
        masks = torch.zeros(len(self.boxes), side, side, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, self.boxes):
            mask[round(y0 * side) : round(y1 * side), round(x0 * side) : round(x1 * side)] = True
        return masks.flatten(1)

    def subject_masks(self, side: int) -> Tensor:
        """bool [S, side²]: boxes in the guided steps, then the refined masks."""
        if self.step < self.guided or self.masks is None:
            return self.box_masks(side)
        return (
            F.interpolate(self.masks[None].float(), (side, side), mode="nearest-exact")[0].flatten(1).bool()
        )

    def self_bias(self, tokens: int, dtype: torch.dtype) -> Tensor:
        subjects = self.subject_masks(int(tokens**0.5))
        inside = subjects.any(0)
        seen = ~inside[:, None] | ~inside[None]
        for mask in subjects:
            seen |= mask[:, None] & mask[None]
        bias = torch.zeros(tokens, tokens, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return torch.stack([bias, bias])

    def cross_bias(self, tokens: int, words: int, dtype: torch.dtype) -> Tensor:
        subjects = self.subject_masks(int(tokens**0.5))
        outside, lowest = ~subjects.any(0), torch.finfo(dtype).min
        bias = torch.zeros(tokens, words, dtype=dtype)
        for places in (*self.tokens, self.filtered):
            bias[:, list(places)] = lowest
        for mask, places in zip(subjects, self.tokens):
            for place in places:
                bias[mask | outside if self.optimized else mask, place] = 0
        if not self.optimized:
            bias[outside, self.eos] = lowest
        return torch.stack([torch.zeros_like(bias), bias])

    def attention(self, name: str, is_cross: bool, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        logits = q @ k.mT * scale  # [2, H, N, T]
        shape = (*logits.shape[2:], q.dtype)
        bias = self.cross_bias(*shape) if is_cross else self.self_bias(shape[0], q.dtype)
        p = (logits + bias[:, None]).softmax(-1)
        if self.optimized and name in self.loss_layers:
            self.save_loss(p[1], is_cross)
        if not self.optimized and name in self.mask_layers:
            self.counts[is_cross] += 1
            share = 1 / self.counts[is_cross]
            self.means[is_cross] = (1 - share) * self.means.get(is_cross, 0) + share * p[1].mean(0)
        return p @ v

    def save_loss(self, p: Tensor, is_cross: bool) -> None:
        boxes = self.box_masks(int(p.shape[1] ** 0.5))
        outside = ~boxes.any(0)
        contexts = [[*places, self.eos] for places in self.tokens] if is_cross else boxes
        found = [
            (p[:, box][..., seen].sum(), p[:, outside][..., seen].sum()) for box, seen in zip(boxes, contexts)
        ]
        for saved, values in zip((self.foreground, self.background), zip(*found)):
            saved[is_cross].append(torch.stack(values))

    def loss(self) -> Tensor:
        total = torch.zeros(())
        for is_cross, weight in ((True, 1.5), (False, 0.5)):
            inside, outside = (
                torch.stack(saved[is_cross]).mean(0) for saved in (self.foreground, self.background)
            )
            iou = inside / (inside + len(self.boxes) * outside)
            total = total + weight * ((1 - iou) ** 2).sum()
        return total

    def guide(self, unet: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`unet` takes [empty; prompt] latents of this step."""
        if self.step >= self.guided:
            return x
        rate = self.rates[0] + (self.rates[1] - self.rates[0]) / self.guided * self.step
        self.optimized, normalized = True, 10000.0
        with torch.enable_grad():
            x = x.clone().detach().requires_grad_()
            for _ in range(self.iterations):
                if normalized < self.enough:
                    break
                self.foreground, self.background = {True: [], False: []}, {True: [], False: []}
                unet(torch.cat([x, x]))
                loss = self.loss()
                normalized = loss.item() / len(self.boxes)
                self.losses.append((self.step, normalized))
                x = x - rate * torch.autograd.grad(loss, x)[0]
        self.optimized = False
        return x.detach()

    def refine(self) -> None:
        """At the first layer of a step."""
        if self.step < self.guided or (self.masks is not None and self.step % self.refine_every):
            return
        words = self.means[True][:, [places[-1] for places in self.tokens]].T  # [S, N]
        side = int(words.shape[1] ** 0.5)
        clusters = self.cluster(self.means[False] / (self.means[False].max(0).values + EPSILON))
        present = self.box_masks(side) if self.masks is None else self.masks.flatten(1)
        maps = torch.stack([word_map(each) for each in words]) * present
        masks = torch.zeros_like(present)
        for number in clusters.unique():
            inside = clusters == number
            scores = (maps * inside).sum(1) / torch.minimum(maps.sum(1), inside.sum())
            if scores.max() >= 0.2:
                masks[scores.argmax(), inside] = True
        boxes = self.box_masks(side)
        for s in range(len(masks)):
            if not masks[s].any():
                masks &= ~boxes[s]
                masks[s] = boxes[s]
        self.masks = masks.view(-1, side, side)


def word_map(m: Tensor) -> Tensor:
    m = torch.sigmoid(10 * (m / (m.max() + EPSILON) - 0.2))
    return (m - m.min()) / (m.max() - m.min() + EPSILON)


class Processor:
    """Attention of one layer."""

    def __init__(self, published: Published, name: str) -> None:
        self.published, self.name = published, name

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_
    ) -> Tensor:
        is_cross = encoder_hidden_states is not None
        context = encoder_hidden_states if is_cross else hidden_states
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        output = self.published.attention(self.name, is_cross, q, k, v, attn.scale)
        return attn.to_out[0](output.transpose(1, 2).flatten(2))


def install(unet: torch.nn.Module, published: Published) -> None:
    unet.set_attn_processor(
        {name: Processor(published, name.rpartition(".attn")[0]) for name in unet.attn_processors}
    )


def run(unet, scheduler, x: Tensor, text: Tensor, published: Published, scale: float) -> list[Tensor]:
    """The latents after each step of DDIM; `text` is [empty; prompt], and `scheduler` has its timesteps."""
    trajectory = []
    install(unet, published)
    for step, t in enumerate(scheduler.timesteps):
        published.step = step
        x = published.guide(lambda both, t=t: unet(both, t, encoder_hidden_states=text).sample, x)
        with torch.no_grad():
            published.refine()
            empty, prompt = unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample.chunk(2)
            x = scheduler.step(empty + scale * (prompt - empty), t, x).prev_sample
        trajectory.append(x)
    return trajectory
