"""`python -m qalign.embedded.train`: train the embedded model from a seed and write it as a model folder.

The command has three stages: an autoencoder on crops of training scenes; a denoiser and its text encoder on
their latents; and a measurement of the denoiser's self-attention on held-out scenes. A stage that was
stopped continues from its checkpoint. What a step sees depends on the seed and the number of the step
alone.

With `--start`, the command continues from a written model, on other scenes and with a new optimizer. The
autoencoder then stays as it is.
"""

import argparse
import dataclasses
import functools
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qalign_kernels import _command_line
from qalign_kernels._command_line import Reading
from qalign_kernels._files import Files, replacing

from . import FOLDER
from .fitness import best_decoder_layer, self_attention_fitness
from .host import prepare_process
from .scenes import held_out_seed, render
from .training import Settings, Training

MAY_BE_ZERO = ("autoencoder_steps", "steps", "refine_steps", "scenes_per_step", "first_scene")
READINGS = (
    Reading(
        ("autoencoder_steps", "autoencoder_batch", "autoencoder_rate", "crop"),
        lambda options: options.start is None,
        "without --start",
    ),
    Reading(("decay",), lambda options: options.steps > 0, "with --steps above 0"),
)


def parser() -> argparse.ArgumentParser:
    top = _command_line.Parser(prog="python -m qalign.embedded.train", description=__doc__.splitlines()[0])
    _command_line.add_command(top, sys.modules[__name__])
    return top


def files(options: argparse.Namespace) -> Files:
    written = [("--out", options.out / name) for name in ("model_index.json", "record.json", "samples.png")]
    return Files(writes=written, folders=[("--out", options.out), ("--work", options.work)])


def _type_of(field: dataclasses.Field) -> Callable[[str], Any]:
    """The function that reads an option of `Settings`."""
    if field.name == "seed":
        return _command_line.seed
    if field.type is float:
        return _command_line.number
    return _command_line.whole if field.name in MAY_BE_ZERO else _command_line.count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("embedded_training"),
        metavar="FOLDER",
        help="folder for checkpoints; a second call continues from them (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=FOLDER,
        metavar="FOLDER",
        help="write the model here (default: %(default)s)",
    )
    parser.add_argument(
        "--start", type=Path, metavar="FOLDER", help="continue from this written model, not from a new one"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="NAME",
        help="cuda or cpu (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=_command_line.number,
        default=math.inf,
        metavar="M",
        help="stop after this time; a second call continues (default: no limit)",
    )
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            name, type=_type_of(field), default=field.default, metavar="N", help="(default: %(default)s)"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    return _command_line.main(parser, arguments)


def run(options: argparse.Namespace) -> int:
    given = vars(options)
    _command_line.require_device(options.device)
    if options.start is not None and not (options.start / "record.json").is_file():
        raise ValueError(
            f"--start: expected a folder that this command wrote, got {options.start} without a record.json"
        )
    settings = Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings)})
    prepare_process()
    report = functools.partial(print, flush=True)
    training = Training(
        options.work, settings, torch.device(options.device), report, 60 * options.minutes, options.start
    )
    try:
        if training.start is None:
            training.train_autoencoder()
        training.train_denoiser()
    except KeyboardInterrupt:
        continues = f"the same command continues from {options.work}"
        if time.monotonic() <= training.deadline:
            raise KeyboardInterrupt(continues) from None
        print(f"stopped; {continues}", flush=True)
        return 1
    write(training, options.out)
    print(f"wrote {options.out}")
    return 0


def write(training: Training, folder: Path) -> None:
    """Write the model in half precision, a sheet of samples, and the record with its measured fitness."""
    pipe = training.pipeline().to(torch.float16)
    with tempfile.TemporaryDirectory() as made:
        pipe.save_pretrained(made, safe_serialization=True)
        for file in sorted(path for path in Path(made).rglob("*") if path.is_file()):
            with replacing(folder / file.relative_to(made)) as unfinished:
                shutil.copyfile(file, unfinished)
    pipe = pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rows = self_attention_fitness(pipe)
    training.record["fitness"] = {"best_decoder_layer": best_decoder_layer(rows), "layers": rows}
    with replacing(folder / "record.json") as unfinished:
        unfinished.write_text(json.dumps(training.record, indent=1) + "\n")
    with replacing(folder / "samples.png") as unfinished:
        contact_sheet(pipe).save(unfinished)


def contact_sheet(pipe: Any, steps: int = 50, seed: int = 0) -> Any:
    """Draw 32 samples without a caption, and 16 with captions at guidance scale 3, as one image."""
    from diffusers.utils import make_image_grid

    captions = render([held_out_seed(number) for number in range(16)], 8).captions
    generator = torch.Generator().manual_seed(seed)
    free = pipe([""] * 32, num_inference_steps=steps, guidance_scale=1.0, generator=generator).images
    captioned = pipe(
        list(captions), num_inference_steps=steps, guidance_scale=3.0, generator=generator
    ).images
    return make_image_grid(free + captioned, 6, 8)


if __name__ == "__main__":
    raise SystemExit(main())
