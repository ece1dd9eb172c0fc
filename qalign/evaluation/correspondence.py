"""Which tokens of two pictures match in the self-attention of a denoiser, and where one token looks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qalign_kernels import Match, mean_attention_map, similarity_argmax

from ..context.layer_call import Site
from ..methods import Method, Wrapped
from .noised_features import noised_features

SIGNALS = {"query_query": "query-query (Q-Align)", "query_key": "query-key (Cross-Image)"}
STRENGTH = 20.0  # of cosine similarity under a softmax, as in `QAlign`


@dataclass(frozen=True, eq=False)
class Capture:
    """The features that one layer matches, [1, H, N, D] each.

    Attributes:
        layer: the name of the layer.
        query: queries of the output row.
        ref_query, ref_key: queries and keys of the appearance row.
    """

    layer: str
    query: Tensor
    ref_query: Tensor
    ref_key: Tensor

    def match(self, signal: str) -> Match:
        """Match each token to the most similar appearance token, over all heads: [1, 1, N].

        Args:
            signal: "query_query" for the cosine of queries, "query_key" for the dot product with keys.
        """
        if signal == "query_query":
            return similarity_argmax(self.query, self.ref_query, similarity="cosine")
        return similarity_argmax(self.query, self.ref_key, similarity="dot")

    def heat(self, token: int, signal: str) -> Tensor:
        """Where `token` looks in the appearance: float32 [N] with sum one.

        "query_key" is softmax(q_i·k_j / sqrt(D)), averaged over heads, as Cross-Image attends. "query_query"
        is softmax(20 cos(q_i, q_j)) over the features of all heads together.
        """
        query = self.query[:, :, token : token + 1]
        if signal == "query_key":
            return mean_attention_map(query, self.ref_key)[0, 0]
        joint, reference = (
            features[0].transpose(0, 1).flatten(1).float() for features in (query, self.ref_query)
        )
        return (STRENGTH * F.cosine_similarity(joint, reference)).softmax(-1)


@dataclass(frozen=True)
class Recording(Wrapped):
    """A method that also keeps the queries and keys of each layer."""

    method: Method
    captures: list[Capture] = field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        output, reference = site.output_rows(q), site.reference_rows(q)
        self.captures.append(Capture(site.layer, q[output], q[reference], k[reference]))
        return self.method.attend(q, k, v, site)


@torch.inference_mode()
def compare(
    pipe: Any,
    structure: Tensor,
    appearance: Tensor,
    prompt: str = "",
    *,
    noise: float = 0.3,
    layers: str | Sequence[str] | None = None,
    seed: int = 0,
) -> list[Capture]:
    """Read queries and keys of two pictures, with independent noise, in one call of the UNet without edits.

    Args:
        pipe: an `AppearanceTransferPipeline`.
        structure, appearance: [3, H, W] in [0, 1], of one size.
        prompt: what both pictures show.
        noise: the timestep, as a fraction of the training timesteps.
        layers: as in `attach`; None is every layer of the decoder.
        seed: of the noise.

    Returns:
        One capture for each layer.

    >>> from qalign import AppearanceTransferPipeline
    >>> captures = compare(AppearanceTransferPipeline.from_pipe(pipe), structure, appearance, prompt)
    >>> captures[0].match("query_query").index.shape == (1, 1, captures[0].query.shape[2])
    True
    """
    timestep = round(noise * (pipe.scheduler.config.num_train_timesteps - 1))
    pictures, timesteps = torch.stack([structure, appearance]), torch.tensor([timestep, timestep])
    kept = noised_features(pipe, pictures, timesteps, prompt, seeds=[seed, seed + 1], layers=layers)
    pipe.maybe_free_model_hooks()
    return [Capture(layer, q[:1], q[1:], k[1:]) for layer, (q, k, _) in kept.items()]


def token_centres(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Token centres [N, 2] (x, y) in pixels, for a `grid` over a picture of `size`, both (height, width).

    >>> token_centres((4, 6), (2, 2)).tolist()
    [[1.5, 1.0], [4.5, 1.0], [1.5, 3.0], [4.5, 3.0]]
    """
    y, x = ((torch.arange(count) + 0.5) * (side / count) for side, count in zip(size, grid))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
