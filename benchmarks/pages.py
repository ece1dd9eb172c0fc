"""Fill the generated blocks of README.md and docs/ from `benchmarks/results` and the methods of `qalign`.

A block stands between `<!-- generated:NAME -->` and `<!-- end:NAME -->`. Text outside of the blocks stays.
"""

import argparse
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qalign.methods import METHODS
from qalign_kernels._files import Files, replacing
from qalign_kernels.bench.measure import markdown

from . import report
from .static import evidence

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- generated:(\w+) -->\n)(.*?)(<!-- end:\2 -->)", re.DOTALL)
COMPARED = {"cross_image": "Cross-Image", "qalign": "Q-Align (default)", "qalign_warp": "QAlignWarp (ours)"}
FIGURES = {  # of benchmarks/results/leakage.json; the arrow says which way is better
    "part_agreement": "part agreement of the match ↑",
    "token_agreement": "object tokens whose match is in their part ↑",
    "own_part_mass": "object attention in its own part ↑",
    "object_background_leakage": "object attention on background ↓",
    "colour_ratio": "part colour error, relative to the untouched structure ↓",
    "layout_iou": "part IoU with the structure's layout ↑",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a page would change"
    )


def files(options: argparse.Namespace) -> Files:
    return Files(writes=[] if options.check else [("page", page) for page in pages()])


def run(options: argparse.Namespace) -> int:
    stale = [page for page in pages() if filled(page.read_text(encoding="utf-8")) != page.read_text("utf-8")]
    for page in stale:
        if not options.check:
            text = filled(page.read_text(encoding="utf-8"))
            with replacing(page) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        print(f"{'stale' if options.check else 'wrote'}: {page.relative_to(ROOT)}")
    return int(options.check and bool(stale))


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """Replace what stands in the blocks of a page.

    Raises:
        ValueError: a block whose name is not in `BLOCKS`, or without an end.
    """
    for name in re.findall(r"<!-- generated:(\w+) -->", text):
        if name not in BLOCKS or f"<!-- end:{name} -->" not in text:
            raise ValueError(
                f"block: expected one of {', '.join(BLOCKS)} and its <!-- end:NAME -->, got {name!r}"
            )
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[4]}", text)


def results() -> str:
    """Means of the compared methods, and the cost of a layer."""
    found = _leakage()
    methods = _compared(found)
    lines = [
        [title, *(f"{method[figure]:.3f}" for method in methods.values())]
        for figure, title in FIGURES.items()
        if figure != "token_agreement"
    ]
    lines.append(
        ["leaking pairs ↓", *(f"{x['leaking_pairs']} of {found['pairs']}" for x in methods.values())]
    )
    costs = [f"{_card(name).cost:g}" for name in methods]
    lines.append(["most that an edited layer costs, × the self-attention that it replaces", *costs])
    return f"{_table('', methods, lines)}\n\n{_setting(found)}"


def leakage() -> str:
    """Every figure of the compared methods with its interval, and the differences from the first one."""
    found = _leakage()
    methods = _compared(found)
    lines = [
        [title, *(_interval(each[figure], each["intervals"][figure]) for each in methods.values())]
        for figure, title in FIGURES.items()
    ]
    best = [f"{_best_layer(each['by_layer_and_step']):.3f}" for each in methods.values()]
    lines.append(["part agreement in the best layer ↑", *best])
    lines.append(
        ["leaking pairs ↓", *(f"{x['leaking_pairs']} of {found['pairs']}" for x in methods.values())]
    )
    baseline, *others = methods.values()
    improved = [f"{x['leaking_pairs_improved']} of {baseline['leaking_pairs']}" for x in others]
    lines.append([f"of the leaking pairs of {COMPARED[next(iter(methods))]}, improved ↑", "", *improved])
    untouched, chance = found["untouched"]["layout_iou"]["value"], found["appearance"]["layout_iou"]["value"]
    note = (
        f"The untouched structure has part IoU {untouched:.3f}; the appearance's own layout has {chance:.3f}."
    )
    return f"{_table('', methods, lines)}\n\n{_setting(found)} {note}"


def matches() -> str:
    """Which signal finds the right part."""
    lines = [
        [name.replace("_", "-"), f"{each['part_agreement']['value']:.3f}", f"{each['matched_fraction']:.2f}",
         f"{each['best_layer_agreement']:.3f}"]
        for name, each in _ablation()["matches"].items()
    ]  # fmt: skip
    return markdown(("signal", "part agreement", "U/N", "best layer"), lines)


def refinements() -> str:
    """What each refinement attends, and what becomes of the pictures."""
    lines = []
    for name, each in _ablation()["refinements"].items():
        attention = [each[figure]["value"] for figure in ("own_part_mass", "object_background_leakage")]
        picture = [each["picture"][figure] for figure in ("colour_ratio", "layout_iou")]
        lines.append([name, *(f"{value:.3f}" for value in attention + picture)])
    return markdown(("refinement", "own part", "on background", "colour error", "part IoU"), lines)


def methods() -> str:
    """A line for each method, from its card."""
    lines = [
        [f"[`{kind.__name__}`](#{kind.__module__}.{kind.__name__})", f"`{name}`", _paper(_card(name).paper),
         _card(name).edits, _card(name).layers, _card(name).steps, f"{_card(name).cost:g}"]
        for name, kind in METHODS.items()
    ]  # fmt: skip
    return markdown(("class", "`--method`", "paper", "output rows", "layers", "steps", "cost"), lines)


def method_pages() -> str:
    """The docstring of each method."""
    return "\n\n".join(f"::: {kind.__module__}.{kind.__name__}" for kind in METHODS.values())


def own_method() -> str:
    """The example of a method outside the package."""
    return f"```python\n{(ROOT / 'examples' / 'own_method.py').read_text(encoding='utf-8')}```"


def speed() -> str:
    return "\n\n".join(f"### {report.summary(group)}" for group in report.by_device(_measured().times))


def accuracy() -> str:
    return "\n\n".join(evidence.accuracy(validation) for validation in _measured().validations)


def machine_code() -> str:
    return evidence.machine_code(_measured().compiled, json.loads(report.BUDGETS.read_text()))


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__: block
    for block in (
        results,
        leakage,
        matches,
        refinements,
        methods,
        method_pages,
        own_method,
        speed,
        accuracy,
        machine_code,
    )
}


@functools.cache
def _measured() -> report.Results:
    return report.read(sorted(report.RESULTS.glob("*/*.json")))


def _leakage() -> dict[str, Any]:
    return json.loads((report.RESULTS / "leakage.json").read_text())


def _ablation() -> dict[str, Any]:
    return json.loads((report.RESULTS / "ablation.json").read_text())


def _compared(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found["methods"][name] for name in COMPARED}


def _setting(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    return (
        f"Means over {found['pairs']} held-out pairs of the embedded model, {settings['steps']} steps. "
        f"A pair leaks if more than {settings['threshold']:g} of the object's attention leaves its part."
    )


def _table(corner: str, methods: Mapping[str, Any], lines: list[list[str]]) -> str:
    return markdown((corner, *(COMPARED[name] for name in methods)), lines)


def _interval(value: float, interval: list[float] | None) -> str:
    return f"{value:.3f}" if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _best_layer(table: Mapping[str, Any]) -> float:
    """The largest mean over the steps of a layer."""
    return max(sum(value or 0 for value in row) / len(row) for row in table["part_agreement"])


def _card(name: str) -> Any:
    return METHODS[name].card  # type: ignore[attr-defined]


def _paper(text: str) -> str:
    return f"[{text}](https://arxiv.org/abs/{text})" if re.fullmatch(r"\d{4}\.\d{5}", text) else text
