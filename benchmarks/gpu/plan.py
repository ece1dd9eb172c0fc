"""What is measured: groups of ops and providers on the same inputs, the most important group first."""

from collections.abc import Iterable
from typing import NamedTuple

from qalign_kernels.bench.ops import OPS

from ..suite.providers import CHANNEL_PEERS, EAGER_SDPA, FLEX_FLASH, FLEX_OPS, MAIN_OPS
from ..suite.shapes import CONTIGUOUS, PROCESSOR, SHAPES, Shape, layouts, shape_named
from .must_show import DEFAULT, LINES, OURS, Visit

FRACTIONS = (0.35, 0.55, 0.63, 1.0)
DATA_OPS = ("qalign_attention", "attention_counts")  # ops whose time depends on U/N
YARDSTICKS: tuple[Visit, ...] = tuple(
    ("attention", name) for name in ("sdpa", "sdpa cudnn", "sdpa flash", "fa3", "flex", "sageattention")
)
COMPILED = (OURS, "flex", FLEX_FLASH, "flash_kmeans")
MATCHED_BY_PEERS = ("similarity_argmax", "similarity_argmax_per_head")


CORE_SHAPES = ("sdxl", "flux", "sd15-512px", "sd15-low")
CORE_OPS = (
    "qalign_attention",
    "similarity_argmax",
    "attention_counts",
    "attention",
    "attention_contrast",
    "similarity_argmax_per_head",
    "similarity_argmax_packed",
    "similarity_topk",
)


class Group(NamedTuple):
    """Visits on one set of inputs.

    Attributes:
        asked_fraction: the U/N of the data; None where matches are by chance.
        layout: one of `shapes.LAYOUTS`.
    """

    shape: Shape
    asked_fraction: float | None
    visits: tuple[Visit, ...]
    layout: str = PROCESSOR

    @property
    def name(self) -> str:
        fraction = "by chance" if self.asked_fraction is None else self.asked_fraction
        layout = "" if self.layout == PROCESSOR else f" {self.layout}"
        return f"{self.shape.size} U/N {fraction}{layout}"


def core_groups() -> list[Group]:
    """List the ops that Q-Align runs at its most expensive layers, beside the fastest SDPA of torch."""
    groups = []
    for shape in core_shapes():
        visits = (*DEFAULT, ("attention", "sdpa cudnn"), *((op, OURS) for op in CORE_OPS))
        groups.append(Group(shape, FRACTIONS[1], visits))
    return groups


def core_shapes() -> list[Shape]:
    """Look up CORE_SHAPES, in their order."""
    return [shape_named(name) for name in CORE_SHAPES]


def must_show_groups() -> list[Group]:
    """List the visits that the lines of the table need."""
    visits: dict[tuple[Shape, float], dict[Visit, None]] = {}
    for line in LINES:
        wanted = visits.setdefault((line.shape, line.asked_fraction), dict.fromkeys(DEFAULT))
        peers = [visit for bar in (line.must, *line.goals) for visit in bar.against]
        wanted.update(dict.fromkeys(((line.op, OURS), *peers)))
    return [Group(shape, fraction, tuple(wanted)) for (shape, fraction), wanted in visits.items()]


def other_groups() -> list[Group]:
    """List every op and peer on random data, then Q-Align against U/N.

    Shapes of 4096 tokens come first. Shapes of a sweep have the main ops only.
    """
    groups = []
    for shape in sorted(SHAPES, key=lambda shape: shape.tokens != 4096):
        visits = dict.fromkeys((*DEFAULT, *_every_visit(MAIN_OPS if shape.sweep else _op_names())))
        groups.append(Group(shape, None, tuple(visits)))
        folded = [op for op, provider in visits if provider == OURS and len(layouts(op, shape)) > 1]
        if folded:
            groups.append(Group(shape, None, (*DEFAULT, *((op, OURS) for op in folded)), CONTIGUOUS))
        if not shape.sweep:
            groups += [
                Group(shape, fraction, (*DEFAULT, *((op, OURS) for op in DATA_OPS))) for fraction in FRACTIONS
            ]
    return groups


def _op_names() -> list[str]:
    return [op.name for op in OPS]


def _every_visit(names: Iterable[str]) -> Iterable[Visit]:
    for name in names:
        if name == "qalign_attention_correlated":
            continue  # this plan chooses the data itself
        yield name, OURS
        yield name, "eager"
        if name == "attention":
            yield from YARDSTICKS
        elif name in FLEX_OPS:
            yield name, "flex"
        if name in FLEX_OPS:
            yield name, FLEX_FLASH
        if name == "attention_counts":
            yield from ((name, peer) for peer in CHANNEL_PEERS)
        if name in MATCHED_BY_PEERS:
            yield name, "flash_kmeans"
        if name == "qalign_attention":
            yield name, EAGER_SDPA


def compile_parts() -> list[list[Group]]:
    """List every visit once, in parts for parallel processes.

    Kernels differ by head dim, and hardly by the number of tokens.
    """
    parts: dict[tuple[int, int], list[Group]] = {}
    for shape in SHAPES:
        visits = list(_every_visit(MAIN_OPS if shape.sweep else _op_names()))
        for position, names in enumerate(_thirds([visit for visit in visits if visit[1] in COMPILED])):
            part = parts.setdefault((shape.head_dim, position), [])
            part.append(Group(shape, FRACTIONS[1], tuple(names)))
            folded = tuple((op, provider) for op, provider in names if len(layouts(op, shape)) > 1)
            if folded:
                part.append(Group(shape, FRACTIONS[1], folded, CONTIGUOUS))
    return list(parts.values())


def _thirds(visits: list[Visit]) -> list[list[Visit]]:
    return [visits[start::3] for start in range(3)]
