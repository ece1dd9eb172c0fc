"""Bounded attention: the subjects of a picture do not see each other."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from qalign_kernels import attention

from ..context.layer_call import Site, take
from ..context.regions import EVERYTHING, LARGEST, Regions
from ._editing import Card, Editing

ONLY_BACKGROUND = torch.iinfo(torch.int32).min  # the sign bit, which is no label's bit
ALL_BUT_BACKGROUND = torch.iinfo(torch.int32).max


@dataclass(frozen=True, kw_only=True)
class BoundedAttention(Editing):
    """Draw a picture without leakage between its subjects.

    Self-attention of the output rows: softmax over those own keys j with label(j) = label(i), or with i or j
    in the background. The labels are those of `attach(..., regions=Regions(structure=..., background=0))`:
    one for each subject's box or mask. By default in every self-attention layer, at every step.

    Cross-attention needs `subject_tokens`. It is edited in every cross-attention layer, independent of
    `attach(layers=...)`, and only in the conditional half of the output rows. A subject's query sees its own
    subject's tokens and no other subject's. A background query sees no subject's token and not the end of the
    prompt; if `optimized`, it sees both. No query sees a filter token, and all queries see the other tokens.

    >>> import torch
    >>> from qalign import BatchLayout, BoundedAttention, Regions, Site
    >>> boxes = Regions.from_boxes([(0, 0, 0.5, 1), (0.5, 0, 1, 1)], 4, 4)
    >>> q, k, v = torch.randn(3, 1, 2, 16, 8)
    >>> BoundedAttention().attend(q, k, v, Site(BatchLayout("output"), regions=boxes)).shape
    torch.Size([1, 2, 16, 8])

    Args:
        subject_tokens: for each label, the positions of the subject's words among the prompt's tokens. The
            start token is 0. Every subject of a token sees it. {} does not edit cross-attention.
        filter_tokens: the positions of words that do not describe a subject, such as determiners,
            prepositions and numbers. They are hidden from every query.
        eos_token: the position of the end of the prompt, which is the number of its tokens plus one. It is
            needed with `subject_tokens`.
        optimized: the form that holds while the guidance loss optimises the latents. False is the form of
            denoising.

    Raises:
        ValueError: labels above 30, a negative position, or no `eos_token` where it is needed.

    Notes:
        The rules of cross-attention are bit sets that have to share a bit. A subject's token and its queries
        have the bit of its label. Filter tokens have none. The end has all bits except the sign bit, and
        other tokens have all. Background queries have the sign bit; if `optimized`, they have all. Without
        guidance halves, or if the two are separate calls, every call counts as conditional.
        The guidance loss, the refinement of boxes to masks and the positions of words are in
        `BoundedAttentionPipeline`. A token in several boxes of `Regions.from_boxes` sees the keys of all its
        subjects, as published. Boxes are rounded on the grid of each layer, and masks are resized by torch's
        "nearest-exact", both as published.

    Source: Bounded Attention, arXiv 2403.16990.
    """

    card: ClassVar[Card] = Card(
        "Bounded attention",
        "2403.16990",
        "own keys of the same subject and of the background",
        "all",
        "all",
        "attention (labels)",
        1.0,
    )

    subject_tokens: Mapping[int, Sequence[int]] = field(default_factory=dict, hash=False)
    filter_tokens: Sequence[int] = ()
    eos_token: int | None = None
    optimized: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "subject_tokens", {label: tuple(places) for label, places in self.subject_tokens.items()}
        )
        object.__setattr__(self, "filter_tokens", tuple(self.filter_tokens))
        unknown = [label for label in self.subject_tokens if label not in range(LARGEST + 1)]
        if unknown:
            raise ValueError(f"subject_tokens: expected labels of 0 to {LARGEST}, got {unknown[0]!r}")
        if self.subject_tokens and self.eos_token is None:
            raise ValueError(
                "eos_token: expected the place of the prompt's end because subject_tokens came, got None"
            )
        if self._places and min(self._places) < 0:
            names, got = "subject_tokens, filter_tokens, eos_token", min(self._places)
            raise ValueError(f"{names}: expected places of 0 and more, got {got}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.idle:
            return site.plain(q, k, v)
        labels = self._regions(site).picture_labels("structure", q.shape[2], q.device)
        output = site.output_rows(q)
        segment = site.own(k, v, output, labels=labels)
        return site.merge(q, k, v, attention(take(q, output), segment, scale=site.scale, query_labels=labels))

    def attend_cross(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.idle or not self.subject_tokens:
            return site.plain(q, k, v)
        regions, tokens = self._regions(site), k.shape[2]
        if regions.background in self.subject_tokens:
            background = f"{regions.background}, which is the background's"
            raise ValueError(f"subject_tokens: expected labels of subjects, got {background}")
        if max(self._places) >= tokens:
            names, got = "subject_tokens, filter_tokens, eos_token", max(self._places)
            raise ValueError(f"{names}: expected places below the prompt's {tokens}, got {got}")
        output = site.output_rows(q)
        conditional, others = site.conditional(output, q), site.unconditional(output, q)
        labels = regions.picture_labels("structure", q.shape[2], q.device)
        queries = (
            labels if self.optimized else torch.where(labels == EVERYTHING, ONLY_BACKGROUND, labels).int()
        )
        segment = site.own(k, v, conditional, labels=self.token_labels(tokens, q.device))
        edited = attention(take(q, conditional), segment, scale=site.scale, query_labels=queries)
        return site.merge(
            q, k, v, torch.cat([site.stock(q, k, v, others), edited]) if others.numel() else edited
        )

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return list(names)

    def cross_layers(self, names: Sequence[str]) -> list[str]:
        return list(names) if self.subject_tokens else []

    def token_labels(self, tokens: int, device: torch.device) -> Tensor:
        """Return the labels of a prompt's tokens as bit sets, int32 [1, T]."""
        make = _token_labels.__wrapped__ if torch.compiler.is_compiling() else _token_labels
        return make(tuple(self.subject_tokens.items()), self.filter_tokens, self.eos_token, tokens, device)

    @property
    def _places(self) -> list[int]:
        ends = [] if self.eos_token is None else [self.eos_token]
        return [
            *self.filter_tokens,
            *ends,
            *(place for places in self.subject_tokens.values() for place in places),
        ]

    def _regions(self, site: Site) -> Regions:
        if site.regions is None:
            raise ValueError("regions: expected Regions(structure=...) for BoundedAttention, got None")
        return site.regions


@functools.cache
def _token_labels(
    subjects: tuple[tuple[int, tuple[int, ...]], ...],
    filters: tuple[int, ...],
    eos: int,
    tokens: int,
    device: torch.device,
) -> Tensor:
    labels = [EVERYTHING] * tokens
    for place in {place for _, places in subjects for place in places} | set(filters):
        labels[place] = 0
    for label, places in subjects:
        for place in places:
            labels[place] |= 1 << label
    labels[eos] = ALL_BUT_BACKGROUND
    with torch.inference_mode(False):  # so that autograd can save it
        return torch.tensor([labels], dtype=torch.int32, device=device)
