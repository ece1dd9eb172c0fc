"""The roles of a batch's rows: which row is an output, an appearance, a structure."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import require_count

ROLES = ("output", "appearance", "structure", "plain")


@dataclass(frozen=True, init=False)
class BatchLayout:
    """Declare the roles of a batch's rows. Every batch is checked against them.

    A batch has guidance halves x roles x images rows, in that order. Pipelines concatenate the negative and
    the positive prompts, and repeat each prompt `images_per_prompt` times. An output row reads reference rows
    of its own guidance half and image.

    >>> from qalign import BatchLayout
    >>> layout = BatchLayout("output", "appearance", "structure")
    >>> layout.rows("appearance", batch=6)  # two guidance halves of three rows
    (1, 4)

    Args:
        roles: the role of each prompt's row: "output", "appearance", "structure" or "plain". Several outputs
            may share one appearance or structure row. Otherwise there is one for each output, in the same
            order. A single output may have several appearances, for methods that read several.
        guidance: True for two guidance halves [negative, positive], False for one. None accepts both.
        images_per_prompt: the pipeline's `num_images_per_prompt`.
        unread: the number of last roles that output rows read, and whose own attention output is not needed.

    Raises:
        ValueError: an argument that is none of these, or numbers of roles that do not fit together.
    """

    roles: tuple[str, ...]
    guidance: bool | None
    images_per_prompt: int
    unread: int

    def __init__(
        self, *roles: str, guidance: bool | None = None, images_per_prompt: int = 1, unread: int = 0
    ) -> None:
        unknown = [role for role in roles if role not in ROLES]
        if not roles or unknown:
            got = repr(unknown[0] if unknown else "none")
            raise ValueError(f"roles: expected one or more of {', '.join(ROLES)}, got {got}")
        if guidance not in (True, False, None):
            raise ValueError(f"guidance: expected True, False or None, got {guidance!r}")
        require_count("images_per_prompt", images_per_prompt, 1)
        require_count("unread", unread)
        outputs = roles.count("output")
        for role in ("appearance", "structure"):
            several = role == "appearance" and outputs == 1
            if not several and roles.count(role) not in (0, 1, outputs):
                expected = f"no {role}, one, or one for each of {outputs} outputs"
                raise ValueError(f"roles: expected {expected}, got {roles.count(role)}")
        object.__setattr__(self, "roles", roles)
        object.__setattr__(self, "guidance", guidance)
        object.__setattr__(self, "images_per_prompt", images_per_prompt)
        object.__setattr__(self, "unread", unread)

    def extended(self, *roles: str) -> "BatchLayout":
        """Return this layout with `roles` behind its own, for rows that are only read.

        Own rows that had one of these roles become plain.
        """
        own = ("plain" if role in roles else role for role in self.roles)
        settings = {"guidance": self.guidance, "images_per_prompt": self.images_per_prompt}
        return BatchLayout(*own, *roles, **settings, unread=len(roles))  # type: ignore[arg-type]

    def unguided(self) -> "BatchLayout":
        """Return this layout for a batch without guidance."""
        settings = {"images_per_prompt": self.images_per_prompt, "unread": self.unread}
        return BatchLayout(*self.roles, guidance=False, **settings)  # type: ignore[arg-type]

    def parts(self, batch: int) -> int:
        """Return the number of guidance halves in a batch of this many rows: 1 or 2.

        Raises:
            ValueError: no such number gives this many rows.
        """
        rows = len(self.roles) * self.images_per_prompt
        admissible = {True: (2,), False: (1,), None: (1, 2)}[self.guidance]
        if batch not in [part * rows for part in admissible]:
            raise ValueError(f"batch: expected {self._arithmetic(admissible)}, got {batch} rows")
        return batch // rows

    def rows(self, role: str, batch: int) -> tuple[int, ...]:
        """Return the row of `role` that belongs to each output row, in the order of the batch.

        "output" gives the output rows, and "other" gives every row that is no output.
        """
        parts, images = self.parts(batch), self.images_per_prompt
        return tuple(
            (part * len(self.roles) + slot) * images + image
            for part in range(parts)
            for slot in self._slots(role)
            for image in range(images)
        )

    def index(
        self, role: str | int, batch: int, device: torch.device, dtype: torch.dtype = torch.int32
    ) -> Tensor:
        """Return `rows` as a tensor on `device`. It is made there once, so a later call copies nothing.

        An integer role is a place among the roles: its row in the guidance half and image of each output row.
        """
        if torch.compiler.is_compiling():
            return _make_index(self, role, batch, device, dtype)
        return _cached_index(self, role, batch, device, dtype)

    def companions(self, batch: int, device: torch.device) -> list[Tensor]:
        """Return, for each output of the layout, its row in the guidance half and image of each output row.

        The tensors are int32, as those of `index`.
        """
        return [self.index(slot, batch, device) for slot in self._slots("output")]

    def references(self, batch: int, device: torch.device) -> list[Tensor]:
        """Return, for each appearance of an output, its row beside each output row, as `companions` does.

        The tensors are int32, as those of `index`.
        """
        slots = [slot for slot, name in enumerate(self.roles) if name == "appearance"]
        if self.roles.count("output") != 1 or len(slots) < 2:
            return [self.index("appearance", batch, device)]
        return [self.index(slot, batch, device) for slot in slots]

    def _slots(self, role: str | int) -> tuple[int, ...]:
        outputs = self.roles.count("output")
        if isinstance(role, int):
            return (role,) * outputs
        if role == "other":
            read = self.roles[: len(self.roles) - self.unread]
            return tuple(slot for slot, name in enumerate(read) if name != "output")
        slots = tuple(slot for slot, name in enumerate(self.roles) if name == role)
        if not slots:
            raise ValueError(f"layout: expected a row of role {role!r}, got roles {', '.join(self.roles)}")
        if role == "appearance" and len(slots) > outputs == 1:
            got = f"{len(slots)} for one output"
            raise ValueError(
                f"layout: expected one appearance, because this method reads only one, got {got}"
            )
        return slots * outputs if len(slots) == 1 and role != "output" else slots

    def _arithmetic(self, admissible: tuple[int, ...]) -> str:
        each = len(self.roles) * self.images_per_prompt
        rows = " or ".join(str(part * each) for part in admissible)
        parts = " or ".join(map(str, admissible))
        roles = f"{len(self.roles)} roles ({', '.join(self.roles)})"
        return f"{rows} rows = {roles} x {parts} guidance parts x {self.images_per_prompt} images per prompt"


def _make_index(
    layout: BatchLayout, role: str | int, batch: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    images, roles, parts = layout.images_per_prompt, len(layout.roles), layout.parts(batch)
    part = torch.arange(parts, dtype=dtype, device=device).view(-1, 1) * (roles * images)
    image = torch.arange(images, dtype=dtype, device=device).view(1, -1)
    columns = [part + image + slot * images for slot in layout._slots(role)]
    return torch.cat(columns, dim=1).flatten() if columns else part.new_empty(0)


@functools.cache
def _cached_index(
    layout: BatchLayout, role: str | int, batch: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    with torch.inference_mode(False):  # so that autograd can save it
        return _make_index(layout, role, batch, device, dtype)
