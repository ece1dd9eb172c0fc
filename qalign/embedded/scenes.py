"""Procedural pictures of creatures whose parts are known exactly: what the embedded model is trained on, and what leakage is measured on.

A picture is a function of its seed alone: a layout of round cones (segments with a radius at each end), painted back to front with an
antialiased edge, each in the texture of the part that it belongs to. Training seeds are even and held-out seeds are odd.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BACKGROUNDS = ("sky", "ground", "water", "foliage")
OBJECT_PARTS = ("body", "head", "limb", "tail", "crest", "wing", "muzzle", "eye")
PARTS = BACKGROUNDS + OBJECT_PARTS  # a label is an index into this
PLANS = ("quadruped", "bird", "fish")
TEXTURES = ("plain", "striped", "spotted", "shaded", "mottled")
# how often each texture is drawn, in tenths: shapes are easier to tell where most surfaces are quiet
_BACKGROUND_OF_TEN, _OBJECT_OF_TEN = (4, 0, 1, 3, 2), (4, 2, 1, 2, 1)
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
COUNTS = ("a", "two", "three", "four")
HERD = 4  # at most so many individuals
SKY, GROUND, WATER, FOLIAGE, BODY, HEAD, LIMB, TAIL, CREST, WING, MUZZLE, EYE = range(len(PARTS))
_PAIR_STRIDE = 64
_PLACES = (
    ("on the ground", "by the water", "in the forest"),
    ("on a branch", "on a branch by the water", "on a branch in the forest"),
    ("in the water", "in the water above the ground", "in the water among weeds"),
)
# how often each label takes its own colours; otherwise the body's
_OWN_COLOUR = (1.0, 1.0, 1.0, 1.0, 1.0, 0.85, 0.8, 0.85, 0.9, 0.9, 0.9, 1.0)
_HUES = (0.58, 0.12, 0.53, 0.33)  # of the backgrounds, give or take a little
_CELLS = torch.tensor([[[0.5, 0.5]] * 4, [[0.29, 0.48], [0.71, 0.52]] * 2, [[0.28, 0.27], [0.73, 0.32], [0.5, 0.74], [0.5, 0.5]],
                       [[0.27, 0.27], [0.74, 0.28], [0.26, 0.74], [0.73, 0.73]]])  # fmt: skip
_SCALES = (1.08, 0.74, 0.66, 0.62)


@dataclass(frozen=True, eq=False)
class Scenes:
    """Rendered scenes.

    Attributes:
        image: float32 [B, 3, S, S] in [0, 1].
        labels: int64 [B, S, S], indices into `PARTS`; individuals of a herd share them.
        plans: the body plan of each scene, one of `PLANS`.
        captions: what each scene shows, in words.
    """

    image: Tensor
    labels: Tensor
    plans: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class ScenePair:
    """Two held-out scenes, by their seeds."""

    appearance: int
    structure: int


def training_seed(index: int) -> int:
    """The seed of a scene that a model may be trained on."""
    return 2 * index


def held_out_seed(index: int) -> int:
    """The seed of a scene that no model is trained on."""
    return 2 * index + 1


def held_out_pairs(count: int, seed: int = 0) -> list[ScenePair]:
    """Pairs of held-out scenes: two of three share the body plan, the third does not. The first pairs do not depend on `count`."""
    return [
        _pair(seed * 1_000_000 + number * _PAIR_STRIDE, same_plan=number % 3 != 2) for number in range(count)
    ]


def token_labels(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The label that most pixels of each token's cell have (the lowest on ties): [B, S, S] to int32 [B, h·w]."""
    share = F.adaptive_avg_pool2d(F.one_hot(labels, len(PARTS)).permute(0, 3, 1, 2).float(), grid)
    return share.flatten(2).argmax(1).int()


def render(seeds: Sequence[int], size: int = 128) -> Scenes:
    """Draw the scenes of `seeds` as pictures of `size` pixels.

    Raises:
        ValueError: no seed, a negative one, or a size below 8.
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
    """Uniform numbers [B, K], handed out in order."""

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
    place: Tensor  # [B], 0..2: the second adds water or ground, the third foliage
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
    """Indices drawn as often as `shares` says."""
    return torch.arange(len(shares)).repeat_interleave(torch.tensor(shares))[_choice(uniform, sum(shares))]


def _choice(uniform: Tensor, count: int) -> Tensor:
    return (uniform * count).long().clamp(max=count - 1)


def _layout(draws: _Draws, traits: _Traits) -> tuple[Tensor, Tensor]:
    """Round cones [B, P, 6] (ax, ay, bx, by, ra, rb; absent: negative radii) and their labels [B, P], back to front."""
    plans = [_stack(plan(functools.partial(draws, HERD))) for plan in (_quadruped, _bird, _fish)]
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


Cone = tuple[int, object, object, object, object, object, object]  # label, a, b, radii; numbers or [B, HERD]


def _stack(cones: list[Cone]) -> tuple[Tensor, Tensor]:
    """[B, HERD, P, 6] and the labels [P]."""
    tensors = [
        torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float32) for value in cone[1:]))
        for cone in cones
    ]
    shape = max((values[0].shape for values in tensors), key=len)
    stacked = torch.stack(
        [torch.stack([value.expand(shape) for value in values], -1) for values in tensors], 2
    )
    return stacked, torch.tensor([cone[0] for cone in cones])


def _quadruped(draw) -> list[Cone]:
    rear, front = draw(low=0.11, high=0.17), draw(low=0.11, high=0.17)
    leg, thick = draw(low=0.2, high=0.34), draw(low=0.042, high=0.06)
    neck, lift = draw(low=0.1, high=0.26), draw(low=0.2, high=1.25)
    hx, hy = 0.2 + neck * lift.cos(), -0.05 - neck * lift.sin()
    nod, jaw = draw(low=-0.2, high=0.7), draw(low=0.1, high=0.19)
    mx, my = hx + 0.05 + jaw * nod.cos(), hy + jaw * nod.sin()
    wag, length = draw(low=-0.5, high=1.4), draw(low=0.18, high=0.34)
    ear = draw(low=0.09, high=0.18)
    mane = draw(low=0.035, high=0.06)
    swing = [draw(low=-0.45, high=0.45) for _ in range(4)]

    def limb(hip: float, angle: Tensor) -> Cone:
        return LIMB, hip, 0.06, hip + leg * angle.sin(), 0.06 + leg * angle.cos(), thick * 1.15, thick * 0.9

    return [
        limb(-0.13, swing[0]),
        limb(0.14, swing[1]),
        (
            TAIL,
            -0.2 - rear * 0.7,
            -0.05,
            -0.2 - rear * 0.7 - length * wag.cos(),
            -0.05 + length * wag.sin(),
            0.03,
            0.05,
        ),
        (BODY, 0.17, -0.03, hx, hy, front * 0.75, 0.07),
        (BODY, -0.19, 0.0, 0.19, 0.0, rear, front),
        limb(-0.21, swing[2]),
        limb(0.22, swing[3]),
        (CREST, 0.12, -front * 0.95, hx - 0.06, hy - 0.05, mane, mane),
        (CREST, hx - 0.03, hy - 0.04, hx - 0.07, hy - 0.04 - ear, 0.035, 0.02),
        (HEAD, hx, hy, hx + 0.06, hy + 0.02, 0.095, 0.085),
        (MUZZLE, hx + 0.09, hy + 0.04, mx, my + 0.04, 0.06, 0.045),
        (EYE, hx + 0.05, hy - 0.03, hx + 0.05, hy - 0.03, 0.024, 0.024),
    ]


def _bird(draw) -> list[Cone]:
    plump, lean = draw(low=0.12, high=0.17), draw(low=-0.05, high=0.14)
    rise, reach = draw(low=0.17, high=0.26), draw(low=0.12, high=0.24)
    hx, hy = reach, -rise
    beak, nod = draw(low=0.1, high=0.22), draw(low=-0.3, high=0.5)
    fan, droop = draw(low=0.2, high=0.36), draw(low=-0.2, high=0.8)
    tip, flap = draw(low=0.22, high=0.36), draw(low=-0.9, high=0.5)
    plume, curl = draw(low=0.08, high=0.2), draw(low=1.2, high=2.6)
    stand, slope = draw(low=0.28, high=0.36), draw(low=-0.05, high=0.05)
    return [
        (FOLIAGE, -0.75, stand - slope, 0.75, stand + slope, 0.045, 0.04),
        (TAIL, -0.16, 0.08, -0.16 - fan * droop.cos(), 0.08 + fan * droop.sin(), 0.045, 0.075),
        (LIMB, -0.04, 0.1, -0.05, stand - 0.02, 0.04, 0.03),
        (LIMB, 0.06, 0.1, 0.07, stand - 0.02, 0.04, 0.03),
        (CREST, hx - 0.03, hy - 0.05, hx + plume * curl.cos(), hy - 0.05 - plume * curl.sin(), 0.045, 0.03),
        (BODY, -0.12, 0.04 + lean / 2, 0.1, -0.04 - lean / 2, plump * 0.85, plump),
        (BODY, 0.1, -0.04, hx, hy, plump * 0.75, 0.07),
        (WING, 0.04, -0.03, 0.04 - tip * flap.cos(), 0.0 + tip * flap.sin(), 0.085, 0.035),
        (
            MUZZLE,
            hx + 0.05,
            hy + 0.01,
            hx + 0.05 + beak * nod.cos(),
            hy + 0.01 + beak * nod.sin(),
            0.05,
            0.015,
        ),
        (HEAD, hx, hy, hx + 0.02, hy, 0.1, 0.09),
        (EYE, hx + 0.035, hy - 0.025, hx + 0.035, hy - 0.025, 0.026, 0.026),
    ]


def _fish(draw) -> list[Cone]:
    deep, slim = draw(low=0.13, high=0.2), draw(low=0.05, high=0.08)
    fork, spread = draw(low=0.12, high=0.22), draw(low=0.06, high=0.16)
    sail, back = draw(low=0.05, high=0.13), draw(low=-0.2, high=-0.05)
    fin, sweep = draw(low=0.12, high=0.24), draw(low=0.3, high=1.3)
    snout, anal = draw(low=0.05, high=0.12), draw(low=0.05, high=0.14)
    return [
        (CREST, back, -deep * 0.6, back + 0.04, -deep * 0.75 - sail, 0.05, 0.03),
        (CREST, 0.08, -deep * 0.75, back + 0.04, -deep * 0.75 - sail, 0.05, 0.03),
        (LIMB, -0.1, deep * 0.5, -0.18, deep * 0.6 + anal, 0.05, 0.035),
        (TAIL, -0.27, 0.0, -0.28 - fork, -spread, 0.045, 0.05),
        (TAIL, -0.27, 0.0, -0.28 - fork, spread, 0.045, 0.05),
        (BODY, -0.25, 0.0, 0.06, 0.0, slim, deep),
        (MUZZLE, 0.26, 0.015, 0.29 + snout, 0.02, 0.07, 0.04),
        (HEAD, 0.2, 0.0, 0.25, 0.01, deep * 0.85, deep * 0.6),
        (LIMB, 0.06, 0.03, 0.06 - fin * sweep.cos(), 0.03 + fin * sweep.sin(), 0.045, 0.055),
        (EYE, 0.25, -0.04, 0.25, -0.04, 0.027, 0.027),
    ]


@dataclass(frozen=True, eq=False)
class _Texture:
    """Two colours [B, parts, 3] for each label and, at each pixel, the share of the second [B, parts, S, S]."""

    first: Tensor
    second: Tensor
    share: Tensor

    def of(self, rows: Tensor, label: Tensor) -> Tensor:
        """The picture [R, 3, S, S] of one label in each of some rows."""
        first, second = self.first[rows, label, :, None, None], self.second[rows, label, :, None, None]
        return torch.lerp(first, second, self.share[rows, label].unsqueeze(1))

    def at(self, labels: Tensor) -> Tensor:
        """The picture [B, 3, S, S] of a label at each pixel."""
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


# the share of the second colour in each of TEXTURES, from periods along and across
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
    """The cones over the background, back to front; a pixel has the label of the last cone that covers half of it."""
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
    """In words; every second picture says nothing of colour, every second nothing of texture, every third nothing of the place."""
    told = draws(3).tolist()
    captions = []
    for row, (plan, count, place) in enumerate(
        zip(traits.plan.tolist(), traits.count.tolist(), traits.place.tolist())
    ):
        colour = (
            COLOURS[round(float(traits.hue[row, BODY]) * len(COLOURS)) % len(COLOURS)]
            if told[row][0] < 0.5
            else ""
        )
        texture = TEXTURES[int(traits.kind[row, BODY])] if told[row][1] < 0.5 else ""
        noun = PLANS[plan] + ("s" if count > 1 and PLANS[plan] != "fish" else "")
        where = _PLACES[plan][place] if told[row][2] < 0.67 else ""
        captions.append(
            " ".join(word for word in ("a photo of", COUNTS[count - 1], texture, colour, noun, where) if word)
        )
    return captions
