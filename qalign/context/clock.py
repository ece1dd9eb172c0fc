"""The step of a running denoising loop, for methods that change during the loop."""

from collections.abc import Callable

import torch


class Clock:
    """The present denoising step, and what it means for a method.

    A compiled processor reads the 0-dim tensors, so it is not compiled again at each step.

    >>> from qalign.context.clock import Clock
    >>> clock = Clock((0.5, 1.0))
    >>> clock.set(1, 4)
    >>> clock.idle, clock.active.item(), round(clock.progress.item(), 3)
    (True, False, 0.333)

    Args:
        steps: the fractions (start, stop) of the loop in which the method edits. None is the whole loop.
        takes_structure: the method's function of (step, total); None never reads the structure.

    Raises:
        ValueError: `steps` are not such fractions.

    Attributes:
        active: bool tensor, whether the method edits in this step.
        from_structure: bool tensor, whether keys and values come from the structure in this step.
        progress: float32 tensor, step / (total - 1), from 0 to 1.
        idle: the opposite of `active` as a Python bool, for processors that are not compiled.
        position: int64 tensor [2] on the CPU, step and total; 0 and 1 before the first step.
        step, total: the step, from 0, and the number of steps. A step is one timestep, however often the
            model is called at it. None before the first step.
        loops: the number of loops that have begun.
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
        self.position = torch.tensor([0, 1], device="cpu")
        self.idle = False
        self.step: int | None = None
        self.total: int | None = None
        self.loops = 0

    @property
    def gated(self) -> bool:
        """Whether there are steps in which the method does not edit."""
        return self.steps is not None

    def edits(self, step: int, total: int) -> bool:
        """Return whether the method edits in `step` of `total`."""
        return self.steps is None or self.steps[0] <= step / total < self.steps[1]

    def begin(self) -> None:
        """Begin a new loop. Its steps are set afterwards."""
        self.loops += 1

    def set(self, step: int, total: int, device: torch.device | None = None) -> None:
        """Move to `step` of `total`, and the tensors to `device`."""
        self.step, self.total = step, total
        self.idle = not self.edits(step, total)
        if device is not None:
            with torch.inference_mode(False):  # they are written again outside of it
                self.active, self.from_structure, self.progress = (
                    each.to(device) for each in (self.active, self.from_structure, self.progress)
                )
        self.position.copy_(torch.tensor([step, total], device="cpu"))
        self.active.fill_(not self.idle)
        self.progress.fill_(min(step / max(total - 1, 1), 1.0))
        self.from_structure.fill_(self.takes_structure is not None and self.takes_structure(step, total))

    def reset(self) -> None:
        """Return to the state before the first step."""
        self.step = self.total = None
        self.idle = False
        self.position.copy_(torch.tensor([0, 1], device="cpu"))
        self.active.fill_(True)
        self.from_structure.fill_(False)
        self.progress.fill_(0.0)
