"""Reports of leakage and of the ablation as text tables, for `leakage` and `demo`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._shared import COMPARED

TITLES = {
    "part_agreement": "matches in the right part",
    "token_agreement": "  counting every token alike",
    "own_part_mass": "object attention in its own part",
    "object_background_leakage": "object attention on background",
    "cross_region_mass": "object attention outside its part",
    "layout_iou": "layout kept (part IoU)",
    "colour_error": "colour error of the parts",
}
COUNTS = {
    "leaking_pairs": "leaking pairs ↓",
    "leaking_pairs_improved": "  leak with the first, now less ↑",
}
SUMMARISED = (
    "part_agreement",
    "own_part_mass",
    "object_background_leakage",
    "leaking_pairs",
    "leaking_pairs_improved",
    "layout_iou",
    "colour_error",
)
BETTER = {  # +1: more is better; -1: less is better
    "part_agreement": 1,
    "token_agreement": 1,
    "own_part_mass": 1,
    "object_background_leakage": -1,
    "cross_region_mass": -1,
    "layout_iou": 1,
    "colour_error": -1,
}
TITLE_WIDTH, WIDTH, VERDICT_WIDTH = 35, 25, 34
LEGEND = "↑ more is better, ↓ less is better"
NOTED = (("untouched", "colour_error"), ("untouched", "layout_iou"), ("appearance", "layout_iou"))


def leakage_table(report: Mapping[str, Any]) -> str:
    """The report of `evaluation.leakage`: figures of every method, and differences from the first."""
    methods, settings = report["methods"], report["settings"]
    baseline = next(iter(methods))
    mean = "mean [95 % interval, pairs resampled]" if report["pairs"] > 1 else "one pair has no interval"
    run = f"{report['pairs']} held-out pairs, {settings['steps']} steps, seed {settings['seed']}"
    lines = [f"{run}; {mean}", LEGEND, "", row("", map(_name, methods))]
    for figure in TITLES:
        cells = [cell(method[figure], method["intervals"][figure]) for method in methods.values()]
        lines.append(row(title(figure), cells))
    ratios = [cell(each["colour_ratio"], each["intervals"]["colour_ratio"]) for each in methods.values()]
    lines.append(row("  relative to untouched structure", ratios))
    leaking = [_pairs(each["leaking_pairs"], report["pairs"]) for each in methods.values()]
    lines.append(row(f"leaking pairs (above {settings['threshold']:g}) ↓", leaking))
    of_baseline = methods[baseline]["leaking_pairs"]
    improved = [_pairs(each.get("leaking_pairs_improved"), of_baseline) for each in methods.values()]
    lines.append(row(f"  leak with {_name(baseline)}, now less ↑", improved))
    lines += [*_best_layers(methods), ""]
    if report["differences"]:
        lines += [*_differences(report["differences"], _name(baseline)), ""]
    return "\n".join([*lines, _references(report)])


def _differences(differences: Mapping[str, Any], baseline: str) -> list[str]:
    """The difference of each method from the baseline by figure, as better or worse."""
    lines = [row(f"difference from {baseline}", map(_name, differences), VERDICT_WIDTH)]
    for figure in TITLES:
        cells = [_verdict(figure, **other[figure]) for other in differences.values()]
        lines.append(row(title(figure), cells, VERDICT_WIDTH))
    return lines


def _verdict(figure: str, value: float | None, interval: Sequence[float] | None) -> str:
    """A difference, and "better" or "worse" where its interval does not contain zero."""
    words = "unclear"
    if value is None or interval is None:
        words = ""
    elif min(interval) > 0 or max(interval) < 0:
        words = "better" if value * BETTER[figure] > 0 else "worse"
    return f"{cell(value, interval, sign='+')} {words:<7}"


def _best_layers(methods: Mapping[str, Any]) -> list[str]:
    from ..context.layers import short_name

    best = [_best(method["by_layer_and_step"]) for method in methods.values()]
    return [
        row("right matches in the best layer ↑", [f"{agreement:.3f}" for _, agreement in best]),
        row("  the best layer", [short_name(layer) for layer, _ in best]),
    ]


def _references(report: Mapping[str, Any]) -> str:
    """What the picture figures are to be compared with."""
    error, layout, chance = (report[name][figure]["value"] for name, figure in NOTED)
    return (
        f"for comparison: the untouched structure has colour error {error:.3f} and part IoU {layout:.3f};\n"
        f"the appearance picture has part IoU {chance:.3f} with the structure's layout"
    )


def ablation_table(report: Mapping[str, Any]) -> str:
    """The report of `evaluation.ablation` in three tables: matches, attention, pictures."""
    from ..context.layers import short_name
    from ..evaluation.ablation import ATTENTION, NOISE

    levels = ", ".join(f"{level:g}" for level in NOISE)
    probed = f"{report['pairs']} pairs, one pass without edits at noise levels {levels}"
    heads = ["right part ↑", "matched keys U/N", "in the best layer ↑", "best layer"]
    lines = [LEGEND, "", f"matches, {probed}", row("", heads)]
    for name, entry in report["matches"].items():
        best = [f"{entry['best_layer_agreement']:.3f}", short_name(entry["best_layer"])]
        lines.append(row(name, [cell(**entry["part_agreement"]), f"{entry['matched_fraction']:.2f}", *best]))
    heads = ["in its own part ↑", "on background ↓", "outside its part ↓"]
    lines += ["", f"object attention, {probed}", row("", heads)]
    for name, entry in {"self_attention": report["self_attention"], **report["refinements"]}.items():
        lines.append(row(_name(name), [cell(**entry[figure]) for figure in ATTENTION]))
    heads = ["colour error ratio ↓", "layout kept ↑", "outside its part ↓", "leaking pairs, now less"]
    lines += ["", f"pictures, {report['transfers']['pairs']} pairs", row("", heads)]
    for name, entry in report["refinements"].items():
        picture, intervals = entry["picture"], entry["picture"]["intervals"]
        cells = [
            cell(picture[figure], intervals[figure])
            for figure in ("colour_ratio", "layout_iou", "cross_region_mass")
        ]
        leaking = f"{picture['leaking_pairs']}, {picture.get('leaking_pairs_improved', '-')}"
        lines.append(row(_name(name), [*cells, leaking]))
    return "\n".join(lines)


def summary_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The main figures of leakage reports side by side, by the title of each report."""
    columns = [(name, entry) for report in reports.values() for name, entry in report["methods"].items()]
    heads = "".join(f"{head:>{12 * len(report['methods'])}}" for head, report in reports.items())
    lines = [
        f"{'attention leakage':<{TITLE_WIDTH}}{heads}",
        row("", [_name(name) for name, _ in columns], 12),
    ]
    for figure in SUMMARISED:
        lines.append(row(title(figure), [_number(entry.get(figure)) for _, entry in columns], 12))
    return "\n".join([*lines, LEGEND])


def _number(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def title(figure: str) -> str:
    """The title of a figure, with an arrow towards better values."""
    if figure in COUNTS:
        return COUNTS[figure]
    return f"{TITLES[figure]} {'↑' if BETTER[figure] > 0 else '↓'}"


def row(title: str, cells: Iterable[str], width: int = WIDTH) -> str:
    return (f"{title:<{TITLE_WIDTH}}" + "".join(f" {cell:>{width - 1}}" for cell in cells)).rstrip()


def cell(value: float | None, interval: Sequence[float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    if interval is None:
        return f"{value:{sign}.3f}"
    low, high = interval
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _name(name: str) -> str:
    """A method's title, or the name of a variant as it is."""
    return COMPARED.get(name, name)


def _pairs(count: int | None, of: int) -> str:
    return "-" if count is None else f"{count} of {of} ({count / max(of, 1):.1%})"


def _best(table: Mapping[str, Any]) -> tuple[str, float]:
    """The layer with the most matches in the right part, averaged over its steps, and this average."""
    means = {
        layer: sum(x or 0 for x in steps) / len(steps)
        for layer, steps in zip(table["layers"], table["part_agreement"])
    }
    return max(means.items(), key=lambda item: item[1])
