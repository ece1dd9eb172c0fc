"""The shapes of the creatures: each body plan as round cones, from uniform random numbers.

A round cone is a segment with a radius at each end. Lengths are fractions of the picture's side, with the
body at the origin, and y points down.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .parts import BODY, CREST, EYE, FOLIAGE, HEAD, LIMB, MUZZLE, TAIL, WING

Draw = Callable[..., Tensor]  # draw(low=0.0, high=1.0) gives uniform numbers [B, HERD]
# label, then x and y of both ends and both radii; numbers or [B, HERD]
Cone = tuple[int, object, object, object, object, object, object]


def stack(cones: list[Cone]) -> tuple[Tensor, Tensor]:
    """Stack cones as [B, HERD, P, 6], and their labels as [P]."""
    tensors = [
        torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float32) for value in cone[1:]))
        for cone in cones
    ]
    shape = max((values[0].shape for values in tensors), key=len)
    stacked = torch.stack(
        [torch.stack([value.expand(shape) for value in values], -1) for values in tensors], 2
    )
    return stacked, torch.tensor([cone[0] for cone in cones])


def quadruped(draw: Draw) -> list[Cone]:
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


def bird(draw: Draw) -> list[Cone]:
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


def fish(draw: Draw) -> list[Cone]:
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
