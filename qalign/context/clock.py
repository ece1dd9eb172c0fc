"""The step of a running denoising loop, for methods that change with it."""

from collections.abc import Callable

import torch


class Clock:
    """What the present step means for a method, as 0-dim tensors: a compiled processor reads them and is never recompiled.

    Attributes:
        active: bool, whether the step lies inside `steps`.
        from_structure: bool, whether keys and values come from the structure in this step.
        progress: float32, step / (total - 1), from 0 to 1.
        idle: `active` denied, on the host, for processors that are not compiled.
        step, total: the step (from 0) and the number of steps; None before the first.
    """

    def __init__(
        self,
        steps: tuple[float, float] | None = None,
        takes_structure: Callable[[int, int], bool] | None = None,
    ) -> None:
        if steps is not None and not (len(steps) == 2 and 0 <= steps[0] < steps[1] <= 1):
            raise ValueError(
                f"steps: expected None or fractions (start, stop) with 0 <= start < stop <= 1, got {steps!r}"
            )
        self.steps = None if steps == (0, 1) else steps
        self.takes_structure = takes_structure
        self.active = torch.ones((), dtype=torch.bool)
        self.from_structure = torch.zeros((), dtype=torch.bool)
        self.progress = torch.zeros(())
        self.idle = False
        self.step: int | None = None
        self.total: int | None = None

    @property
    def gated(self) -> bool:
        """Whether there are steps at which the method rests."""
        return self.steps is not None

    def set(self, step: int, total: int, device: torch.device | None = None) -> None:
        """Move to `step` of `total`; the tensors move to `device` with it."""
        self.step, self.total = step, total
        self.idle = self.steps is not None and not self.steps[0] <= step / total < self.steps[1]
        if device is not None:
            with torch.inference_mode(False):  # they are written again outside of it
                self.active, self.from_structure, self.progress = (
                    each.to(device) for each in (self.active, self.from_structure, self.progress)
                )
        self.active.fill_(not self.idle)
        self.progress.fill_(step / max(total - 1, 1))
        self.from_structure.fill_(self.takes_structure is not None and self.takes_structure(step, total))

    def reset(self) -> None:
        """Back to before the first step."""
        self.step = self.total = None
        self.idle = False
        self.active.fill_(True)
        self.from_structure.fill_(False)
        self.progress.fill_(0.0)
