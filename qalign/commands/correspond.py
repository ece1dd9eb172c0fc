"""Show which tokens of two pictures match, by query-query similarity (Q-Align) and by query-key similarity (Cross-Image).

Writes correspondences.png, lines between the pictures, and heat_maps.png, where given points look. With --scenes the pictures are two
held-out scenes whose parts are known: lines are then green where they end in their own part, and the shares are printed.

examples:
  python -m qalign correspond --scenes 0 --out matches
  python -m qalign correspond --structure b.png --appearance a.png --size 128 --point 40,64 --point 90,30 --out matches
  python -m qalign correspond --model ./stable-diffusion-v1-5 --size 512 --layer up_blocks.2 --noise 0.25 --prompt "a photo of a horse" \\
      --structure horse.jpg --appearance zebra.jpg --out matches
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ._shared import (
    Files,
    Reading,
    add_model_arguments,
    count,
    given_files,
    load_pipeline,
    number,
    read_pictures,
    require_pair,
    say,
    seed,
    size,
    write,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..evaluation.correspondence import Capture

NEEDS = ("diffusers", "transformers", "PIL", "matplotlib")
READINGS = (Reading(("size",), lambda options: options.scenes is None, "without --scenes"),)
SIDE = 16  # of the token grid that is shown where no layer is named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--structure", type=Path, metavar="B.png", help="where the lines begin")
    pictures.add_argument("--appearance", type=Path, metavar="A.png", help="where they end")
    pictures.add_argument("--scenes", type=seed, metavar="SEED", help="two held-out scenes in place of --structure and --appearance")
    pictures.add_argument("--size", type=size, metavar="S|WxH", help="scale and crop both pictures to this, multiples of 8 (default: their own)")
    pictures.add_argument("--out", type=Path, default=Path("correspond_out"), metavar="DIR", help="where to (default: %(default)s)")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--point", type=point, action="append", metavar="X,Y", help="in pixels of the structure, for the heat maps; repeatable")
    shown.add_argument("--lines", type=count, default=80, metavar="N", help="at most so many (default: %(default)s)")
    shown.add_argument("--layer", metavar="NAME", help=f"a self-attention layer or pattern (default: of the decoder, nearest {SIDE}x{SIDE} tokens)")
    shown.add_argument("--noise", type=number, default=0.3, metavar="F", help="timestep as a fraction of those of training (default: %(default)s)")
    shown.add_argument("--prompt", default="", help="what the pictures show")
    shown.add_argument("--seed", type=seed, default=0, help="of the noise (default: %(default)s)")
    add_model_arguments(parser)


def point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a point such as 40,64, got {text!r}") from None
    return x, y


def files(options: argparse.Namespace) -> Files:
    writes = [("--out", options.out / name) for name in ("correspondences.png", "heat_maps.png")]
    return Files(reads=given_files(options, "appearance", "structure"), writes=writes)


def run(options: argparse.Namespace) -> int:
    given = require_pair(options)
    if not 0 < options.noise < 1:
        raise ValueError(f"--noise: expected a fraction between 0 and 1, got {options.noise:g}")
    import torch

    from ..context.layers import picture_size
    from ..evaluation.correspondence import compare
    from ..pipelines.pictures import to_tensors

    labels, prompt = None, options.prompt
    if given:
        structure, appearance = to_tensors(read_pictures([options.structure, options.appearance], options.size), "pictures")
        pipe = load_pipeline(options)
    else:
        pipe = load_pipeline(options)
        structure, appearance, labels, caption = held_out_scenes(options.scenes, picture_size(pipe))
        prompt = prompt or caption
    height, width = structure.shape[1:]
    for x, y in options.point or ():
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"--point: expected pixels inside {width}x{height}, got {x:g},{y:g}")
    captures = compare(pipe, structure, appearance, prompt, noise=options.noise, layers=options.layer, seed=options.seed)
    shown = captures[0] if options.layer else choose(captures)
    lines, shares = draw_lines(shown, structure, appearance, labels, most=options.lines)
    for signal, share in shares.items():
        say(f"{signal}: {share:.1%} of the object's tokens are matched to their own part in {shown.layer}")
    points = torch.tensor(options.point) if options.point else default_points(shown, structure, labels)
    write("correspondences", lines, options.out / "correspondences.png")
    write("heat maps", draw_heat_maps(shown, structure, appearance, points, labels), options.out / "heat_maps.png")
    return 0


def held_out_scenes(seed: int, size: int) -> "tuple[Tensor, Tensor, tuple[Tensor, Tensor], str]":
    """Structure and appearance [3, size, size], their labels, and a prompt."""
    from ..embedded.scenes import held_out_pairs, render

    pair = held_out_pairs(1, seed)[0]
    scenes = render([pair.structure, pair.appearance], size)
    return scenes.image[0], scenes.image[1], (scenes.labels[0], scenes.labels[1]), f"a photo of a {scenes.plans[0]}"


def choose(captures: "Sequence[Capture]") -> "Capture":
    """The layer whose tokens are nearest to SIDE x SIDE, the last of several."""
    return min(reversed(captures), key=lambda capture: abs(capture.query.shape[2] - SIDE * SIDE))


def draw_lines(
    capture: "Capture", structure: "Tensor", appearance: "Tensor", labels: "tuple[Tensor, Tensor] | None", *, most: int = 80
) -> "tuple[Figure, dict[str, float]]":
    """Lines between two pictures by both signals; with labels, those of objects' tokens, and which share of these is right."""
    import torch

    from ..context.layers import short_name, token_grid
    from ..evaluation.correspondence import SIGNALS, token_centres
    from ..evaluation.plots import MatchPanel, correspondence

    size = (structure.shape[1], structure.shape[2])
    grid = token_grid(size, capture.query.shape[2])
    centres = token_centres(size, grid)
    judged, of_structure, of_appearance = torch.ones(len(centres), dtype=torch.bool), None, None
    if labels is not None:
        of_structure, of_appearance, judged = _judged(labels, grid)
    kept = judged.nonzero().flatten()
    kept = kept[torch.linspace(0, len(kept) - 1, min(most, len(kept))).round().long()]
    panels, shares = [], {}
    for signal, name in SIGNALS.items():
        index = capture.match(signal).index.flatten().long().cpu()
        title, right = f"{name[0].upper()}{name[1:]}", None
        if of_structure is not None and of_appearance is not None:
            agrees = of_appearance[index] == of_structure
            shares[name] = agrees[judged].double().mean().item()
            title, right = f"{title}: {shares[name]:.0%} of {int(judged.sum())} tokens are matched to their own part", agrees[kept]
        panels.append(MatchPanel(title, centres[kept], centres[index[kept]], right))
    colours = "green where they end in the part where they begin" if labels is not None else "coloured by where they begin"
    note = f"{len(kept)} {'tokens of the object' if labels is not None else 'tokens'} as lines, {colours}."
    title = f"Matches in {short_name(capture.layer)}, {grid[0]} x {grid[1]} tokens"
    return correspondence(structure, appearance, panels, title=title, note=note), shares


def draw_heat_maps(
    capture: "Capture", structure: "Tensor", appearance: "Tensor", points: "Tensor", labels: "tuple[Tensor, Tensor] | None"
) -> "Figure":
    """Where the tokens under `points` [P, 2] look, by both signals; with labels, how much of it is in their own part."""
    import torch

    from ..context.layers import short_name, token_grid
    from ..embedded.scenes import PARTS
    from ..evaluation.correspondence import SIGNALS, STRENGTH, token_centres
    from ..evaluation.plots import point_heat_maps

    size = (structure.shape[1], structure.shape[2])
    grid = token_grid(size, capture.query.shape[2])
    tokens = torch.cdist(points.float(), token_centres(size, grid)).argmin(1).tolist()
    maps = {SIGNALS[signal]: torch.stack([capture.heat(token, signal).cpu().reshape(grid) for token in tokens]) for signal in reversed(SIGNALS)}
    note = f"Softmax over the appearance's tokens of q·k, heads averaged, and of {STRENGTH:g} cos(q, q); cross: the peak."
    captions = None
    if labels is not None:
        of_structure, of_appearance, _ = _judged(labels, grid)
        parts = [int(of_structure[token]) for token in tokens]
        captions = {
            name: [f"{PARTS[part]}: {heat.flatten()[of_appearance == part].sum():.0%}" for part, heat in zip(parts, heats)]
            for name, heats in maps.items()
        }
        note += " In the corner: the point's part, and the share that falls on it."
    title = f"Where one point looks, {short_name(capture.layer)}"
    return point_heat_maps(structure, appearance, points, maps, title=title, note=note, captions=captions)


def default_points(capture: "Capture", structure: "Tensor", labels: "tuple[Tensor, Tensor] | None", most: int = 3) -> "Tensor":
    """Points [P, 2]: in the middle of tokens of the object's largest parts that both scenes show; without labels, along the diagonal."""
    import torch

    from ..context.layers import token_grid
    from ..evaluation.correspondence import token_centres

    height, width = structure.shape[1:]
    if labels is None:
        return torch.stack([torch.linspace(0, side, most + 2)[1:-1] for side in (width, height)], -1)
    grid = token_grid((height, width), capture.query.shape[2])
    centres, (of_structure, _, judged) = token_centres((height, width), grid), _judged(labels, grid)
    parts, sizes = of_structure[judged].unique(return_counts=True)
    points = []
    for part in parts[sizes.argsort(descending=True)][:most]:
        inside = centres[of_structure == part]
        points.append(inside[(inside - inside.mean(0)).norm(dim=1).argmin()])
    return torch.stack(points)


def _judged(labels: "tuple[Tensor, Tensor]", grid: tuple[int, int]) -> "tuple[Tensor, Tensor, Tensor]":
    """Token labels [N] of structure and appearance, and which of the structure's are of an object's part that the appearance shows too."""
    import torch

    from ..embedded.scenes import BACKGROUNDS, token_labels

    of_structure, of_appearance = token_labels(torch.stack(labels), grid).long()
    return of_structure, of_appearance, (of_structure >= len(BACKGROUNDS)) & torch.isin(of_structure, of_appearance)
