"""Procedural pictures of creatures whose parts are known exactly.

The embedded model is trained on them, and leakage is measured on them. A picture is a function of its seed
alone: a layout of round cones (segments with a radius at each end), painted back to front with an
antialiased edge. Each cone has the texture of its part. Training seeds are even, and held-out seeds are
odd.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .creatures import bird, fish, quadruped, stack
from .parts import BACKGROUNDS, BODY, EYE, FOLIAGE, GROUND, OBJECT_PARTS, PARTS, SKY, WATER

PLANS = ("quadruped", "bird", "fish")
TEXTURES = ("plain", "striped", "spotted", "shaded", "mottled")
# The share of each texture in tenths. Shapes are easier to see if most surfaces are quiet.
_BACKGROUND_OF_TEN, _OBJECT_OF_TEN = (4, 0, 1, 3, 2), (4, 2, 1, 2, 1)
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
COUNTS = ("a", "two", "three", "four")
HERD = 4  # the largest number of individuals
_PAIR_STRIDE = 64
_PLACES = (
    ("on the ground", "by the water", "in the forest"),
    ("on a branch", "on a branch by the water", "on a branch in the forest"),
    ("in the water", "in the water above the ground", "in the water among weeds"),
)
# how often a label has a colour of its own; otherwise it has the body's
_OWN_COLOUR = (1.0, 1.0, 1.0, 1.0, 1.0, 0.85, 0.8, 0.85, 0.9, 0.9, 0.9, 1.0)
_HUES = (0.58, 0.12, 0.53, 0.33)  # of the backgrounds, up to a small random shift
_CELLS = torch.tensor(  # the centres of the individuals in a herd of one to four
    [
        [[0.5, 0.5]] * 4,
        [[0.29, 0.48], [0.71, 0.52]] * 2,
        [[0.28, 0.27], [0.73, 0.32], [0.5, 0.74], [0.5, 0.5]],
        [[0.27, 0.27], [0.74, 0.28], [0.26, 0.74], [0.73, 0.73]],
    ]
)
_SCALES = (1.08, 0.74, 0.66, 0.62)


@dataclass(frozen=True, eq=False)
class Scenes:
    """Rendered scenes.

    Attributes:
        image: float32 [B, 3, S, S] in [0, 1].
        labels: int64 [B, S, S], indices into `PARTS`. The individuals of a herd share labels.
        plans: the body plan of each scene, one of `PLANS`.
        captions: a description of each scene.
    """

    image: Tensor
    labels: Tensor
    plans: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class ScenePair:
    """Two held-out scenes by their seeds."""

    appearance: int
    structure: int


def training_seed(index: int) -> int:
    """The seed of a scene for training."""
    return 2 * index


def held_out_seed(index: int) -> int:
    """The seed of a scene that no model is trained on.

    >>> [held_out_seed(0), held_out_seed(1)]
    [1, 3]
    """
    return 2 * index + 1


def held_out_pairs(count: int, seed: int = 0) -> list[ScenePair]:
    """Choose pairs of held-out scenes. Two of three pairs share the body plan, the third does not.

    The first pairs do not depend on `count`.

    >>> held_out_pairs(2) == held_out_pairs(3)[:2]
    True
    """
    return [
        _pair(seed * 1_000_000 + number * _PAIR_STRIDE, same_plan=number % 3 != 2) for number in range(count)
    ]


def token_labels(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The label of most pixels in the cell of each token: labels [B, S, S] to int32 [B, h·w].

    The lowest of several wins.

    >>> token_labels(render([3], 32).labels, (8, 8)).shape
    torch.Size([1, 64])
    """
    share = F.adaptive_avg_pool2d(F.one_hot(labels, len(PARTS)).permute(0, 3, 1, 2).float(), grid)
    return share.flatten(2).argmax(1).int()


def render(seeds: Sequence[int], size: int = 128) -> Scenes:
    """Draw the scenes of `seeds` as pictures of `size` pixels.

    Args:
        seeds: one for each scene; `held_out_seed` and `training_seed` give them.
        size: side of the pictures in pixels.

    Raises:
        ValueError: there is no seed, a seed is negative, or the size is below 8.

    >>> scenes = render([held_out_seed(1)], 32)
    >>> scenes.image.shape, scenes.labels.shape
    (torch.Size([1, 3, 32, 32]), torch.Size([1, 32, 32]))
    >>> scenes.captions
    ('...',)
    """
    if len(seeds) == 0 or min(seeds) < 0:
        raise ValueError(f"seeds: expected one or more non-negative integers, got {list(seeds)!r}")
    if size < 8:
        raise ValueError(f"size: expected at least 8 pixels, got {size}")
    draws = _Draws(torch.stack([_uniform(seed) for seed in seeds]))
    traits = _traits(draws)
    cones, part = _layout(draws, traits)
    pixel = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    texture = _textures(draws, traits, x, y)
    image, labels = _paint(*_background(draws, traits, texture, x, y), texture, cones, part, x, y)
    plans = tuple(PLANS[plan] for plan in traits.plan.tolist())
    return Scenes(image.clamp(0, 1), labels, plans, tuple(_captions(draws, traits)))


_DRAWS = 1024


def _uniform(seed: int) -> Tensor:
    return torch.rand(_DRAWS, generator=torch.Generator().manual_seed(seed))


class _Draws:
    """Uniform random numbers [B, K], used one after the other."""

    def __init__(self, uniform: Tensor) -> None:
        self.uniform, self.used = uniform, 0

    def __call__(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[B, *shape], uniform in [low, high)."""
        count = math.prod(shape)
        taken = self.uniform[:, self.used : self.used + count]
        self.used += count
        return low + (high - low) * taken.reshape(-1, *shape)


@dataclass(frozen=True, eq=False)
class _Traits:
    plan: Tensor  # [B]
    count: Tensor  # [B], individuals
    place: Tensor  # [B], 0 to 2: 1 adds water or ground, 2 adds foliage
    kind: Tensor  # [B, parts], index into TEXTURES
    hue: Tensor  # [B, parts]


def _traits(draws: _Draws) -> _Traits:
    plan = _choice(draws(), len(PLANS))
    herd = draws() < 0.5
    count = torch.where(herd, 2 + _choice(draws(), 3), 1)
    place = _choice(draws(), 3)
    kind = torch.cat(
        [
            _drawn(draws(len(BACKGROUNDS)), _BACKGROUND_OF_TEN),
            _drawn(draws(len(OBJECT_PARTS)), _OBJECT_OF_TEN),
        ],
        1,
    )
    kind[:, EYE] = 0
    own = draws(len(PARTS)) < torch.tensor(_OWN_COLOUR)
    hue = draws(len(PARTS))
    hue = torch.where(own, hue, hue[:, BODY, None])
    kind = torch.where(own, kind, kind[:, BODY, None])
    hue[:, : len(BACKGROUNDS)] = torch.tensor(_HUES) + 0.22 * (hue[:, : len(BACKGROUNDS)] - 0.5)
    return _Traits(plan, count, place, kind, hue % 1)


def _plan(seed: int) -> int:
    return int(_choice(_uniform(seed)[:1], len(PLANS)))


def _pair(first: int, same_plan: bool) -> ScenePair:
    appearance = held_out_seed(first)
    others = [held_out_seed(first + step) for step in range(1, _PAIR_STRIDE)]
    fits = (seed for seed in others if (_plan(seed) == _plan(appearance)) == same_plan)
    return ScenePair(appearance, next(fits, others[-1]))


def _drawn(uniform: Tensor, shares: Sequence[int]) -> Tensor:
    """Choose indices with the frequencies `shares`."""
    return torch.arange(len(shares)).repeat_interleave(torch.tensor(shares))[_choice(uniform, sum(shares))]


def _choice(uniform: Tensor, count: int) -> Tensor:
    return (uniform * count).long().clamp(max=count - 1)


def _layout(draws: _Draws, traits: _Traits) -> tuple[Tensor, Tensor]:
    """Round cones [B, P, 6] and their labels [B, P], back to front.

    A cone is (ax, ay, bx, by, ra, rb). A cone that is not there has negative radii.
    """
    plans = [stack(plan(functools.partial(draws, HERD))) for plan in (quadruped, bird, fish)]
    longest = max(cones.shape[2] for cones, _ in plans)
    cones = torch.stack(
        [F.pad(cones, (0, 0, 0, longest - cones.shape[2]), value=-1.0) for cones, _ in plans], 1
    )
    part = torch.stack([F.pad(part, (0, longest - len(part))) for _, part in plans])
    rows = torch.arange(len(traits.plan))
    cones, part = cones[rows, traits.plan], part[traits.plan]  # [B, HERD, P, 6], [B, P]

    scale = torch.tensor(_SCALES)[traits.count - 1, None] * draws(HERD, low=0.88, high=1.14)
    centre = (
        _CELLS[traits.count - 1]
        + (draws(HERD, 2) - 0.5) * torch.where(traits.count == 1, 0.16, 0.1)[:, None, None]
    )
    flip = torch.where(draws(HERD) < 0.5, -1.0, 1.0)
    tilt = (draws(HERD) - 0.5) * torch.tensor([0.35, 0.5, 0.8])[traits.plan, None]
    ends = (
        cones[..., :4].unflatten(-1, (2, 2))
        * torch.stack([flip, torch.ones_like(flip)], -1)[:, :, None, None]
    )
    cos, sin = tilt.cos()[:, :, None, None], tilt.sin()[:, :, None, None]
    x, y = ends.unbind(-1)
    ends = (
        torch.stack([x * cos - y * sin, x * sin + y * cos], -1) * scale[:, :, None, None, None]
        + centre[:, :, None, None]
    )
    there = (torch.arange(HERD) < traits.count[:, None])[:, :, None, None]
    radii = torch.where(there, cones[..., 4:] * scale[:, :, None, None], -1.0)
    return torch.cat([ends.flatten(3), radii], -1).flatten(1, 2), part.repeat(1, HERD)


@dataclass(frozen=True, eq=False)
class _Texture:
    """Two colours [B, parts, 3] of each label, and the part of the second at each pixel [B, parts, S, S]."""

    first: Tensor
    second: Tensor
    share: Tensor

    def of(self, rows: Tensor, label: Tensor) -> Tensor:
        """The picture [R, 3, S, S] of one label for each of R rows."""
        first, second = self.first[rows, label, :, None, None], self.second[rows, label, :, None, None]
        return torch.lerp(first, second, self.share[rows, label].unsqueeze(1))

    def at(self, labels: Tensor) -> Tensor:
        """The picture [B, 3, S, S] with the label of each pixel."""
        rows = torch.arange(len(labels))[:, None, None]
        share = self.share.gather(1, labels.unsqueeze(1))
        return torch.lerp(
            self.first[rows, labels].permute(0, 3, 1, 2), self.second[rows, labels].permute(0, 3, 1, 2), share
        )


def _textures(draws: _Draws, traits: _Traits, x: Tensor, y: Tensor) -> _Texture:
    parts, grounds = len(PARTS), len(BACKGROUNDS)
    saturation, value = draws(parts, low=0.35, high=1.0), draws(parts, low=0.45, high=1.0)
    contrast, turn = draws(parts, low=0.35, high=0.8), draws(parts, low=-0.16, high=0.16)
    contrast[:, :grounds] *= 0.5
    saturation[:, :grounds] *= 0.75
    value[:, EYE] = torch.where(value[:, EYE] < 0.75, 0.08, 1.0)
    saturation[:, EYE] = 0.1
    dark = torch.where(value > 0.7, value * (1 - contrast), (value + contrast).clamp(max=1.0))
    first, second = _rgb(traits.hue, saturation, value), _rgb(traits.hue + turn, saturation * 0.8, dark)

    frequency, angle = draws(parts, low=4.0, high=10.0), draws(parts, high=math.pi)
    phase = draws(2, parts)
    along, across = (
        (frequency * angle.cos(), frequency * angle.sin()),
        (-frequency * angle.sin(), frequency * angle.cos()),
    )
    share = torch.zeros(*traits.kind.shape, *x.shape)
    for kind, texture in enumerate(_SHARES):
        here = traits.kind == kind
        turns = [
            [value[here][:, None, None] for value in (*line, offset)]
            for line, offset in zip((along, across), phase.unbind(1))
        ]
        share[here] = texture(*(a * x + b * y + c for a, b, c in turns)).clamp(0, 1)
    return _Texture(first, second, share)


def _wave(turns: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * turns)


# the share of the second colour in each of TEXTURES, from the periods along and across
_SHARES = (
    lambda along, across: torch.zeros_like(along),
    lambda along, across: 0.5 + 1.6 * _wave(along),
    lambda along, across: 3 * _wave(along) * _wave(across) - 0.6,
    lambda along, across: 0.5 + along / 8,
    lambda along, across: (
        0.5 + 0.35 * (_wave(0.6 * along + 0.24 * _wave(across)) + _wave(0.5 * across + 0.24 * _wave(along)))
    ),
)


def _background(
    draws: _Draws, traits: _Traits, texture: _Texture, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Image [B, 3, S, S] and labels [B, S, S] of the regions behind the creatures."""
    fish, place = (traits.plan == 2)[:, None, None], traits.place[:, None, None]
    height, wave, phase = (
        draws(1, 1, low=0.3, high=0.62),
        draws(1, 1, low=0.0, high=0.05),
        draws(1, 1, high=6.28),
    )
    horizon = height + wave * torch.sin(x * draws(1, 1, low=3.0, high=9.0) + phase)
    shore = horizon + draws(1, 1, low=0.1, high=0.25) + 0.03 * torch.sin(7 * x + phase)
    bed = 0.72 + 0.22 * draws(1, 1) + 0.04 * torch.sin(5 * x + phase)
    below = torch.where((place == 1) & (y < shore), WATER, GROUND)
    land = torch.where(y < horizon, SKY, below)
    sea = torch.where((y > bed) & (place > 0), GROUND, WATER)
    labels = torch.where(fish, sea, land)

    crown, trees = draws(6, 3), (traits.place == 2)[:, None, None]
    radius = 0.1 + 0.13 * crown[..., 2]
    stem = torch.where(fish[..., 0], bed.mean((1, 2))[:, None] * 1.1, horizon.mean((1, 2))[:, None])
    for tree in range(crown.shape[1]):
        cx, cy, r = (
            crown[:, tree, 0, None, None],
            stem[:, :, None] - 0.14 * crown[:, tree, 1, None, None],
            radius[:, tree, None, None],
        )
        squeeze = torch.where(fish, 3.2, 1.0)  # weeds are narrow and high
        inside = ((x - cx) * squeeze).square() + (
            (y - cy) / torch.where(fish, 2.2, 1.0)
        ).square() < r.square()
        labels = torch.where(inside & trees, FOLIAGE, labels)
    return texture.at(labels), labels


def _paint(
    image: Tensor, labels: Tensor, texture: _Texture, cones: Tensor, part: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Paint the cones over the background, back to front.

    A pixel has the label of the last cone that covers half of it.
    """
    size = x.shape[0]
    for cone in range(cones.shape[1]):
        rows = (cones[:, cone, 4] > 0).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        ax, ay, bx, by, ra, rb = cones[rows, cone, :, None, None].unbind(1)
        dx, dy = bx - ax, by - ay
        along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy).clamp(min=1e-9)).clamp(0, 1)
        distance = torch.hypot(x - ax - along * dx, y - ay - along * dy) - (ra + along * (rb - ra))
        cover = (0.5 - distance * size).clamp(0, 1)
        label = part[rows, cone]
        image[rows] = torch.lerp(image[rows], texture.of(rows, label), cover.unsqueeze(1))
        labels[rows] = torch.where(cover >= 0.5, label[:, None, None], labels[rows])
    return image, labels


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """[..., 3] from hue, saturation and value, all in [0, 1]; the hue is periodic."""
    shift = torch.tensor([5.0, 3.0, 1.0])
    k = (shift + hue.unsqueeze(-1) * 6) % 6
    return value.unsqueeze(-1) * (1 - saturation.unsqueeze(-1) * torch.minimum(k, 4 - k).clamp(0, 1))


def _captions(draws: _Draws, traits: _Traits) -> list[str]:
    """Describe the scenes. Half of the captions omit the colour, half the texture, and a third the place."""
    chance = draws(3).tolist()
    captions = []
    for row, (plan, count, place) in enumerate(
        zip(traits.plan.tolist(), traits.count.tolist(), traits.place.tolist())
    ):
        colour = (
            COLOURS[round(float(traits.hue[row, BODY]) * len(COLOURS)) % len(COLOURS)]
            if chance[row][0] < 0.5
            else ""
        )
        texture = TEXTURES[int(traits.kind[row, BODY])] if chance[row][1] < 0.5 else ""
        noun = PLANS[plan] + ("s" if count > 1 and PLANS[plan] != "fish" else "")
        where = _PLACES[plan][place] if chance[row][2] < 0.67 else ""
        captions.append(
            " ".join(word for word in ("a photo of", COUNTS[count - 1], texture, colour, noun, where) if word)
        )
    return captions
