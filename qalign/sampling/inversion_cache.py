"""Inversions on disk: one safetensors file per picture. Its name hashes all that the inversion depends on."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from .inversion import Inversion, read_inversion, write_inversion
from .weights_digest import tensor_bytes, weights_digest

# attributes of FreeU and of adapters that change a UNet's results
NOT_PARAMETERS = (
    "b1",
    "b2",
    "s1",
    "s2",
    "scaling",
    "_active_adapter",
    "_disable_adapters",
    "merged_adapters",
    "scale",
)
_log = logging.getLogger("qalign")


class InversionCache:
    """Keep inversions in a folder.

    Args:
        folder: of the safetensors files. None keeps and finds nothing.

    Raises:
        ValueError: `folder` is a file.

    Example:
        >>> import tempfile
        >>> one = Inversion("ddim", torch.zeros(3, 1, 4, 8, 8), None, torch.tensor([500, 0]), 0.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = InversionCache(folder).fill(["a"], lambda rows: one)
        ...     found = InversionCache(folder).fill(["a"], None)
        >>> torch.equal(made.latents, found.latents)
        True
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"cache: expected a folder, got the file {self.folder}")

    def fill(self, keys: Sequence[str], make: Callable[[list[int]], Inversion]) -> Inversion:
        """Collect the inversion of all pictures, and make those that the folder does not have.

        Args:
            keys: one for each picture.
            make: called with the numbers of the missing pictures, returns their inversion. It is not called
                if none is missing.

        Returns:
            the inversion of all pictures, in the order of `keys`. An inversion whose file is damaged, or is
            that of another key, is made again, with a warning. One that cannot be written is returned all the
            same, with a warning.
        """
        found = {row: inverted for row, key in enumerate(keys) if (inverted := self._load(key)) is not None}
        missing = [row for row in range(len(keys)) if row not in found]
        if missing:
            made = make(missing)
            found |= {row: _rows(made, [position]) for position, row in enumerate(missing)}
            self._store({keys[row]: found[row] for row in missing})
        return _join([found[row] for row in range(len(keys))])

    def _load(self, key: str) -> Inversion | None:
        path = None if self.folder is None else self.folder / f"{key}.safetensors"
        if path is None or not path.exists():
            return None
        try:
            inversion, key_inside = read_inversion(path)
            if key_inside != key:
                raise ValueError("it is that of another inversion")
            return inversion
        except (OSError, ValueError) as error:
            _log.warning("cache: the inversion in %s cannot be used and is made again (%s)", path, error)
            return None

    def _store(self, made: dict[str, Inversion]) -> None:
        if self.folder is None:
            return
        try:
            for key, inversion in made.items():
                write_inversion(inversion, self.folder / f"{key}.safetensors", key=key)
        except OSError as error:
            _log.warning("cache: the inversion is used and not kept (%s)", error)


def _rows(inversion: Inversion, rows: list[int]) -> Inversion:
    return replace(
        inversion,
        latents=inversion.latents[:, rows],
        noises=None if inversion.noises is None else inversion.noises[:, rows],
    )


def _join(inversions: list[Inversion]) -> Inversion:
    device = inversions[0].latents.device
    latents = torch.cat([each.latents.to(device) for each in inversions], dim=1)
    noises = [each.noises.to(device) for each in inversions if each.noises is not None]
    return replace(inversions[0], latents=latents, noises=torch.cat(noises, dim=1) if noises else None)


def digest(*parts: Any) -> str:
    """Hash things by sha256.

    Args:
        parts: a tensor or an array counts by dtype, shape and bytes. A model counts by its configuration, all
            of its weights, the factors of FreeU and the state of adapters. Anything else counts by its JSON.
            Entries of a dict whose name begins with an underscore do not count: diffusers keeps paths and
            versions there.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: some weights of a model cannot be read.

    Example:
        >>> digest(latents, {"steps": 50}) == digest(latents.clone(), {"steps": 50, "_version": 1})
        True
    """
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            config: Any = part.config
            part = digest(dict(config), *_states(part), weights_digest(part))
        elif isinstance(part, (Tensor, numpy.ndarray)):
            part = torch.as_tensor(part)
            head = f"{part.dtype} {list(part.shape)}".encode()
            part = hashlib.sha256(head + tensor_bytes(part).tobytes()).hexdigest()
        elif isinstance(part, dict):
            part = digest(
                *(item for name in sorted(part) if not name.startswith("_") for item in (name, part[name]))
            )
        whole.update(json.dumps(part, sort_keys=True, default=_plain).encode() + b"\n")
    return whole.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (Tensor, numpy.ndarray)) else str(value)


def _states(model: nn.Module) -> list[str]:
    """The factors of FreeU and the state of adapters, which are no weights."""
    return [
        str({name: state[name] for name in NOT_PARAMETERS if name in state})
        for state in map(vars, model.modules())
        if state.keys() & NOT_PARAMETERS
    ]
