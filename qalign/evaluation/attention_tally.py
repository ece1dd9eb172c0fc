"""Count, for each part of a scene, where the matches and the attention of a method go.

A token has the label that most pixels of its cell have. The queries are those of the output row, with the
labels of the structure scene. The keys are those of the appearance scene. Each measured layer and step gives
three numbers for each query, averaged over heads:

- right: whether the query's match has the query's label. The match is the argmax of the method's own signal,
which is
  query-query similarity for Q-Align, and the query-key dot product over all heads for other methods;
- own: the attention mass on keys with the query's label;
- background: the attention mass on keys that show background.

The masses are taken before the contrast, where probabilities sum to one. They are measured by a call of the
method with one-hot labels as values, because its output is linear in the values.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qalign_kernels import similarity_argmax

from ..context.layer_call import Site, take
from ..context.layers import token_grid
from ..context.layout import BatchLayout
from ..embedded.scenes import BACKGROUNDS, PARTS, token_labels
from ..methods import CrossImage, QAlign, Wrapped
from ..methods._editing import Editing
from .bootstrap import finite
from .picture_metrics import OBJECT

TALLIED = ("tokens", "counterparts", "right", "own", "background")
Tallies = dict[tuple[str, int], Tensor]  # by layer and step: float64 [PARTS, TALLIED]


class Measured(Wrapped):
    """A method that also counts where its matches and its attention go. Its output does not change.

    Steps that read the keys of the structure cannot leak, and are not measured.

    Args:
        method: the method to measure, such as `QAlign()`.
        labels: int64 [S, S] by role: the labels of the scene that a row of this role shows.
        every: measure steps that are a multiple of this.
    """

    method: Editing

    def __init__(self, method: Editing, labels: Mapping[str, Tensor], *, every: int = 1) -> None:
        super().__init__(method)
        self.labels, self.every = labels, every
        self.tallies: Tallies = {}
        self._tokens: dict[int, dict[str, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        from_structure = site.clock is not None and bool(site.clock.from_structure)
        if not site.idle and not from_structure and site.step % self.every == 0:
            labels = self._row_labels(q, site.layout)
            counts = measure(self.method, q, k, labels, site.output_rows(q), site.reference_rows(q), site)
            self.tallies[site.layer, site.step] = counts.sum(0).cpu()
        return self.method.attend(q, k, v, site)

    def _row_labels(self, q: Tensor, layout: BatchLayout) -> Tensor:
        """int64 [B, N]."""
        tokens = q.shape[2]
        if tokens not in self._tokens:
            self._tokens[tokens] = {
                role: token_labels(labels[None], token_grid(labels.shape, tokens))[0].long().to(q.device)
                for role, labels in self.labels.items()
            }
        rows = torch.stack([self._tokens[tokens][role] for role in layout.roles])
        return rows.repeat(q.shape[0] // len(layout.roles), 1)


def measure(
    method: Editing, q: Tensor, k: Tensor, labels: Tensor, output: Tensor, reference: Tensor, site: Site
) -> Tensor:
    """Count where matches and attention of the rows `output` go in the rows `reference`.

    Args:
        method: the method to measure.
        q, k: [B, H, N, D].
        labels: int64 [B, N], the label of every token of every row.
        output, reference: int32 [rows].
        site: the layer call that the method sees.

    Returns:
        float64 [rows, PARTS, TALLIED].
    """
    index = match(method, q, k, output, reference, site)
    mass = attention_mass(method, q, k, labels, output, reference, site)
    return tally(index, mass, labels[output.long()], labels[reference.long()])


def match(method: Editing, q: Tensor, k: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
    """The reference token that each query matches by the method's own signal: int32 [rows, 1 or H, N]."""
    if isinstance(method, QAlign):
        return method.match(q, output, reference, site).index
    return similarity_argmax(take(q, output), k, similarity="dot", heads="joint", batch_index=reference).index


def attention_mass(
    method: Editing, q: Tensor, k: Tensor, labels: Tensor, output: Tensor, reference: Tensor, site: Site
) -> Tensor:
    """Attention of the rows `output`, before contrast, on each label: float32 [rows, H, N, PARTS]."""
    indicator = F.one_hot(labels, len(PARTS)).float().unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    if isinstance(method, CrossImage) and method.contrast != 1.0:
        method = dataclasses.replace(method, contrast=1.0)
    return method.edit(q.float(), k.float(), indicator, output, reference, site)


def tally(index: Tensor, mass: Tensor, query_labels: Tensor, key_labels: Tensor) -> Tensor:
    """Sum over the queries of each part.

    Args:
        index: int32 [B, 1 or H, N_q], the match of each query.
        mass: [B, H, N_q, PARTS], the attention of each query on each label.
        query_labels: int64 [B, N_q].
        key_labels: int64 [B, N_k].

    Returns:
        float64 [B, PARTS, TALLIED].
    """
    matched = key_labels.unsqueeze(1).expand(-1, index.shape[1], -1).gather(2, index.long())
    right = (matched == query_labels.unsqueeze(1)).double().mean(1)
    mass = mass.double().mean(1)
    own = mass.gather(2, query_labels.unsqueeze(2)).squeeze(2)
    present = F.one_hot(key_labels, len(PARTS)).amax(1).double().gather(1, query_labels)
    background = mass[..., : len(BACKGROUNDS)].sum(-1)
    columns = torch.stack([torch.ones_like(own), present, right, own, background], -1)
    return F.one_hot(query_labels, len(PARTS)).double().mT @ columns


def figures(tallies: Tensor) -> dict[str, Tensor]:
    """The figures over object queries of tallies [..., PARTS, TALLIED]: [...], NaN without queries.

    `part_agreement` is the mean of right for each part, averaged over the parts, so that small parts count as
    much as the body. `token_agreement` and `own_part_mass` are means over queries, and `cross_region_mass` is
    1 - own_part_mass. These four count the queries whose part the appearance shows, too.
    `object_background_leakage` is the mean of background over all object queries.
    """
    tokens, counterparts, right, own, background = tallies[..., OBJECT, :].unbind(-1)
    kept = own.sum(-1) / counterparts.sum(-1)
    return {
        "part_agreement": (right / counterparts).nanmean(-1),
        "token_agreement": right.sum(-1) / counterparts.sum(-1),
        "own_part_mass": kept,
        "object_background_leakage": background.sum(-1) / tokens.sum(-1),
        "cross_region_mass": 1 - kept,
    }


def stacked(tallies: Iterable[Tallies]) -> Tensor:
    """[pairs, layers, steps, PARTS, TALLIED] from the tallies of each pair."""
    tables = []
    for of_pair in tallies:
        steps_first = torch.stack(list(of_pair.values())).unflatten(0, (-1, len(layers_of(of_pair))))
        tables.append(steps_first.transpose(0, 1))
    return torch.stack(tables)


def layers_of(tallies: Tallies) -> list[str]:
    return list(dict.fromkeys(layer for layer, _ in tallies))


def by_layer_and_step(keys: Tallies, tallies: Tensor) -> dict[str, Any]:
    """Each attention figure as a list [layers][steps], averaged over pairs."""
    table = {
        figure: [[finite(x) for x in row] for row in value.nanmean(0).tolist()]
        for figure, value in figures(tallies).items()
    }
    return {"layers": layers_of(keys), "steps": list(dict.fromkeys(step for _, step in keys))} | table


def by_part(tallies: Tensor) -> dict[str, dict[str, float | None]]:
    """Figures of each part, backgrounds too, over all its queries in every pair, layer and step."""
    tokens, counterparts, right, own, background = tallies.flatten(0, 2).sum(0).unbind(-1)
    table = {
        "part_agreement": right / counterparts,
        "own_part_mass": own / counterparts,
        "background_mass": background / tokens,
    }
    return {
        part: {figure: finite(value[number].item()) for figure, value in table.items()}
        for number, part in enumerate(PARTS)
    }
