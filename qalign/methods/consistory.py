"""ConsiStory: the pictures of a batch attend the subjects of each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import Segment, attention

from ..context.layer_call import Site, take
from ..context.layers import decoder_layers
from ..context.outside_graphs import drawn
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class ConsiStory(Editing):
    """Attend the subjects of the other outputs; every row is an output, or an appearance.

    A layout is `BatchLayout(*["output"] * 4)`.

    output row i: softmax over all of its own keys and over those keys of each other picture's subject that
    dropout keeps. Dropout is drawn for each picture and step. All layers of one size share it. By default
    from the second of 50 steps on, in all self-attention layers of the up blocks.

    Subjects are the labels other than 0 of `attach(..., regions=Regions(structure=[mask_1, ..., mask_4]))`,
    one map for each output. Appearance rows have theirs in `appearance`. Without regions, all of a picture is
    subject.

    >>> import torch
    >>> from qalign import BatchLayout, ConsiStory, Site
    >>> q, k, v = torch.randn(3, 4, 2, 16, 8)
    >>> site = Site(BatchLayout(*["output"] * 4))
    >>> ConsiStory().attend(q, k, v, site).shape
    torch.Size([4, 2, 16, 8])

    Args:
        dropout: the share of a subject's keys that the other pictures do not see.
        anchors: the number of outputs, from the first on, that the others see. None is all.
        seed: of the dropout. It depends only on the seed, the step, the picture's number and the number of
            tokens. It is drawn on the CPU.

    Raises:
        ValueError: `dropout` is no fraction below 1.

    Notes:
        An appearance row is an anchor of an earlier run: others see it, and it sees no others. Three parts of
        the paper are not here. One blends queries with those of a second run without the method (0.9 to 0.818
        in the first tenth of the steps). One injects features of the nearest token, found by DIFT in a
        finished run. One makes masks of the run's cross-attention.

    Source: ConsiStory, arXiv 2402.03286.
    """

    card: ClassVar[Card] = Card(
        "ConsiStory",
        "2402.03286",
        "own keys and the subjects of the other outputs, with dropout",
        "up blocks",
        "2 to 50 of 50",
        "attention (counts, labels)",
        2.5,
    )
    default_steps: ClassVar[tuple[float, float] | None] = (1 / 50, 1.0)

    dropout: float = 0.5
    anchors: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a fraction from 0 to below 1, got {self.dropout!r}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.idle:
            return site.plain(q, k, v)
        output, companions = site.output_rows(q), site.companion_rows(q)
        pictures = [
            (rows, "structure", number, len(companions))
            for number, rows in enumerate(companions[: self.anchors])
        ]
        if "appearance" in site.layout.roles:
            references = site.references(q)
            pictures += [
                (rows, "appearance", number, len(references)) for number, rows in enumerate(references)
            ]
        segments = [site.own(k, v, output)]
        for place, (rows, picture, number, count) in enumerate(pictures):
            kept = (drawn(k.shape[2], self.seed, site.position, place) >= self.dropout).to(q.device)
            others = (rows != output)[:, None, None]  # a row sees its own keys only once
            labels = site.subject_labels(k, rows, picture, number, count)
            segments.append(Segment(k, v, counts=(kept & others).int(), labels=labels, batch_index=rows))
        return site.merge(
            q, k, v, attention(take(q, output), segments, scale=site.scale, query_labels=site.open_labels(q))
        )

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return decoder_layers(names)
