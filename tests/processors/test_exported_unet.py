"""torch.export of a UNet with an attached method: one program for all sizes of the latents."""

import pytest
import torch
from torch.export import Dim, export

from qalign import BatchLayout, QAlign, Regions, attach
from tests.processors.models import SIZE, make_unet, unet_inputs

LABELS = torch.arange(SIZE).expand(SIZE, SIZE) // (SIZE // 2)
LATENTS = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
SHAPES = {"sample": LATENTS, "timestep": None, "encoder_hidden_states": None, "return_dict": None}


def arguments(unet, side):
    given = unet_inputs(unet)
    return {**given, "sample": given["sample"][..., :side, :side], "return_dict": False}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("strict", "regions"), [(False, None), (True, Regions(appearance=LABELS, structure=LABELS.T))]
)
def test_exported_unet_takes_other_sizes(strict, regions):
    unet = make_unet("small")
    layout = BatchLayout("output", "appearance", "structure", guidance=False)
    plain = unet(**arguments(unet, SIZE))[0]
    with attach(unet, QAlign(), layout=layout, regions=regions):
        eager = {side: unet(**arguments(unet, side))[0] for side in (SIZE, SIZE // 2)}
        program = export(unet, (), arguments(unet, SIZE), dynamic_shapes=SHAPES, strict=strict)
    assert not torch.equal(eager[SIZE], plain)
    for side, expected in eager.items():
        found = program.module()(**arguments(unet, side))[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
