"""The driver that launches without a GPU."""

import struct

import pytest

from tests.stubbed import run_over_stub


@pytest.mark.slow
def test_a_launch_is_counted_and_recorded_as_passed(tmp_path):
    index, grid, block, stream, launches, parameters = run_over_stub(
        """
        from qalign_kernels import match_counts
        index = torch.zeros(2, 1, 1500, dtype=torch.int32)
        stub.stream = 77
        with stub.recording() as calls:
            match_counts(index, 900, backend="triton")
        (call,) = calls
        result = index.data_ptr(), call.grid, call.block, call.stream, stub.launches, call.parameters.hex()
        """,
        tmp_path,
    )
    assert (grid, block, stream, launches) == ([4, 1, 1], [128, 1, 1], 77, 1)
    pointer, _, *sizes = struct.unpack_from("<QQiiii", bytes.fromhex(parameters))
    assert (pointer, sizes) == (index, [1500, 1500, 1500, 900])  # a size of 1 is a constant of the kernel
