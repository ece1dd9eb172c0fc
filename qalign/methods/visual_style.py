"""Visual style prompting: late in the decoder, the output attends the reference's keys and values."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import attention

from ..context.adain import adain
from ..context.layer_call import Site, take
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class VisualStylePrompting(Editing):
    """Transfer style by swapped self-attention.

    output rows: softmax(s Q_out K_refᵀ) V_ref, at every step, in the last six self-attention layers. On SDXL,
    for which it was published, these are those of up_blocks.1.

    In `AppearanceTransferPipeline` it also calibrates colours: at timesteps inside `calibration` the output's
    clean latents become AdaIN(x̂_0 → x̂_0 of the appearance), per channel over the picture, with eps 1e-8.
    The predicted noise stays as it is.

    >>> import torch
    >>> from qalign import BatchLayout, Site, VisualStylePrompting
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)  # three rows, two heads, 16 tokens, eight channels
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> VisualStylePrompting().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        calibration: (low, high), for the timesteps with low < timestep < high. None is no calibration.

    Notes:
        The published calibration is for real references only. In that pipeline all references are real. The
        published guidance scale of 20 at the first three steps is
        `qalign.sampling.guidance.early_scales`, for the callback `guidance_by_step`. A real reference with
        new noise at every step is not here.

    Source: Visual Style Prompting, arXiv 2402.12974.
    """

    card: ClassVar[Card] = Card(
        "Visual style prompting",
        "2402.12974",
        "keys and values of the appearance",
        "last six of the decoder",
        "all",
        "attention",
        1.0,
    )
    reads_labels: ClassVar[tuple[str, ...]] = ("appearance", "structure")

    calibration: tuple[int, int] | None = (100, 150)

    def change_clean(self, clean: Tensor, appearance: Tensor, timestep: int) -> Tensor:
        """Return x̂_0 [outputs, C, h, w] in the colours of the appearance's x̂_0 [1, C, h, w].

        At timesteps outside the calibration it is unchanged.
        """
        inside = self.calibration is not None and self.calibration[0] < timestep < self.calibration[1]
        return adain(clean, appearance, eps=1e-8) if inside else clean

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        return attention(
            take(q, output),
            site.reference(k, v, reference),
            scale=site.scale,
            query_labels=site.query_labels(q),
        )
