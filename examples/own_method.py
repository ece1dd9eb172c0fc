"""A method outside the package: the output's own attention, blended with attention to the appearance.

python examples/own_method.py runs it on tensors. In the folder of the examples the commands take it too:
python -m qalign transfer --method own_method:Blend --appearance A.png --structure B.png --out O.png
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qalign import BatchLayout, Editing, Site, take
from qalign_kernels import attention


@dataclass(frozen=True, kw_only=True)
class Blend(Editing):
    """(1 - w) softmax(s Q_out K_outᵀ) V_out + w softmax(s Q_out K_appᵀ) V_app.

    Args:
        weight: w, between 0 (plain self-attention) and 1 (the appearance's keys and values alone).
    """

    weight: float = 0.5

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        appearance, labels = site.reference(k, v, reference), site.query_labels(q)
        read = attention(take(q, output), appearance, scale=site.scale, query_labels=labels)
        return torch.lerp(site.stock(q, k, v, output), read, self.weight)


if __name__ == "__main__":
    query, key, value = torch.randn(3, 3, 2, 16, 8).unbind(0)  # rows output, appearance, structure
    site = Site(BatchLayout("output", "appearance", "structure"))
    print(list(Blend(weight=0.3).attend(query, key, value, site).shape))
