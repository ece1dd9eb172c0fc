"""ConsiStory: pictures of a batch that see the subject of each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import Segment, attention

from ..context.layer_call import Site, take
from ..context.layers import decoder_layers
from ._editing import Card, Editing, uniform


@dataclass(frozen=True, kw_only=True)
class ConsiStory(Editing):
    """Subject-driven self-attention over the outputs of a batch: `BatchLayout(*["output"] * 4)`, and appearance rows if there are any.

    output row i: softmax over all of its own keys and, of each other picture, the keys of its subject that dropout keeps. Dropout is drawn for
    each picture and step, and shared by all layers of one size. From the second of 50 steps on, in all self-attention layers of the up blocks.

    Subjects are the labels other than 0 of `attach(..., regions=Regions(structure=[mask_1, ..., mask_4]))`, one map for each output and, as
    `appearance`, for each appearance row; without regions a picture is all subject.

    Args:
        dropout: the share of a subject's keys that the others do not see.
        anchors: only the first so many outputs are seen by the others; None: all.
        seed: of the dropout, which is a function of it, the step, the picture's number and the number of tokens. It is drawn on the host: a
            compiled layer breaks its graph there.

    Source: ConsiStory, arXiv 2402.03286. An appearance row is an anchor of an earlier run: it is seen and sees nobody.
    Not here: blending queries with those of a run without it (0.9 to 0.818 in the first tenth of the steps), which is a second pass; injecting
    features of the nearest token, found by DIFT in a finished run; masks of the run's cross-attention.
    """

    card: ClassVar[Card] = Card(
        "ConsiStory",
        "2402.03286",
        "K, V + subjects of the others, dropout",
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
            kept = (uniform(k.shape[2], self.seed, site.step, place) >= self.dropout).to(q.device)
            others = (rows != output)[:, None, None]  # its own keys a row sees once
            labels = site.subject_labels(k, rows, picture, number, count)
            segments.append(Segment(k, v, counts=(kept & others).int(), labels=labels, batch_index=rows))
        return site.merge(
            q, k, v, attention(take(q, output), segments, scale=site.scale, query_labels=site.open_labels(q))
        )

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return decoder_layers(names)
