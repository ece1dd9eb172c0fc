"""Visual style prompting: the output's queries attend the reference's keys and values, late in the decoder."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import attention

from ..context.adain import adain
from ..context.layer_call import Site, take
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class VisualStylePrompting(Editing):
    """Style transfer by swapped self-attention.

    output rows: softmax(s Q_out K_refᵀ) V_ref, at every step, in the last six self-attention layers: up_blocks.1 of SDXL, where it was published.

    `change_clean`, in `AppearanceTransferPipeline`: at timesteps inside `calibration` the output's x̂_0 becomes AdaIN(x̂_0 → x̂_0 of the appearance),
    per channel over the picture, eps 1e-8; ε̂ is not derived from it anew.

    Args:
        calibration: (low, high), where low < timestep < high; None: nowhere.

    Source: Visual Style Prompting, arXiv 2402.12974, with the calibration for real references only, as all of that pipeline are.
    Its guidance of 20 at the first three steps is `qalign.sampling.guidance.early_scales`, for the callback `guidance_by_step`.
    Not here: a real reference noised anew at every step.
    """

    card: ClassVar[Card] = Card(
        "Visual style prompting",
        "2402.12974",
        "K, V <- appearance",
        "last six of the decoder",
        "all",
        "attention",
        1.0,
    )

    calibration: tuple[int, int] | None = (100, 150)

    def change_clean(self, clean: Tensor, appearance: Tensor, timestep: int) -> Tensor:
        """x̂_0 [outputs, C, h, w] in the colours of the appearance's [1, C, h, w], at the timesteps of the calibration."""
        inside = self.calibration is not None and self.calibration[0] < timestep < self.calibration[1]
        return adain(clean, appearance, eps=1e-8) if inside else clean

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        return attention(
            take(q, output),
            site.reference(k, v, reference),
            scale=site.scale,
            query_labels=site.query_labels(q),
        )
