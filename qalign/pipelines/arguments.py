"""Checks of the arguments that several pipelines share. They come before any work."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._checks import require_number

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def one_prompt(prompt: Any) -> str:
    """The one prompt of a call; also from a list of one.

    Raises:
        TypeError: `prompt` is something else.
    """
    if isinstance(prompt, (list, tuple)) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected one prompt, got {prompt!r}")
    return prompt


def check_output(output_type: Any, names: Any) -> None:
    """Check `output_type` and `callback_on_step_end_tensor_inputs`."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    if not isinstance(names, (list, tuple)) or set(names) - {"latents"}:
        raise ValueError(f"callback_on_step_end_tensor_inputs: expected ('latents',) or (), got {names!r}")


def check_noun(noun: Any) -> None:
    if noun is not None and not isinstance(noun, str):
        raise TypeError(f"noun: expected a word of the prompt or None, got {noun!r}")


def check_switches(**values: Any) -> None:
    """Check arguments that are True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_fractions(**values: Any) -> None:
    """Check arguments that are fractions of 0 to 1."""
    for name, value in values.items():
        require_number(name, value, least=0, most=1)


def check_generator(generator: Any, *, several: bool = False) -> None:
    """Check a generator, or also a list of them if `several`."""
    listed = several and isinstance(generator, Sequence) and not isinstance(generator, str)
    each = generator if listed else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in each):
        expected = "None, a torch.Generator or a list of them" if several else "None or a torch.Generator"
        raise TypeError(f"generator: expected {expected}, got {generator!r}")


def require_folder(cache: Any) -> None:
    """Make the folder of the inversions if there is none.

    Raises:
        TypeError: `cache` is no path.
        OSError: it cannot be a folder, or nothing can be written there.
    """
    if cache is None:
        return
    if not isinstance(cache, (str, os.PathLike)):
        raise TypeError(f"cache: expected the path of a folder or None, got {cache!r}")
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"{os.fspath(cache)!r} ({error.strerror})"
        raise type(error)(f"cache: expected a folder that can be written, got {got}") from error
