"""Which tokens of two pictures the self-attention of a denoiser takes for the same: matches, and where one token looks."""

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
    """What one layer matches: the queries of the output row against the queries and keys of the appearance row, [1, H, N, D] each."""

    layer: str
    query: Tensor
    ref_query: Tensor
    ref_key: Tensor

    def match(self, signal: str) -> Match:
        """The appearance token most similar to each token, [1, 1, N], over all heads: by cosine of the queries, or by query-key dot product.

        Args:
            signal: one of `SIGNALS`.
        """
        if signal == "query_query":
            return similarity_argmax(self.query, self.ref_query, similarity="cosine")
        return similarity_argmax(self.query, self.ref_key, similarity="dot")

    def heat(self, token: int, signal: str) -> Tensor:
        """Where `token` looks in the appearance, float32 [N], sums to one.

        query_key: softmax(q_i·k_j / sqrt(D)), heads averaged, as Cross-Image attends; query_query: softmax(20 cos(q_i, q_j)), joint over heads.
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
    """A method, and the queries and keys that it was given in each layer."""

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
    """Queries and keys of two pictures, noised independently, in one stock call of a pipeline's UNet.

    Args:
        pipe: an `AppearanceTransferPipeline`.
        structure, appearance: [3, H, W] in [0, 1], of one size.
        prompt: what both of them show.
        noise: the timestep as a fraction of those of the training.
        layers: as `attach`; None is all of the decoder.
    """
    timestep = round(noise * (pipe.scheduler.config.num_train_timesteps - 1))
    pictures, timesteps = torch.stack([structure, appearance]), torch.tensor([timestep, timestep])
    kept = noised_features(pipe, pictures, timesteps, prompt, seeds=[seed, seed + 1], layers=layers)
    pipe.maybe_free_model_hooks()
    return [Capture(layer, q[:1], q[1:], k[1:]) for layer, (q, k, _) in kept.items()]


def token_centres(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[N, 2] (x, y) in pixels: the centres of the tokens of a `grid` over a picture of `size`, both (height, width)."""
    y, x = ((torch.arange(count) + 0.5) * (side / count) for side, count in zip(size, grid))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
