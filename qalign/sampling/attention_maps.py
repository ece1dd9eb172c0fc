"""Head-averaged attention maps of a UNet, collected while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from qalign_kernels import mean_attention_map

from ..context.layers import halved, token_grid
from ..processors.selection import NOT_SPATIAL, find_unet
from ..processors.unet import is_unet_attention, project

FEW_TOKENS, MOST_TOKENS = 1024, 4096  # one map takes 4 MiB, 64 MiB


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Hold the maps of a `MapCollector` for each of its rows.

    Attributes:
        self_map: float32 [B, N, N], the attention from each token of `grid` to each.
        grid: (height, width) of the N tokens.
        cross_map: float32 [B, n, T], the attention from each token of `cross_grid` to each of the text.
        cross_grid: (height, width) of the n tokens.
        size: (height, width) of the latents.

    Example:
        >>> text = torch.zeros(3, 7, 32)
        >>> with torch.no_grad(), MapCollector(pipe) as collector:
        ...     noise = pipe.unet(latents, torch.tensor(301), encoder_hidden_states=text).sample
        >>> maps = collector.maps()
        >>> maps.self_map.shape, maps.grid, maps.cross_map.shape, maps.cross_grid
        (torch.Size([3, 256, 256]), (16, 16), torch.Size([3, 64, 7]), (8, 8))
    """

    self_map: Tensor
    grid: tuple[int, int]
    cross_map: Tensor
    cross_grid: tuple[int, int]
    size: tuple[int, int]


class MapCollector:
    """Collect the head-averaged attention maps of a UNet while it runs inside the `with` block.

    It reads the inputs of the attention layers in encoder and decoder. Processors and results stay as they
    are. A row that a method edits is mapped with its own keys. Attention masks are left out.

    Args:
        pipe_or_model: a diffusers pipeline with a UNet, or the UNet. Enter the block before torch.compile.
        rows: rows of the batch. None is all.
        self_tokens: the number of tokens of the self-attention layers to map, at most 4096. None is the
            finest grid of at most 1024.
        cross_tokens: the same for cross-attention. None is half the grid of the self-attention in each
            direction, or the same grid if no layer has half.
        average: True takes the mean over layers and calls. False takes the last layer of the last call.

    Raises:
        TypeError: there is no UNet.
        ValueError: a number of tokens is outside 1 to 4096.

    Example:
        >>> from qalign.sampling.object_masks import noun_tokens, object_masks
        >>> embeddings = pipe.encode_prompt([prompt] * 2, "cpu", 1, False)[0]
        >>> with torch.no_grad(), MapCollector(pipe, rows=(0, 1)) as collector:
        ...     noise = pipe.unet(latents[:2], torch.tensor(301), encoder_hidden_states=embeddings).sample
        >>> object_masks(collector.maps(), noun_tokens(pipe.tokenizer, prompt, "zebra")).shape
        torch.Size([2, 16, 16])

    Notes:
        Memory is fp32 [rows, N, N], twice while averaging; a map of one head is never held. Without
        averaging only queries and keys are held until `maps()`.

    Source: with averaging, self-segmentation, arXiv 2303.11306. Without, Cross-Image attention, arXiv
    2311.03335, which maps 1024 and 4096 tokens.
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
        try:
            self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            for name, module in self.model.named_modules():
                if _is_mapped(name, module):
                    self._handles.append(module.register_forward_pre_hook(self._look, with_kwargs=True))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()

    def maps(self) -> AttentionMaps:
        """Return the maps of the calls so far.

        Returns:
            the maps of `rows`. The class shows an example.

        Raises:
            RuntimeError: no layer with these numbers of tokens has run.
            ValueError: the grids are not those of the latents, halved once or more.
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
        if isinstance(context, tuple):  # an IP-Adapter gives (text, pictures)
            context = context[0]
        if self.rows is not None:
            hidden_states, context = hidden_states[self.rows], None if context is None else context[self.rows]
        query, key, _ = project(attn, hidden_states, context)
        (self._self if of_self else self._cross).setdefault(tokens, self._kind()).add(query, key, attn.scale)


class _Last:
    """The last features. Their map is computed in `map`."""

    def add(self, query: Tensor, key: Tensor, scale: float) -> None:
        self.query, self.key, self.scale = query, key, scale

    @torch.no_grad()
    def map(self) -> Tensor:
        return mean_attention_map(self.query, self.key, scale=self.scale)


class _Mean:
    """The mean of all maps."""

    mean: Tensor

    def __init__(self) -> None:
        self.count = 0

    def add(self, query: Tensor, key: Tensor, scale: float) -> None:
        new = mean_attention_map(query, key, scale=scale)
        self.count += 1
        self.mean = new if self.count == 1 else new.lerp_(self.mean, 1 - 1 / self.count)

    def map(self) -> Tensor:
        return self.mean


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
        nothing = "none (no layer ran inside the with block, or it was compiled, or it is too large)"
        found = f"{', '.join(map(str, sorted(seen)))} tokens" if seen else nothing
        wanted = tokens or f"at most {FEW_TOKENS}"
        raise RuntimeError(f"{name}: expected layers with {wanted} tokens to have run, got {found}")
