"""Object masks out of a UNet's own attention: head-averaged maps, clusters of tokens, and the clusters that a word of the prompt attends to."""

import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qalign_kernels import mean_attention_map

from ..context.layers import halved, token_grid
from ..context.regions import Regions
from ..processors.attach import NOT_SPATIAL, find_unet
from ..processors.unet import is_unet_attention, project

FEW_TOKENS, MOST_TOKENS = 1024, 4096  # one map takes 4 MiB, 64 MiB
THRESHOLDS = {"relative": 1.4, "absolute": 0.35}
NOT_OBJECTS = ("image", "photo", "picture")
AFTER_THE_OBJECT = (
    r"[,.;:]|\b(?:above|against|among|at|before|behind|beside|by|from|in|near|on|over|under|with)\b"
)
_log = logging.getLogger("qalign")


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """What a `MapCollector` collected, for each of its rows.

    Attributes:
        self_map: float32 [B, N, N], from each token of `grid` to each.
        grid: (height, width) of the N tokens.
        cross_map: float32 [B, n, T], from each token of `cross_grid` to each token of the text.
        cross_grid: (height, width) of the n tokens.
        size: (height, width) of the latents.
    """

    self_map: Tensor
    grid: tuple[int, int]
    cross_map: Tensor
    cross_grid: tuple[int, int]
    size: tuple[int, int]


class MapCollector:
    """Collects the head-averaged attention maps of a UNet while it runs inside the `with` block.

    >>> with MapCollector(pipe, rows=(1, 2)) as collector:
    ...     noise = pipe.unet(latents, timestep, encoder_hidden_states=prompts).sample
    >>> masks = object_masks(collector.maps(), noun_tokens(pipe.tokenizer, "a photo of a zebra", "zebra"))

    It looks at what comes into the transformer blocks' attention, in encoder and decoder: the processors stay as they are and the results
    what they are, and a row that a method edits is mapped with its own keys. Attention masks are left out.

    Args:
        pipe_or_model: a diffusers pipeline with a UNet, or the UNet. What torch.compile has compiled before is not seen.
        rows: of the batch; None is all.
        self_tokens: of the self-attention to map, at most 4096; None is the finest grid of at most 1024.
        cross_tokens: of the cross-attention to map, at most 4096; None is half the grid of the self-attention, or the same grid where no
            layer has half.
        average: True: the mean over layers and calls. False: what the last layer of the last call has.

    Memory: fp32 [rows, N, N], twice while averaging; never a map of one head. Without averaging, only queries and keys until `maps()`.
    Source: average: self-segmentation, arXiv 2303.11306; last: Cross-Image attention, arXiv 2311.03335, with 1024 and 4096 tokens.
    """

    def __init__(
        self,
        pipe_or_model: Any,
        *,
        rows: Sequence[int] | None = None,
        self_tokens: int | None = None,
        cross_tokens: int | None = None,
        average: bool = False,
    ) -> None:
        for name, tokens in (("self_tokens", self_tokens), ("cross_tokens", cross_tokens)):
            if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
                raise ValueError(f"{name}: expected None or an integer of 1 to {MOST_TOKENS}, got {tokens!r}")
        self.model = find_unet(pipe_or_model)
        self.rows = None if rows is None else list(rows)
        self.self_tokens, self.cross_tokens = self_tokens, cross_tokens
        self._kind: type[_Last | _Mean] = _Mean if average else _Last
        self._size = (0, 0)
        self._self: dict[int, _Last | _Mean] = {}  # by number of tokens
        self._cross: dict[int, _Last | _Mean] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for name, module in self.model.named_modules():
            if _is_mapped(name, module):
                self._handles.append(module.register_forward_pre_hook(self._look, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def maps(self) -> AttentionMaps:
        """The maps of what has run so far.

        Raises:
            RuntimeError: no layer with these numbers of tokens has run. ValueError: their grids are not the latents' halved.
        """
        tokens = self.self_tokens or max(self._self, default=0)
        _require("self_tokens", tokens, self._self)
        grid = token_grid(self._size, tokens)
        half = halved(grid)
        cross_tokens = self.cross_tokens or (
            half[0] * half[1] if half[0] * half[1] in self._cross else tokens
        )
        _require("cross_tokens", cross_tokens, self._cross)
        return AttentionMaps(
            self._self[tokens].map(),
            grid,
            self._cross[cross_tokens].map(),
            token_grid(self._size, cross_tokens),
            self._size,
        )

    def _begin(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
        if self._size != (height, width):
            self._size = (height, width)
            self._self.clear()
            self._cross.clear()

    @torch.no_grad()
    def _look(self, attn: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden_states, context = args[0], kwargs.get("encoder_hidden_states")
        tokens, of_self = hidden_states.shape[1], context is None
        chosen, most = (self.self_tokens, FEW_TOKENS) if of_self else (self.cross_tokens, MOST_TOKENS)
        if tokens != chosen if chosen else tokens > most:
            return
        if isinstance(context, tuple):  # of an IP-Adapter: the text, then pictures
            context = context[0]
        if self.rows is not None:
            hidden_states, context = hidden_states[self.rows], None if context is None else context[self.rows]
        query, key, _ = project(attn, hidden_states, context)
        (self._self if of_self else self._cross).setdefault(tokens, self._kind()).add(query, key, attn.scale)


class _Last:
    """The features that came last; their map is taken when it is asked for."""

    def add(self, query: Tensor, key: Tensor, scale: float) -> None:
        self.query, self.key, self.scale = query, key, scale

    @torch.no_grad()
    def map(self) -> Tensor:
        return mean_attention_map(self.query, self.key, scale=self.scale)


class _Mean:
    """The mean of all maps that came."""

    mean: Tensor

    def __init__(self) -> None:
        self.count = 0

    def add(self, query: Tensor, key: Tensor, scale: float) -> None:
        new = mean_attention_map(query, key, scale=scale)
        self.count += 1
        self.mean = new if self.count == 1 else new.lerp_(self.mean, 1 - 1 / self.count)

    def map(self) -> Tensor:
        return self.mean


def object_masks(
    maps: AttentionMaps,
    noun: Sequence[int],
    others: Sequence[Sequence[int]] = (),
    *,
    size: tuple[int, int] | None = None,
    clusters: int = 5,
    seed: int = 1,
    rule: str = "relative",
    threshold: float | None = None,
) -> Tensor:
    """Where each row shows the object: `object_clusters` of `segment`, to the nearest token.

    A row in which no cluster passes, and every row where `noun` is empty, is object everywhere; a warning says so once.

    Args:
        maps: from `MapCollector.maps`.
        noun: the places in the text of the word for the object, as `noun_tokens` finds them.
        others: those of further nouns, of which a cluster may rather be.
        size: (height, width) of the masks; None: the latents'.
        clusters, seed: as `segment`. rule, threshold: as `object_clusters`.

    Returns:
        bool [B, height, width].
    """
    size = size or maps.size
    everywhere = torch.ones(maps.self_map.shape[1], dtype=torch.bool, device=maps.self_map.device)
    masks = []
    for self_map, cross_map in zip(maps.self_map, maps.cross_map):
        mask = ~everywhere
        if noun:
            noun_maps = torch.stack(
                [noun_map(cross_map, places, maps.cross_grid, maps.grid) for places in (noun, *others)]
            )
            mask = object_clusters(
                segment(self_map, clusters=clusters, seed=seed), noun_maps, rule=rule, threshold=threshold
            )
        if not mask.any():
            _warn_once(
                "no cluster of tokens attends enough to it" if noun else "no word of the prompt names it"
            )
            mask = everywhere
        masks.append(mask)
    return (
        F.interpolate(torch.stack(masks).unflatten(-1, maps.grid).unsqueeze(1).float(), size, mode="nearest")
        .squeeze(1)
        .bool()
    )


def object_regions(masks: Tensor) -> Regions:
    """The masks of an appearance and a structure as regions: 1 the object, 0 the background, so that each reads its own kind alone.

    Where a mask is one kind throughout, as `object_masks` gives it where no object is found, nothing is restricted: both pictures are 0.
    Neither label is `Regions.background`, which would see the object and be seen by it: with two labels that restricts nothing.

    Args:
        masks: bool [2, h, w], appearance and structure.
    """
    told = bool((masks.any((1, 2)) & ~masks.all((1, 2))).all())
    appearance, structure = masks.long() if told else torch.zeros_like(masks, dtype=torch.int64)
    return Regions(appearance=appearance, structure=structure)


def segment(
    self_map: Tensor, *, clusters: int = 5, seed: int = 1, starts: int = 10, centres: Tensor | None = None
) -> Tensor:
    """Clusters of tokens that attend alike: k-means on the rows of their attention map, the best of some starts.

    Args:
        self_map: [N, N].
        clusters: k, at most N.
        seed: of the starts. starts: how many.
        centres: [k, N], the one start, in place of those; None: random ones.

    Returns:
        int64 [N] in [0, k). Deterministic. Needs scikit-learn, on the CPU.
    Source: arXiv 2303.11306.
    """
    if not 1 <= clusters <= len(self_map):
        raise ValueError(f"clusters: expected an integer of 1 to N={len(self_map)}, got {clusters!r}")
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    begin: dict[str, Any] = (
        {"n_init": starts} if centres is None else {"n_init": 1, "init": centres.float().cpu().numpy()}
    )
    with threadpool_limits(1):  # threads would add up in any order
        labels = KMeans(clusters, random_state=seed, **begin).fit_predict(self_map.float().cpu().numpy())
    return torch.from_numpy(labels).to(self_map.device, torch.int64)


def object_clusters(
    labels: Tensor, noun_maps: Tensor, *, rule: str = "relative", threshold: float | None = None
) -> Tensor:
    """Which tokens lie in clusters of the first noun.

    s_cm = mean of map m over cluster c; c is of noun argmax_m s_cm, if max_m s_cm > bar; c is background otherwise

    Args:
        labels: int64 [N], the cluster of each token.
        noun_maps: [nouns, N], as `noun_map` gives them.
        rule: "relative": bar = threshold x the mean of max_m s_cm over all clusters but the highest. "absolute": bar = threshold.
        threshold: None: 1.4 relative, 0.35 absolute.

    Returns:
        bool [N].
    Source: relative: Cross-Image attention, arXiv 2311.03335; absolute: self-segmentation, arXiv 2303.11306.
    """
    if rule not in THRESHOLDS:
        raise ValueError(f"rule: expected one of {', '.join(THRESHOLDS)}, got {rule!r}")
    threshold = THRESHOLDS[rule] if threshold is None else threshold
    labels = labels.unique(return_inverse=True)[1]
    members = F.one_hot(labels).to(noun_maps.dtype)
    scores, nouns = (noun_maps @ members / members.sum(0)).max(0)
    bar = threshold * scores.sort().values[:-1].mean() if rule == "relative" else threshold
    return ((scores > bar) & (nouns == 0))[labels]


def noun_map(
    cross_map: Tensor, places: Sequence[int], grid: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """How much each token attends to a word: (m - |min m|) / max m of the mean m over its places in the text, each token repeated.

    Args:
        cross_map: [n, T]. places: of the word. grid: (height, width) of the n tokens. size: that of the result.

    Returns:
        [height x width] of `size`.
    """
    mean = cross_map[:, list(places)].mean(-1)
    scaled = (mean - mean.min().abs()) / mean.max()
    return F.interpolate(scaled.view(1, 1, *grid), size, mode="nearest").flatten()


def noun_tokens(tokenizer: Any, prompt: str, noun: str) -> tuple[int, ...]:
    """The places of a word, or of several in a row, among the tokens of a prompt: all tokens of it, wherever it stands.

    Raises:
        ValueError: the prompt does not have the word, or only behind the last token that the tokenizer keeps.
    """
    spans = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(noun)}(?!\w)", prompt, re.IGNORECASE)]
    if not noun or not spans:
        raise ValueError(f"noun: expected a word of the prompt {prompt!r}, got {noun!r}")
    bounds = [
        [len(tokenizer(prompt[:end]).input_ids) - 1 for end in span] for span in spans
    ]  # the end token is not before it
    places = tuple(
        place
        for first, after in bounds
        for place in range(first, after)
        if place < tokenizer.model_max_length - 1
    )
    if not places:
        raise ValueError(
            f"noun: expected a word among the first {tokenizer.model_max_length} tokens, got {noun!r}"
        )
    return places


def default_noun(prompt: str) -> str | None:
    """What a prompt is about, by rule of thumb: its last word before a preposition of place or a comma; "a red zebra on grass": zebra."""
    words = re.findall(r"\w+", re.split(AFTER_THE_OBJECT, prompt, maxsplit=1, flags=re.IGNORECASE)[0])
    return words[-1] if words and words[-1].lower() not in NOT_OBJECTS else None


def _is_mapped(name: str, module: nn.Module) -> bool:
    parts = name.split(".")
    return (
        parts[0] in ("down_blocks", "up_blocks")
        and "transformer_blocks" in parts
        and not set(parts) & set(NOT_SPATIAL)
        and is_unet_attention(module)
    )


def _require(name: str, tokens: int, seen: dict[int, Any]) -> None:
    if tokens not in seen:
        found = (
            f"{', '.join(map(str, sorted(seen)))} tokens"
            if seen
            else "none (nothing ran inside the with block, or compiled, or too large)"
        )
        raise RuntimeError(
            f"{name}: expected layers with {tokens or f'at most {FEW_TOKENS}'} tokens to have run, got {found}"
        )


@functools.cache
def _warn_once(reason: str) -> None:
    _log.warning("masks: the object is not found (%s): the whole picture is taken as object", reason)
