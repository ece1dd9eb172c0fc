"""Object masks from a UNet's own attention: clusters of tokens, and the clusters of a word of the prompt."""

import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from ..context.regions import Regions
from .attention_maps import AttentionMaps

THRESHOLDS = {"relative": 1.4, "absolute": 0.35}
NOT_OBJECTS = ("image", "photo", "picture")
AFTER_THE_OBJECT = (
    r"[,.;:]|\b(?:above|against|among|at|before|behind|beside|by|from|in|near|on|over|under|with)\b"
)
_log = logging.getLogger("qalign")


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
    """Compute where each row shows the object.

    The tokens are clustered by `segment`, and `object_clusters` selects the clusters of the noun. If no
    cluster passes or `noun` is empty, the whole row is object, and a warning says so once.

    Args:
        maps: from `MapCollector.maps`.
        noun: the places of the object's word among the tokens of the prompt, from `noun_tokens`.
        others: the places of further nouns. A cluster goes to the noun with the highest score.
        size: (height, width) of the masks. None is the size of the latents.
        clusters: as `segment`.
        seed: as `segment`.
        rule: as `object_clusters`.
        threshold: as `object_clusters`.

    Returns:
        bool [B, height, width], by the nearest token.

    Raises:
        ValueError: an argument is invalid; the message names it.

    Example:
        >>> from qalign.sampling.attention_maps import AttentionMaps
        >>> halves = torch.arange(16) % 4 < 2
        >>> self_map = (halves[:, None] == halves).float() / 8
        >>> maps = AttentionMaps(self_map[None], (4, 4), halves[None, :, None].float(), (4, 4), (4, 4))
        >>> object_masks(maps, (0,), clusters=2, rule="absolute")[0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 0, 0]], dtype=torch.int32)

    Notes:
        The result is deterministic. k-means needs scikit-learn and runs on the CPU.
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
                "no cluster of tokens attends enough to it" if noun else "the prompt has no word for it"
            )
            mask = everywhere
        masks.append(mask)
    return (
        F.interpolate(torch.stack(masks).unflatten(-1, maps.grid).unsqueeze(1).float(), size, mode="nearest")
        .squeeze(1)
        .bool()
    )


def object_regions(masks: Tensor) -> Regions:
    """Make regions of the masks of an appearance and a structure: 1 is the object, 0 the background.

    Object then reads object and background reads background. If one of the masks is the same everywhere,
    the object was not found: both maps are 0, which restricts nothing. Neither label is
    `Regions.background`, for that label would read and be read by the object.

    Args:
        masks: bool [2, h, w], of appearance and structure.

    Returns:
        the regions, with maps [h, w].

    Example:
        >>> masks = torch.tensor([[[True, False]], [[False, True]]])
        >>> regions = object_regions(masks)
        >>> regions.appearance.tolist(), regions.structure.tolist()
        ([[1, 0]], [[0, 1]])
    """
    divided = bool((masks.any((1, 2)) & ~masks.all((1, 2))).all())
    appearance, structure = masks.long() if divided else torch.zeros_like(masks, dtype=torch.int64)
    return Regions(appearance=appearance, structure=structure)


def segment(
    self_map: Tensor, *, clusters: int = 5, seed: int = 1, starts: int = 10, centres: Tensor | None = None
) -> Tensor:
    """Cluster tokens that attend alike, by k-means on the rows of their attention map.

    Args:
        self_map: [N, N].
        clusters: k, 1 to N.
        seed: of the starts.
        starts: the number of random starts; the best one counts.
        centres: [k, N], the only start, in place of the random ones.

    Returns:
        int64 [N] in [0, k).

    Raises:
        ValueError: `clusters` is outside 1 to N.

    Example:
        >>> map = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)) / 2
        >>> labels = segment(map, clusters=2)
        >>> bool(labels[0] == labels[1]), bool(labels[0] == labels[2])
        (True, False)

    Notes:
        The result is deterministic. It needs scikit-learn and runs on the CPU.

    Source: arXiv 2303.11306.
    """
    if not 1 <= clusters <= len(self_map):
        raise ValueError(f"clusters: expected an integer of 1 to N={len(self_map)}, got {clusters!r}")
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    begin: dict[str, Any] = (
        {"n_init": starts} if centres is None else {"n_init": 1, "init": centres.float().cpu().numpy()}
    )
    with threadpool_limits(1):  # several threads would sum in a random order
        labels = KMeans(clusters, random_state=seed, **begin).fit_predict(self_map.float().cpu().numpy())
    return torch.from_numpy(labels).to(self_map.device, torch.int64)


def object_clusters(
    labels: Tensor, noun_maps: Tensor, *, rule: str = "relative", threshold: float | None = None
) -> Tensor:
    """Select the tokens in clusters of the first noun.

    s_cm is the mean of map m over cluster c. Cluster c belongs to noun argmax_m s_cm if max_m s_cm > bar,
    and to the background otherwise.

    Args:
        labels: int64 [N], the cluster of each token.
        noun_maps: [nouns, N], from `noun_map`.
        rule: "relative": bar = threshold x the mean of max_m s_cm over all clusters but the highest.
            "absolute": bar = threshold.
        threshold: None is 1.4 for "relative" and 0.35 for "absolute".

    Returns:
        bool [N].

    Raises:
        ValueError: `rule` is another word.

    Example:
        >>> maps = torch.tensor([[0.9, 0.7, 0.1, 0.1]])
        >>> object_clusters(torch.tensor([0, 0, 1, 1]), maps, rule="absolute").tolist()
        [True, True, False, False]

    Source: "relative", Cross-Image attention, arXiv 2311.03335; "absolute", self-segmentation,
    arXiv 2303.11306.
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
    """Map how much each token attends to a word.

    (m - |min m|) / max m,  m the mean over the word's places

    Args:
        cross_map: [n, T].
        places: of the word among the T tokens of the text.
        grid: (height, width) of the n tokens.
        size: (height, width) of the result. Tokens are repeated.

    Returns:
        [height x width].

    Example:
        >>> noun_map(torch.tensor([[0.5], [0.0]]), (0,), (1, 2), (1, 4)).tolist()
        [1.0, 1.0, 0.0, 0.0]
    """
    mean = cross_map[:, list(places)].mean(-1)
    scaled = (mean - mean.min().abs()) / mean.max()
    return F.interpolate(scaled.view(1, 1, *grid), size, mode="nearest").flatten()


def noun_tokens(tokenizer: Any, prompt: str, noun: str) -> tuple[int, ...]:
    """Find the places of a word among the tokens of a prompt, as stock's `encode_prompt` encodes it.

    Args:
        tokenizer: of the pipeline. A textual inversion of several vectors is several tokens.
        prompt: one prompt.
        noun: a word, or several in a row. Upper and lower case are the same.

    Returns:
        the places of all of its tokens, wherever the word occurs.

    Raises:
        ValueError: the prompt does not have the word, or only after the last token that the tokenizer
            keeps.

    Example:
        >>> noun_tokens(pipe.tokenizer, "a cat", "cat")  # a tokenizer of single letters
        (2, 3, 4)
    """
    found = _all_places(tokenizer, prompt, noun)
    if not found:
        raise ValueError(f"noun: expected a word of the prompt {prompt!r}, got {noun!r}")
    places = tuple(place for place in found if place < tokenizer.model_max_length - 1)
    if not places:
        raise ValueError(
            f"noun: expected a word among the first {tokenizer.model_max_length} tokens, got {noun!r}"
        )
    return places


def word_places(tokenizer: Any, prompt: str, word: str) -> tuple[int, ...]:
    """Find the places of a word as `noun_tokens` does, but return none for a word that the prompt lacks.

    Args:
        tokenizer: of the pipeline.
        prompt: one prompt.
        word: a word, or several in a row.

    Returns:
        the places of all of its tokens that the tokenizer keeps.

    Example:
        >>> word_places(pipe.tokenizer, "a cat", "dog")
        ()
    """
    last = tokenizer.model_max_length - 1
    return tuple(place for place in _all_places(tokenizer, prompt, word) if place < last)


def end_place(tokenizer: Any, prompt: str) -> int:
    """Find the place of the end token of a prompt, as stock's `encode_prompt` encodes it.

    Args:
        tokenizer: of the pipeline.
        prompt: one prompt.

    Returns:
        the place after the last token that the tokenizer keeps.

    Example:
        >>> end_place(pipe.tokenizer, "a cat")
        5
    """
    text = _encoded(tokenizer, prompt)
    return len(tokenizer(text, truncation=True, max_length=tokenizer.model_max_length).input_ids) - 1


def default_noun(prompt: str, tokenizer: Any = None) -> str | None:
    """Guess the object of a prompt: its last word before a preposition of place or a comma.

    Args:
        prompt: one prompt.
        tokenizer: of the pipeline. Its textual inversions count as words. None knows of none.

    Returns:
        the word, or None if there is none or it is "image", "photo" or "picture".

    Example:
        >>> default_noun("a red zebra on grass"), default_noun("a photo")
        ('zebra', None)
    """
    added = [] if tokenizer is None else sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
    word = "|".join([*(rf"(?<!\w){re.escape(each)}(?!\w)" for each in added), r"\w+"])
    words = re.findall(word, re.split(AFTER_THE_OBJECT, prompt, maxsplit=1, flags=re.IGNORECASE)[0])
    return words[-1] if words and words[-1].lower() not in NOT_OBJECTS else None


def _encoded(tokenizer: Any, prompt: str) -> str:
    """The text that stock's `encode_prompt` tokenises: each textual inversion as all of its vectors."""
    return TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)


def _all_places(tokenizer: Any, prompt: str, word: str) -> list[int]:
    """The places of a word, also after the last token that the tokenizer keeps.

    A place counts where the text up to the word is encoded as the beginning of the whole prompt is. This
    leaves out a word inside of a token, as `toy` in the textual inversion `<toy>`.
    """
    places: list[int] = []
    text = _encoded(tokenizer, prompt)
    tokens = tokenizer(text).input_ids
    for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) if word else ():
        begun = [_encoded(tokenizer, prompt[:end]) for end in match.span()]
        first, after = (tokenizer(each).input_ids[:-1] for each in begun)  # without the end token
        if all(text.startswith(each) for each in begun) and all(
            each == tokens[: len(each)] for each in (first, after)
        ):
            places += range(len(first), len(after))
    return places


@functools.cache
def _warn_once(reason: str) -> None:
    _log.warning("masks: the object was not found (%s); the whole picture counts as object", reason)
