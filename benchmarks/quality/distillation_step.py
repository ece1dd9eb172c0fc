"""One optimisation step of attention distillation through a whole UNet, beside a plain pipeline.

A step computes the features, the loss, the gradient of the latents, and an Adam update. The plain pipeline
has stock attention processors with hooks, the ideal output by `scaled_dot_product_attention`, an L1 loss and
autograd.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, scaled_dot_product_attention

from qalign_kernels import _command_line
from qalign_kernels._files import Files
from qalign_kernels.bench import measure as measurement
from qalign_kernels.bench.measure import DTYPES

from ..suite import rows
from ..suite.rows import Row

MODELS = ("embedded", "sd15")
TIMESTEP, LEARNING_RATE = 401, 0.05


class Model(NamedTuple):
    """A UNet as `AttentionReader` needs it, its condition, and latents of picture and style."""

    unet: Any
    condition: dict[str, Tensor]
    latents: Tensor
    style: Tensor

    def predict(self, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.unet(latents, timestep, return_dict=False, **condition)[0]


class Pipeline(NamedTuple):
    """A differentiable `loss(latents)`, and the sizes [B, H, N, D] of the layers that it reads."""

    loss: Callable[[Tensor], Any]
    sizes: list[list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        choices=MODELS,
        default=MODELS,
        help="embedded, or sd15: the geometry of SD 1.5 with random weights",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, fp32 on the CPU")
    parser.add_argument(
        "--rounds",
        type=_command_line.count,
        default=6,
        metavar="N",
        help="steps of each pipeline (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")


def files(arguments: argparse.Namespace) -> Files:
    return Files(writes=[("--json", arguments.json)] if arguments.json else [])


def run(arguments: argparse.Namespace) -> int:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _command_line.require_device(device)
    dtype = arguments.dtype or ("bf16" if device == "cuda" else "fp32")
    measured: list[Row] = []
    for name in arguments.model:
        measured += measure(make(name, DTYPES[dtype], device), name, dtype, device, arguments.rounds)
        if arguments.json:
            rows.write(arguments.json, measured)
    print(table(measured))
    return 0


def make(name: str, dtype: torch.dtype, device: str) -> Model:
    """Make the embedded model, or a UNet of SD 1.5's geometry with random weights; latents are noise."""
    from diffusers import UNet2DConditionModel

    from qalign import AppearanceTransferPipeline

    torch.manual_seed(0)
    if name == "embedded":
        pipe = AppearanceTransferPipeline.embedded().to(device, dtype)
        unet, side = pipe.unet, pipe.unet.config.sample_size
        condition = pipe.conditions("", *(side * pipe.vae_scale_factor,) * 2)[0]
    else:
        with torch.device(device):
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).to(
                dtype
            )
            condition, side = {"encoder_hidden_states": torch.randn(1, 77, 768, dtype=dtype)}, 64
    latents, style = (torch.randn(1, unet.config.in_channels, side, side, device=device) for _ in range(2))
    return Model(unet.eval(), condition, latents.to(dtype).float(), style.to(dtype).float())


@contextlib.contextmanager
def ours(model: Model) -> Iterator[Pipeline]:
    """Compute the loss by `AttentionReader` and `distillation_loss`, on the default backend."""
    from qalign import AttentionDistillation
    from qalign.sampling.attention_reader import AttentionReader

    method, timestep = (
        AttentionDistillation(content_weight=0.0),
        torch.tensor(TIMESTEP, device=model.latents.device),
    )
    with AttentionReader(model) as read:
        with torch.no_grad():
            style = read(model.style.to(model.unet.dtype), timestep, model.condition)
        sizes = [list(layer.query.shape) for layer in style.values()]
        yield Pipeline(
            lambda latents: method.loss(read(latents.to(model.unet.dtype), timestep, model.condition), style),
            sizes,
        )


@contextlib.contextmanager
def plain(model: Model) -> Iterator[Pipeline]:
    """Compute the loss with stock processors, whose projections are recorded by hooks."""
    from qalign.methods.attention_distillation import Losses
    from qalign.sampling.attention_reader import AttentionReader

    timestep, zero = (
        torch.tensor(TIMESTEP, device=model.latents.device),
        torch.zeros((), device=model.latents.device),
    )
    layers = {name: model.unet.get_submodule(name) for name in AttentionReader(model).layers}
    found: dict[tuple[str, str], Tensor] = {}

    def features(latents: Tensor) -> dict[str, list[Tensor]]:
        """By layer: query, key, value and output, [B, H, N, D]."""
        found.clear()
        model.predict(latents.to(model.unet.dtype), timestep, model.condition)
        return {
            name: [_heads(found[name, part], layer.heads) for part in "qkvo"]
            for name, layer in layers.items()
        }

    def loss(latents: Tensor) -> Losses:
        total = zero
        for name, (query, _, _, output) in features(latents).items():
            with torch.no_grad():
                key, value = style[name]
                ideal = scaled_dot_product_attention(query, key, value)
            total = total + l1_loss(output.float(), ideal.float())
        return Losses(total, total, zero)

    def keep(name: str, part: str) -> Callable:
        def hook(module: Any, inputs: Any, output: Tensor | None = None) -> None:
            found[name, part] = inputs[0] if output is None else output

        return hook

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            for part in "qkv":
                stack.callback(getattr(layer, f"to_{part}").register_forward_hook(keep(name, part)).remove)
            stack.callback(layer.to_out[0].register_forward_pre_hook(keep(name, "o")).remove)
        with torch.no_grad():
            style = {name: parts[1:3] for name, parts in features(model.style).items()}
        yield Pipeline(loss, [list(layer[0].shape) for layer in style.values()])


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H·D] to [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def measure(model: Model, name: str, dtype: str, device: str, rounds: int) -> list[Row]:
    """Measure a step of both pipelines.

    `gradient_difference` is the norm of the difference of the first gradients, over the norm of the plain
    gradient.

    Returns:
        A row for each pipeline.
    """
    from qalign.sampling.attention_reader import frozen, gradient

    backend = "triton" if device == "cuda" else "tiled"
    pipelines: dict[str, Callable[[Model], Any]] = {backend: ours, "eager": plain}
    seconds: dict[str, list[float]] = {provider: [] for provider in pipelines}
    peak_mib, saved_mib, gradients, sizes = {}, {}, {}, []
    with frozen(model.unet):
        inputs = [*model.unet.parameters(), *model.condition.values()]
        for provider in (backend, "eager", "eager", backend):
            with pipelines[provider](model) as pipeline:
                sizes = pipeline.sizes
                if provider not in gradients:
                    latents = model.latents.clone().requires_grad_()
                    loss = partial(pipeline.loss, latents)
                    saved_mib[provider], losses = measurement.saved_mib(loss, inputs)
                    gradients[provider] = gradient(losses.total, latents)
                    del losses
                call = _step(model, pipeline)
                if provider not in peak_mib:
                    peak_of = measurement.cuda_peak_mib if device == "cuda" else measurement.cpu_rise_mib
                    peak_mib[provider] = peak_of(call)
                seconds[provider] += [_time(call, device) for _ in range(math.ceil(rounds / 2))]
    difference = ((gradients[backend] - gradients["eager"]).norm() / gradients["eager"].norm()).item()
    widest = max(sizes, key=lambda size: size[2])
    measured = []
    for provider in pipelines:
        step, memory = f"optimisation_step {name}", (peak_mib[provider], saved_mib[provider])
        row = rows.timed_row(
            step, widest, dtype, device, provider, seconds[provider], peak_mib=memory[0], saved_mib=memory[1]
        )
        off_by = float(f"{difference:.2g}") if provider == backend else None
        measured.append(row._replace(layers=sizes, gradient_difference=off_by))
    return measured


def _step(model: Model, pipeline: Pipeline) -> Callable[[], Any]:
    from qalign.sampling.attention_reader import descend

    latents = model.latents.clone().requires_grad_()
    optimiser = torch.optim.Adam([latents], lr=LEARNING_RATE)
    return lambda: descend(latents, optimiser, pipeline.loss)


def _time(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


COLUMNS = {
    "op": "step",
    "shape": "widest layer",
    "dtype": "dtype",
    "provider": "provider",
    "p20_ms": "p20 ms",
    "p50_ms": "p50 ms",
    "p80_ms": "p80 ms",
    "peak_mib": "peak MiB",
    "saved_mib": "saved MiB",
    "gradient_difference": "gradient off by",
}


def table(measured: list[Row]) -> str:
    """Lay out the rows."""
    return measurement.aligned([*COLUMNS.values()], [rows.cells(row, COLUMNS) for row in measured])
