"""Queries grouped by their label sets. All queries of a group see the same keys, so that no labels remain."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._blocks import on_host, row_read

MOST_GROUPS = 32  # label sets in a batch row: with more, small groups cost more than comparing labels


class Group(NamedTuple):
    """Queries with the same label set in a batch row, or in all batch rows if labels have one row."""

    batch: slice
    queries: Tensor  # [n], ascending
    keys: tuple[Tensor | None, ...]  # [U] of each segment, ascending; None: all

    def of(self, x: Tensor) -> Tensor:
        """The group's rows of [B, H, N_q, ...]."""
        return x[self.batch].index_select(2, self.queries)


def group_queries(
    query_labels: Tensor | None, key_labels: Sequence[Tensor | None], batch: int
) -> list[Group] | None:
    """The groups of labels [B or 1, N].

    None if there are no labels, too many label sets, or if labels are on a device: reading them would wait
    for it.
    """
    if query_labels is None or not on_host(query_labels) or all(labels is None for labels in key_labels):
        return None
    rows = max(x.shape[0] for x in (query_labels, *key_labels) if x is not None)
    groups: list[Group] = []
    for row in range(rows):
        own = query_labels[min(row, query_labels.shape[0] - 1)]
        sets, member = own.unique(return_inverse=True)
        if sets.numel() > MOST_GROUPS:
            return None
        where = slice(row, row + 1) if rows > 1 else slice(0, batch)
        for position, labels in enumerate(sets):
            keys = tuple(
                None if x is None else _meeting(x[min(row, x.shape[0] - 1)], labels) for x in key_labels
            )
            groups.append(Group(where, (member == position).nonzero().squeeze(1), keys))
    return groups


def _meeting(labels: Tensor, own: Tensor) -> Tensor | None:
    """The keys that share a label with a set; None for all keys."""
    kept = ((labels & own) != 0).nonzero().squeeze(1)
    return None if kept.numel() == labels.numel() else kept


def rows_read(batch: slice, batch_index: Tensor | None, rows: int) -> tuple[slice, Tensor | None]:
    """Which of the rows of the keys the batch rows of a group read, and the index into these rows."""
    if batch_index is None:
        return batch, None
    if batch.stop - batch.start == batch_index.shape[0]:
        return slice(None), batch_index
    row = row_read(batch_index, batch.start, rows)
    return slice(row, row + 1), None
