"""Measure the attention leakage of Cross-Image, Q-Align and QAlignWarp on held-out scenes with known parts.

The appearance of one scene is transferred to another. The table then says how many matches end in the same
part, how much attention stays in it, how much attention of the object lies on background, how many pairs
leak, and how well layout and colours come out. Intervals are a paired bootstrap over pairs. With
--ablation, the command compares all matching signals and all refinements.

With --json FILE, a run can be stopped. The results of each pair stay in FILE.partial until the report is
complete, and the same command continues from there. --pairs may change in between.

examples:
  python -m qalign leakage --pairs 180 --json leakage.json
  python -m qalign leakage --pairs 24 --refinement topk --topk 4 --layers up
  python -m qalign leakage --pairs 48 --ablation --transfers 12
  accelerate launch --multi_gpu --num_processes 2 -m qalign leakage   (two processes; no GPU is needed)
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalign_kernels._files import is_stream

from ._leakage_tables import ablation_table, leakage_table
from ._shared import (
    ALIGNED,
    READ_BY_REFINEMENT,
    REFINEMENTS,
    Files,
    Reading,
    add_model_arguments,
    count,
    given_files,
    load_pipeline,
    number,
    positive,
    refinement_of,
    say,
    seed,
    write,
)

if TYPE_CHECKING:
    from ..evaluation.leakage import Settings
    from ..evaluation.resuming import KeptResults
    from ..methods import CrossImage

CHOSEN = ("refinement", "aligned", "topk", "strength", "contrast")
NEEDS = ("diffusers", "transformers", "PIL", "accelerate")


def _reads(name: str) -> Reading:
    refinements = READ_BY_REFINEMENT[name]
    return Reading(
        (name,),
        lambda options: refinement_of(options) in refinements,
        f"with --refinement {' or '.join(refinements)}",
    )


READINGS = (
    Reading(("transfers",), lambda options: options.ablation, "with --ablation"),
    Reading(CHOSEN, lambda options: not options.ablation, "without --ablation"),
    _reads("topk"),
    _reads("strength"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measured = parser.add_argument_group("measurement")
    measured.add_argument(
        "--pairs",
        type=count,
        default=180,
        metavar="N",
        help="number of pairs of held-out scenes (default: %(default)s)",
    )
    measured.add_argument(
        "--seed", type=seed, default=0, help="seed of the pairs and of all noise (default: %(default)s)"
    )
    measured.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    measured.add_argument(
        "--threshold",
        type=number,
        metavar="MASS",
        help="a pair leaks if more attention than this leaves its part (default: 0.79)",
    )
    measured.add_argument(
        "--every", type=count, default=3, metavar="N", help="measure every N-th step (default: %(default)s)"
    )
    measured.add_argument(
        "--ablation", action="store_true", help="compare all matching signals and all refinements"
    )
    measured.add_argument(
        "--transfers",
        type=count,
        default=24,
        metavar="N",
        help="number of pairs that --ablation transfers (default: %(default)s)",
    )
    _add_method(parser)
    add_model_arguments(parser)


def _add_method(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("method")
    method.add_argument(
        "--refinement",
        choices=REFINEMENTS,
        help="how attention of qalign uses the alignment (default: rearranged, as in the paper)",
    )
    method.add_argument(
        "--aligned",
        choices=ALIGNED,
        help="the queries that qalign aligns with the appearance's (default: output, as in the paper)",
    )
    method.add_argument("--topk", type=count, metavar="K", help="reference tokens for each query of qalign")
    method.add_argument("--strength", type=number, metavar="TAU", help="weight of the alignment of qalign")
    method.add_argument(
        "--contrast",
        type=positive,
        metavar="C",
        help="contrast of cross_image and qalign; 1 is no contrast (default: 1.67)",
    )
    method.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="self-attention layers: up, names or patterns (default: the method's own)",
    )
    method.add_argument(
        "--steps", type=count, default=20, metavar="N", help="denoising steps (default: %(default)s)"
    )
    method.add_argument(
        "--adain",
        choices=("masked", "whole", "none"),
        default="none",
        help="AdaIN of the latents (default: %(default)s)",
    )


def files(options: argparse.Namespace) -> Files:
    return Files(
        writes=given_files(options, "json"),
        folders=[("--json", partial_of(options.json))] if _is_file(options.json) else [],
    )


def partial_of(report: Path) -> Path:
    """The folder that keeps the results of pairs until the report is complete."""
    return Path(f"{report}.partial")


def _is_file(report: Path | None) -> bool:
    """Whether results can be kept beside the report: not beside a pipe or /dev/stdout."""
    try:
        return report is not None and not is_stream(report)
    except OSError:  # the check of the files says more
        return False


def run(options: argparse.Namespace) -> int:
    from ..evaluation.processes import leave, processes

    methods, settings = compared(options), settings_of(options)
    kept = _kept(options, methods, settings) if _is_file(options.json) else None
    state = processes()
    options.device = options.device or str(state.device)
    pipe = load_pipeline(options)
    pipe.set_progress_bar_config(disable=True)
    try:
        with _progress(state.is_main_process) as progress:
            report, text = _measure(options, pipe, methods, settings=settings, kept=kept, progress=progress)
    except KeyboardInterrupt:
        advice = f"{len(kept)} results are kept in {kept.folder}, the same command continues" if kept else ""
        raise KeyboardInterrupt(advice) from None
    if state.is_main_process:
        say(text)
        if options.json is not None:
            write("figures", json.dumps(report, indent=2) + "\n", options.json)
    leave()
    if kept is not None and state.is_main_process:
        kept.remove()
    return 0


def settings_of(options: argparse.Namespace) -> "Settings":
    from ..evaluation.leakage import Settings

    names = ("steps", "layers", "every", "seed", "threshold")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return Settings(adain=None if options.adain == "none" else options.adain, **given)


def compared(options: argparse.Namespace) -> "dict[str, CrossImage]":
    """The methods to compare: Q-Align with all given settings, Cross-Image with the contrast."""
    from dataclasses import replace

    from ..evaluation.leakage import compared_methods

    methods = compared_methods()
    given = {name: value for name in CHOSEN if (value := getattr(options, name)) is not None}
    if "contrast" in given:
        methods["cross_image"] = replace(methods["cross_image"], contrast=given["contrast"])
    methods["qalign"] = replace(methods["qalign"], **given)
    return methods


def _kept(
    options: argparse.Namespace, methods: "Mapping[str, CrossImage]", settings: "Settings"
) -> "KeptResults":
    """The results that an earlier call of the same settings has left."""
    from qalign_kernels import __version__

    from ..evaluation.resuming import KeptResults

    decisive = {name: value for name, value in asdict(settings).items() if name != "threshold"}
    decisive |= {"model": options.model, "dtype": options.dtype, "version": __version__}
    decisive["methods"] = "ablation" if options.ablation else [repr(method) for method in methods.values()]
    return KeptResults(partial_of(options.json), decisive)


def _measure(
    options: argparse.Namespace, pipe: Any, methods: "Mapping[str, CrossImage]", **common: Any
) -> tuple[dict[str, Any], str]:
    """The report of the measurement, and its tables."""
    from ..evaluation import ablation, leakage

    if options.ablation:
        transfers = min(options.transfers, options.pairs)
        report = ablation.run(pipe, pairs=options.pairs, transfers=transfers, **common)
        return report, ablation_table(report)
    report = leakage.run(pipe, pairs=options.pairs, methods=methods, **common)
    return report, leakage_table(report)


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[Callable[[Iterable], Iterable]]:
    """A progress bar around an iterable. It ends its line after an error too."""
    from tqdm import tqdm

    with contextlib.ExitStack() as bars:
        yield lambda items: bars.enter_context(tqdm(items, unit="pair", disable=not shown))
