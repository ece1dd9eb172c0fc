"""Eye-for-an-eye: the output's hidden states are replaced by the most similar ones of the appearance."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qalign_kernels import similarity_argmax

from ..context.layer_call import Site
from ._editing import Card, Project
from .cross_image import CrossImage


@dataclass(frozen=True, kw_only=True)
class EyeForAnEye(CrossImage):
    """Transfer appearance by semantic matching of hidden states, before they are projected.

    π(i) = argmax_j cos(h_out,i, h_app,j) over all channels,  h_out,i <- h_app,π(i).
    Queries, keys and values of the output rows are projections of the result. At Cross-Image's structure
    steps, h_out <- h_structure. The layers are Cross-Image's, and there is no contrast.

    With `attach(..., regions=...)`, a token is matched within its label. A token of the background, whose
    label is 0 if the regions name none, and a token whose label the appearance does not show keep their
    features.

    >>> from qalign import EyeForAnEye, attach
    >>> with attach(pipe, EyeForAnEye(), steps=(0, 1)):
    ...     images = pipe([prompt] * 3, latents=latents, num_inference_steps=2, guidance_scale=1).images
    >>> len(images)
    3

    Args:
        contrast: 1.0, as published. There is no edited attention map that could have another.
        structure_every, structure_until: as `CrossImage`.

    Raises:
        ValueError: another contrast.

    Notes:
        The published code matches and edits the conditional guidance half alone, and at structure steps it
        edits the unconditional half alone. This class edits both halves at every step, each by its own match.
        The published form that swaps values only is, with matched queries,
        `QAlign(refinement="warped_values")`. Masks from a segmentation model are not here (`regions` takes
        them), nor is AdaIN. The published code resizes masks bilinearly, and every token above 0 is inside;
        here the label in the centre of a token counts.

    Source: Eye-for-an-eye, arXiv 2406.07008.
    """

    card: ClassVar[Card] = Card(
        "Eye-for-an-eye",
        "2406.07008",
        "hidden states replaced by their best match in the appearance",
        "last two decoder blocks",
        "12 to 68 of 68",
        "similarity_argmax",
        1.5,
    )

    contrast: float = 1.0

    def __post_init__(self) -> None:
        if self.contrast != 1.0:
            raise ValueError(f"contrast: expected 1.0 for EyeForAnEye, got {self.contrast!r}")

    def prepare(self, hidden: Tensor, project: Project, site: Site) -> Tensor:
        """Return the hidden states [B, N, C] with matched ones in the output rows."""
        if site.idle:
            return hidden
        output = site.output_rows(hidden)
        appearance = site.layout.index("appearance", len(hidden), hidden.device)
        features = hidden.unsqueeze(1)
        own, labels = features.index_select(0, output), site.object_labels(features, appearance)
        index, _ = similarity_argmax(
            own, features, query_labels=labels[0], reference_labels=labels[1], batch_index=appearance
        )
        index = index[:, 0, :, None]  # -1 has no match
        rows = index.clamp(min=0).long().expand(-1, -1, hidden.shape[2])
        found = hidden.index_select(0, appearance).gather(1, rows)
        matched = torch.where(index >= 0, found, own[:, 0])
        if site.clock is not None and "structure" in site.layout.roles:
            structure = hidden.index_select(0, site.structure_rows(hidden))
            matched = torch.where(site.clock.from_structure.to(hidden.device), structure, matched)
        return site.replace(hidden, matched)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return site.plain(q, k, v)
