"""Which row of a batch is what: the declared roles of its rows, once for each guidance part and each image per prompt."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import require_count

ROLES = ("output", "appearance", "structure", "plain")


@dataclass(frozen=True, init=False)
class BatchLayout:
    """The roles of a batch's rows, declared and held against every batch that comes.

    A batch has guidance parts x roles x images rows, in that order: pipelines concatenate [negative, positive] prompts and repeat each
    prompt `images_per_prompt` times. Every output row reads the reference rows of its own part and image.

    Args:
        roles: one of "output", "appearance", "structure" and "plain" for each prompt of the batch. Several outputs may share one
            appearance or structure row; otherwise there is one for each output, in the same order. A single output may have any number of
            appearances, for methods that read several (`references`).
        guidance: True: always two parts, [negative, positive]; False: always one; None: one or two, as the batch comes.
        images_per_prompt: the pipeline's `num_images_per_prompt`.

    >>> BatchLayout("output", "appearance", "structure").rows("appearance", batch=6)
    (1, 4)
    """

    roles: tuple[str, ...]
    guidance: bool | None
    images_per_prompt: int
    unread: int  # of the last roles, how many nobody wants the attention of

    def __init__(self, *roles: str, guidance: bool | None = None, images_per_prompt: int = 1) -> None:
        unknown = [role for role in roles if role not in ROLES]
        if not roles or unknown:
            raise ValueError(
                f"roles: expected one or more of {', '.join(ROLES)}, got {unknown[0] if unknown else 'none'!r}"
            )
        if guidance not in (True, False, None):
            raise ValueError(f"guidance: expected True, False or None, got {guidance!r}")
        require_count("images_per_prompt", images_per_prompt, 1)
        for role in ("appearance", "structure"):
            several = role == "appearance" and roles.count("output") == 1
            if not several and roles.count(role) not in (0, 1, roles.count("output")):
                raise ValueError(
                    f"roles: expected no {role}, one, or one for each of {roles.count('output')} outputs, got {roles.count(role)}"
                )
        object.__setattr__(self, "roles", roles)
        object.__setattr__(self, "guidance", guidance)
        object.__setattr__(self, "images_per_prompt", images_per_prompt)
        object.__setattr__(self, "unread", 0)

    def extended(self, *roles: str) -> "BatchLayout":
        """With `roles` behind its own, which are read by the output rows and themselves not wanted: they are no "other" rows.

        Rows of its own that had one of these roles are plain in it.
        """
        own = ("plain" if role in roles else role for role in self.roles)
        layout = BatchLayout(*own, *roles, guidance=self.guidance, images_per_prompt=self.images_per_prompt)
        object.__setattr__(layout, "unread", len(roles))
        return layout

    def parts(self, batch: int) -> int:
        """How many guidance parts a batch of this many rows has."""
        rows = len(self.roles) * self.images_per_prompt
        admissible = {True: (2,), False: (1,), None: (1, 2)}[self.guidance]
        if batch not in [part * rows for part in admissible]:
            raise ValueError(f"batch: expected {self._arithmetic(admissible)}, got {batch} rows")
        return batch // rows

    def rows(self, role: str, batch: int) -> tuple[int, ...]:
        """The row of `role` for each output row ("output": the output rows themselves), or every "other" row, in the order of the batch."""
        parts, images = self.parts(batch), self.images_per_prompt
        return tuple(
            (part * len(self.roles) + slot) * images + image
            for part in range(parts)
            for slot in self._slots(role)
            for image in range(images)
        )

    def index(self, role: str, batch: int, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
        """`rows` as a tensor on `device`, made there: nothing is copied from the host, nothing waits. Kept for the next call."""
        slots, parts = self._slots(role), self.parts(batch)
        make = _index if torch.compiler.is_compiling() else _cached_index
        return make(slots, len(self.roles), parts, self.images_per_prompt, device, dtype)

    def companions(self, batch: int, device: torch.device) -> list[Tensor]:
        """For each output of the roles: its row in the guidance part and image of each output row. int32, as `index`."""
        make = _index if torch.compiler.is_compiling() else _cached_index
        slots, settings = (
            self._slots("output"),
            (len(self.roles), self.parts(batch), self.images_per_prompt, device, torch.int32),
        )
        return [make((slot,) * len(slots), *settings) for slot in slots]

    def references(self, batch: int, device: torch.device) -> list[Tensor]:
        """For each appearance that an output has, in order: its row in the guidance part and image of each output row. int32, as `index`."""
        make = _index if torch.compiler.is_compiling() else _cached_index
        slots = tuple(slot for slot, name in enumerate(self.roles) if name == "appearance")
        if self.roles.count("output") != 1 or len(slots) < 2:
            return [self.index("appearance", batch, device)]
        return [
            make((slot,), len(self.roles), self.parts(batch), self.images_per_prompt, device, torch.int32)
            for slot in slots
        ]

    def _slots(self, role: str) -> tuple[int, ...]:
        if role == "other":
            return tuple(
                slot
                for slot, name in enumerate(self.roles[: len(self.roles) - self.unread])
                if name != "output"
            )
        slots = tuple(slot for slot, name in enumerate(self.roles) if name == role)
        if not slots:
            raise ValueError(f"layout: expected a row of role {role!r}, got roles {', '.join(self.roles)}")
        if role == "appearance" and len(slots) > self.roles.count("output") == 1:
            raise ValueError(
                f"layout: expected one appearance, for this method reads no more, got {len(slots)} for one output"
            )
        return slots * self.roles.count("output") if len(slots) == 1 and role != "output" else slots

    def _arithmetic(self, admissible: tuple[int, ...]) -> str:
        roles, images = (
            f"{len(self.roles)} roles ({', '.join(self.roles)})",
            f"{self.images_per_prompt} images per prompt",
        )
        parts, rows = (
            " or ".join(map(str, admissible)),
            " or ".join(str(part * len(self.roles) * self.images_per_prompt) for part in admissible),
        )
        return f"{rows} rows = {roles} x {parts} guidance parts x {images}"


def _index(
    slots: tuple[int, ...], roles: int, parts: int, images: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    part = torch.arange(parts, dtype=dtype, device=device).view(-1, 1) * (roles * images)
    image = torch.arange(images, dtype=dtype, device=device).view(1, -1)
    columns = [part + image + slot * images for slot in slots]
    return torch.cat(columns, dim=1).flatten() if columns else part.new_empty(0)


@functools.cache
def _cached_index(*arguments) -> Tensor:
    with torch.inference_mode(False):  # autograd must be able to keep it
        return _index(*arguments)
