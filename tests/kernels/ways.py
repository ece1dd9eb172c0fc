"""The ways in which the tiled path computes, for tests that meet all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from hypothesis import strategies as st

from qalign_kernels.tiled import _blocks, _fused, _masses
from qalign_kernels.tiled import _labels as tiled_labels

ROW, RAGGED, HEADS, WHOLE = (
    1,
    6_000,
    40_000,
    8 << 20,
)  # bytes: one row of one head, some rows, some heads, all
BLOCK_BYTES = (ROW, RAGGED, HEADS, WHOLE)


class Way(NamedTuple):
    """How the tiled path computes: the size of its blocks, and its route.

    The device route never reads a value. It runs on the CPU as well.
    """

    block_bytes: int
    route: str = "host"

    @contextmanager
    def taken(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_blocks, "CPU_BLOCK_BYTES", self.block_bytes)
            if self.route == "device":
                for module in (_blocks, _fused, _masses, tiled_labels):
                    patch.setattr(module, "on_host", lambda x: False)
            yield


WAYS = st.builds(Way, st.sampled_from(BLOCK_BYTES), st.sampled_from(("host", "device")))
