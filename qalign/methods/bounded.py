"""Bounded attention: subjects in one picture that do not see each other."""

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

ONLY_BACKGROUND = torch.iinfo(torch.int32).min  # the sign bit, which no label has
ALL_BUT_BACKGROUND = torch.iinfo(torch.int32).max


@dataclass(frozen=True, kw_only=True)
class BoundedAttention(Editing):
    """Attention without leakage between the subjects of a picture.

    Self-attention of the output rows: softmax over own keys j with label(j) = label(i), or either of both background. The labels are those of
    `attach(..., regions=Regions(structure=..., background=0))`: one for each subject's box or mask. Every self-attention layer, every step.

    Cross-attention, with `subject_tokens`, in every such layer, whatever `attach(layers=...)` names, and in the conditional half of the output rows
    alone: a query sees of the subjects' tokens its own subject's, no filter token, and all other tokens; a background query sees no subject's token
    and not the end of the prompt, or, `optimized`, every subject's and the end too. As bit sets that have to meet: a subject's token its label's
    bit, filter tokens none, the end all but the sign bit, other tokens all; a subject's query its label's bit, the background's the sign bit, or,
    `optimized`, all.

    Args:
        subject_tokens: by label, where the subject's words stand among the prompt's tokens, the start token being 0; {} leaves cross-attention
            alone. A token of several subjects is seen by each.
        filter_tokens: of words that tell nothing of a subject, such as determiners, prepositions and numbers, hidden from every query.
        eos_token: of the end of the prompt: the number of the prompt's tokens plus one. Needed with `subject_tokens`.
        optimized: the form that holds while the latents are optimised by the guidance loss; False: while they are denoised.

    Without guidance parts, or where the two are separate calls, every call counts as conditional.

    Source: Bounded Attention, arXiv 2403.16990.
    Not here, but in `BoundedAttentionPipeline`: guidance by its loss, refinement of boxes to masks, the places of words in the prompt. Nowhere: a
    picture's token in several subjects (give the overlap a label of its own, which then sees itself and the background).
    """

    card: ClassVar[Card] = Card(
        "Bounded attention",
        "2403.16990",
        "subjects do not see each other",
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
            raise ValueError(
                f"subject_tokens, filter_tokens, eos_token: expected places of 0 and more, got {min(self._places)}"
            )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.idle:
            return site.plain(q, k, v)
        labels = self._regions(site).keys("structure", q.shape[2], q.device)
        output = site.output_rows(q)
        segment = site.own(k, v, output, regions=labels)
        return site.merge(q, k, v, attention(take(q, output), segment, scale=site.scale, query_labels=labels))

    def attend_cross(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.idle or not self.subject_tokens:
            return site.plain(q, k, v)
        regions, tokens = self._regions(site), k.shape[2]
        if regions.background in self.subject_tokens:
            raise ValueError(
                f"subject_tokens: expected labels of subjects, got {regions.background}, which is the background's"
            )
        if max(self._places) >= tokens:
            raise ValueError(
                f"subject_tokens, filter_tokens, eos_token: expected places below the prompt's {tokens}, got {max(self._places)}"
            )
        output = site.output_rows(q)
        conditional, others = site.conditional(output, q), site.unconditional(output, q)
        labels = regions.keys("structure", q.shape[2], q.device)
        queries = (
            labels if self.optimized else torch.where(labels == EVERYTHING, ONLY_BACKGROUND, labels).int()
        )
        segment = site.own(k, v, conditional, regions=self.token_labels(tokens, q.device))
        edited = attention(take(q, conditional), segment, scale=site.scale, query_labels=queries)
        return site.merge(
            q, k, v, torch.cat([site.stock(q, k, v, others), edited]) if others.numel() else edited
        )

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return list(names)

    def cross_layers(self, names: Sequence[str]) -> list[str]:
        return list(names) if self.subject_tokens else []

    def token_labels(self, tokens: int, device: torch.device) -> Tensor:
        """Bit sets int32 [1, T] of a prompt's tokens, which a query sees where they meet its own."""
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
    """Bit sets int32 [1, T] of a prompt's tokens."""
    labels = [EVERYTHING] * tokens
    for place in {place for _, places in subjects for place in places} | set(filters):
        labels[place] = 0
    for label, places in subjects:
        for place in places:
            labels[place] |= 1 << label
    labels[eos] = ALL_BUT_BACKGROUND
    with torch.inference_mode(False):  # autograd must be able to keep it
        return torch.tensor([labels], dtype=torch.int32, device=device)
