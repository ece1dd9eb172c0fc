"""FreeCustom: one output composed of the subjects of several pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qalign_kernels import Segment, attention

from ..context.layer_call import Site, take
from ..context.layout import BatchLayout
from ..context.regions import CORNER, Regions
from ._editing import Card, Editing, check_labels


@dataclass(frozen=True, kw_only=True)
class FreeCustom(Editing):
    """Compose one output of the subjects of several appearances.

    A = softmax([s Q_out K_outᵀ, s Q_out K_1ᵀ + b_1, ..., s Q_out K_Rᵀ + b_R]) [V_out; V_1; ...; V_R] in the
    output rows. b_r,j = w_r if token j of reference r shows the subject, and -∞ otherwise. With
    classifier-free guidance the unconditional half becomes f A_own + (1 - f) A, where A_own is plain
    self-attention. By default at every step, in the last six self-attention layers.

    References are the appearance rows, as many as the layout has. Subjects are the labels other than 0 of
    `attach(..., regions=Regions(appearance=[mask_1, mask_2]))`. Without regions, all of a reference is
    subject. Labels of the structure are not read. Masks are resized to each layer by torch's "nearest", as
    published.

    >>> import torch
    >>> from qalign import BatchLayout, FreeCustom, Site
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)
    >>> site = Site(BatchLayout("output", "appearance", "appearance"))
    >>> FreeCustom(mask_weights=(3.0, 2.0)).attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        mask_weights: w, one number for all references or one for each. A subject's keys count as if they were
            there e^w times.
        style_fidelity: f. With 1, as published, the unconditional half does not see the references, and
            guidance moves towards them.

    Raises:
        ValueError: `style_fidelity` is no fraction.

    Notes:
        The weights are those of the published configurations. The published code takes a weight of 0 for a
        mask of 0; here the subject is then seen without a shift. Subject masks from a segmentation model are
        not here. The noise of the references is the pipeline's task.

    Source: FreeCustom, arXiv 2405.13870.
    """

    card: ClassVar[Card] = Card(
        "FreeCustom",
        "2405.13870",
        "own keys and the subjects of all appearances, shifted by 3",
        "last six of the decoder",
        "all",
        "attention (segments, labels)",
        2.0,
    )
    default_steps: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    mask_weights: float | Sequence[float] = 3.0
    style_fidelity: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.style_fidelity <= 1:
            raise ValueError(f"style_fidelity: expected a fraction of 0 to 1, got {self.style_fidelity!r}")

    def check(
        self,
        size: tuple[int, int],
        grids: Sequence[tuple[int, int]],
        layout: BatchLayout,
        regions: Regions | None,
    ) -> None:
        """Check the number of weights, and that regions have a map for each reference."""
        count = layout.roles.count("appearance") if layout.roles.count("output") == 1 else 1
        self._weights(count)
        if regions is None:
            return
        maps = regions.appearance if isinstance(regions.appearance, tuple) else (regions.appearance,)
        for grid in grids:
            for labels in maps:
                if labels is not None:
                    check_labels(labels, "appearance", size, grid)
            regions.subject_labels("appearance", 0, count, grid[0] * grid[1], torch.device("cpu"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.idle:
            return site.plain(q, k, v)
        output, references = site.output_rows(q), site.references(q)
        if site.layout.parts(q.shape[0]) == 1 or self.style_fidelity == 0:
            return site.merge(q, k, v, self._shared(q, k, v, output, references, site))
        half = len(output) // 2
        own = site.stock(q, k, v, output[:half])
        if self.style_fidelity < 1:
            own = self._shared(q, k, v, output[:half], [rows[:half] for rows in references], site).lerp(
                own, self.style_fidelity
            )
        shared = self._shared(q, k, v, output[half:], [rows[half:] for rows in references], site)
        return site.merge(q, k, v, torch.cat([own, shared]))

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        """Return the attention of the conditional half to a single reference."""
        return self._shared(q, k, v, output, [reference], site)

    def _weights(self, count: int) -> list[float]:
        """The weight of each of `count` references."""
        if isinstance(self.mask_weights, (int, float)):
            return [self.mask_weights] * count
        if len(self.mask_weights) != count:
            expected = f"a number, or one for each of {count} references"
            raise ValueError(f"mask_weights: expected {expected}, got {len(self.mask_weights)}")
        return list(self.mask_weights)

    def _shared(
        self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, references: Sequence[Tensor], site: Site
    ) -> Tensor:
        count = len(references)
        weights = self._weights(count)
        segments = [site.own(k, v, output)]
        for number, (rows, weight) in enumerate(zip(references, weights)):
            labels = site.subject_labels(k, rows, "appearance", number, count, resize=CORNER)
            segments.append(Segment(k, v, labels=labels, logit_shift=weight, batch_index=rows))
        return attention(take(q, output), segments, scale=site.scale, query_labels=site.open_labels(q))
