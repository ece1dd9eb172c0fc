"""Draw the pictures of the documents on the embedded model: `python docs/pictures.py`, about two minutes.

hero.png: the first held-out pair of seeds 0, 1, ..., not chosen by eye, by three methods from one inversion.
transfer.png: the six lines of the README, run as they stand there.
"""

import io
from pathlib import Path

import torch
from PIL import Image

from qalign import AppearanceTransferPipeline, CrossImage, QAlign, QAlignWarp
from qalign.context.layers import picture_size
from qalign.embedded.scenes import held_out_seed, render
from qalign.evaluation.match_figures import held_out_scenes
from qalign.evaluation.plots import transfer_grid

IMAGES = Path(__file__).with_name("images")
SEEDS = (0, 1, 2)
STEPS = 30
METHODS = {
    "Cross-Image": CrossImage(),
    "Q-Align (default)": QAlign(),
    "QAlignWarp (ours)": QAlignWarp(),
}


def hero(pipe: AppearanceTransferPipeline) -> None:
    rows = []
    for seed in SEEDS:
        structure, appearance, _, prompt = held_out_scenes(seed, picture_size(pipe))
        generator = torch.Generator().manual_seed(seed)
        inversion = pipe.invert(appearance, structure, prompt, num_inference_steps=STEPS, generator=generator)
        row = {"structure": structure, "appearance": appearance}
        for title, method in METHODS.items():
            row[title] = pipe(appearance, structure, prompt, method=method, inversion=inversion).images[0]
        rows.append(row)
    save(rows, "hero.png")


def transfer(pipe: AppearanceTransferPipeline) -> None:
    appearance, structure = render([held_out_seed(1), held_out_seed(5)]).image
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 50, "generator": generator}
    image = pipe(appearance, structure, "a photo of a quadruped", **settings).images[0]
    row = {"appearance": appearance, "structure": structure, "image": image}
    save([row], "transfer.png")


def save(rows: list[dict], name: str) -> None:
    """Write a grid as a PNG with a palette, which takes a fifth of the bytes."""
    drawn = io.BytesIO()
    transfer_grid(rows).savefig(drawn, dpi=80)
    picture = Image.open(drawn).convert("RGB")
    dither = Image.Dither.FLOYDSTEINBERG
    picture.quantize(palette=picture.quantize(256), dither=dither).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    pipe = AppearanceTransferPipeline.embedded()
    pipe.set_progress_bar_config(disable=True)
    hero(pipe)
    transfer(pipe)
