"""Work that the processes of `accelerate launch` or `torchrun` share."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[Iterable], Iterable]


def processes() -> Any:
    """accelerate's `PartialState`. It joins processes without GPUs only if it knows that they have none."""
    from accelerate import PartialState

    wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return PartialState(cpu=wanted or ("LOCAL_RANK" in os.environ and not torch.cuda.is_available()))


def leave() -> None:
    """Wait for the other processes and disconnect, since a process that just ends may abort."""
    state = processes()
    state.wait_for_everyone()
    state.destroy_process_group()


def gathered(
    work: Callable[[Item], Result], items: Sequence[Item], progress: Progress = iter
) -> list[Result]:
    """Do `work` for every item, each in one of the launched processes.

    Returns:
        The results in the order of the items, the same in each process.
    """
    from accelerate.utils import gather_object

    with processes().split_between_processes(list(items)) as mine:
        return gather_object([work(item) for item in progress(mine)])
