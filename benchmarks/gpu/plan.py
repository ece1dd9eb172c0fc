"""What is measured beside each other: groups of ops and providers on the same inputs, in the order in which they matter."""

from collections.abc import Iterable
from typing import NamedTuple

from qalign_kernels.bench.ops import OPS

from ..providers import EAGER_SDPA, FLEX_OPS, MAIN_OPS
from ..shapes import SHAPES, Shape
from .must_show import DEFAULT, LINES, OURS, Visit

FRACTIONS = (0.35, 0.55, 0.63, 1.0)
DATA_OPS = ("qalign_attention", "attention_counts")  # those whose time depends on U/N
YARDSTICKS: tuple[Visit, ...] = tuple(("attention", name) for name in ("sdpa", "sdpa cudnn", "sdpa flash", "fa3", "flex", "sageattention"))
MATCHED_BY_PEERS = ("similarity_argmax", "similarity_argmax_per_head")


class Group(NamedTuple):
    """Visits on one set of inputs; `asked_fraction` is the U/N of the data, None where matches are by chance."""

    shape: Shape
    asked_fraction: float | None
    visits: tuple[Visit, ...]

    @property
    def name(self) -> str:
        return f"{self.shape.size} U/N {'by chance' if self.asked_fraction is None else self.asked_fraction}"


def must_show_groups() -> list[Group]:
    """Everything that a line of the table needs, no more."""
    visits: dict[tuple[Shape, float], dict[Visit, None]] = {}
    for line in LINES:
        wanted = visits.setdefault((line.shape, line.asked_fraction), dict.fromkeys(DEFAULT))
        peers = [visit for bar in (line.must, *line.goals) for visit in bar.against]
        wanted.update(dict.fromkeys(((line.op, OURS), *peers)))
    return [Group(shape, fraction, tuple(wanted)) for (shape, fraction), wanted in visits.items()]


def other_groups() -> list[Group]:
    """Shape by shape, 4096 tokens first: every op and peer on random data (main ops at the shapes of a sweep), then Q-Align against U/N."""
    groups = []
    for shape in sorted(SHAPES, key=lambda shape: shape.tokens != 4096):
        visits = dict.fromkeys((*DEFAULT, *_every_visit(MAIN_OPS if shape.sweep else _op_names())))
        groups.append(Group(shape, None, tuple(visits)))
        if not shape.sweep:
            groups += [Group(shape, fraction, (*DEFAULT, *((op, OURS) for op in DATA_OPS))) for fraction in FRACTIONS]
    return groups


def _op_names() -> list[str]:
    return [op.name for op in OPS]


def _every_visit(names: Iterable[str]) -> Iterable[Visit]:
    for name in names:
        if name == "qalign_attention_correlated":
            continue  # the data are chosen here
        yield name, OURS
        yield name, "eager"
        if name == "attention":
            yield from YARDSTICKS
        elif name in FLEX_OPS:
            yield name, "flex"
        if name in MATCHED_BY_PEERS:
            yield name, "flash_kmeans"
        if name == "qalign_attention":
            yield name, EAGER_SDPA


def compile_parts() -> list[list[Group]]:
    """Every visit once, in parts for processes beside each other: kernels differ by head dim, hardly by the number of tokens."""
    parts: dict[tuple[int, int], list[Group]] = {}
    for shape in SHAPES:
        visits = list(_every_visit(MAIN_OPS if shape.sweep else _op_names()))
        for position, names in enumerate(_thirds([visit for visit in visits if visit[1] in (OURS, "flex", "flash_kmeans")])):
            parts.setdefault((shape.head_dim, position), []).append(Group(shape, FRACTIONS[1], tuple(names)))
    return list(parts.values())


def _thirds(visits: list[Visit]) -> list[list[Visit]]:
    return [visits[start::3] for start in range(3)]
