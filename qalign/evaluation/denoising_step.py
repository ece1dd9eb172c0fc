"""One denoising step over two photographs: unedited, by Q-Align's formula, and by Q-Align as shipped.

The networks have the geometry of Stable Diffusion 1.5 and random weights from a seed. This part of the demo
measures what Q-Align costs, and where matches and attention go. It draws no picture.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qalign_kernels import (
    Match,
    Segment,
    attention,
    attention_with_lse,
    match_counts,
    qalign_attention,
    use_backend,
)

from ..context.layers import short_name
from ..context.layout import BatchLayout
from ..methods import Method, QAlign
from ..processors.attach import Control, attach
from .correspondence import SIGNALS, Capture, Recording
from .peak_memory import PeakMemory
from .photographs import StereoPair, Truth, grid_truth, load_pair

CHANNELS = (320, 640, 1280)
HEADS = 8
TIMESTEP = 301
SOME_QUERIES = 512
PAPER = QAlign()
LAYERS = "up"
VARIANTS = {
    "stock": "without edits",
    "materialised": "Q-Align by its formula",
    "shipped": "Q-Align as shipped",
}


def encode(pair: StereoPair, seed: int) -> Tensor:
    """Encode (appearance, structure) by a small random AutoencoderKL, normalised: [2, 4, S/8, S/8]."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=4,
        sample_size=pair.size,
    ).eval()
    latents = vae.encode(torch.stack([pair.appearance, pair.structure]) * 2 - 1).latent_dist.mode()
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)
    return (latents - mean) / deviation


def build_unet(seed: int, channels: tuple[int, ...] = CHANNELS) -> nn.Module:
    """A random UNet2DConditionModel with the self-attention shapes of Stable Diffusion 1.5."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        layers_per_block=1,
        attention_head_dim=HEADS,  # this configuration calls the number of heads so
        cross_attention_dim=768,
    ).eval()


@dataclass(frozen=True, eq=False)
class Step:
    """The prediction of one denoising step, its time in seconds and its peak memory in MiB."""

    prediction: Tensor
    time_s: float
    attention_s: float
    peak_mib: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of `run`.

    Attributes:
        pair: the photographs.
        report: plain numbers and lists, ready for JSON.
        panels: for each layer of the report, the true correspondence and the matches by signal.
    """

    pair: StereoPair
    report: dict[str, Any]
    panels: list[tuple[Truth, dict[str, Match]]]


@dataclass(frozen=True, eq=False)
class Scene:
    """The inputs of one denoising step, with rows [output, appearance, structure]."""

    unet: nn.Module
    scheduler: Any
    sample: Tensor
    text: Tensor

    def step(self) -> Tensor:
        """Return the model's prediction, and take the scheduler's step."""
        prediction = self.unet(self.sample, TIMESTEP, encoder_hidden_states=self.text).sample
        self.scheduler.step(prediction, TIMESTEP, self.sample)
        if prediction.is_cuda:
            torch.cuda.synchronize(prediction.device)
        return prediction


def build_scene(
    latents: Tensor, seed: int, device: torch.device, channels: tuple[int, ...] = CHANNELS
) -> Scene:
    """Add independent noise of a middle timestep to the latents, and build the UNet."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler.set_timesteps(50)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator)
    appearance, structure = scheduler.add_noise(latents, noise, torch.tensor([TIMESTEP])).unbind(0)
    text = torch.randn(1, 77, 768, generator=generator).expand(3, -1, -1)
    unet = build_unet(seed, channels).to(device)
    return Scene(unet, scheduler, torch.stack([structure, appearance, structure]).to(device), text.to(device))


def control(scene: Scene, method: Method) -> Control:
    """Attach `method` to the self-attention layers of the decoder."""
    return attach(scene.unet, method, layout=BatchLayout("output", "appearance", "structure"), layers=LAYERS)


@contextlib.contextmanager
def edited(scene: Scene, variant: str) -> Iterator[None]:
    """Run Q-Align in the variants that have it. "materialised" computes every N×N map by its formula."""
    with contextlib.ExitStack() as stack:
        if variant != "stock":
            stack.enter_context(control(scene, PAPER))
        if variant == "materialised":
            stack.enter_context(use_backend("reference"))
        yield


def measure(scene: Scene, variant: str) -> Step:
    """Run one denoising step of `variant`, and measure its times and its peak memory."""
    device = scene.sample.device
    started: list[float] = []
    attention_s = 0.0

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def enter(*_: Any) -> None:
        started.append(now())

    def leave(*_: Any) -> None:
        nonlocal attention_s
        attention_s += now() - started.pop()

    with contextlib.ExitStack() as stack:
        stack.enter_context(edited(scene, variant))
        for module in control(scene, PAPER).layers.values():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        memory = stack.enter_context(PeakMemory(device))
        begin = now()
        prediction = scene.step()
        time_s = now() - begin
    return Step(prediction, time_s, attention_s, memory.peak_mib)


def record(scene: Scene) -> list[Capture]:
    """Run one step with Q-Align and keep the queries and keys of the edited layers."""
    recording = Recording(PAPER)
    with control(scene, recording):
        scene.step()
    return recording.captures


def effective_keys(query: Tensor, key: Tensor, counts: Tensor | None = None) -> float:
    """The mean number of keys that a query effectively attends: N if uniform, 1 if one-hot.

    It is exp of the entropy over distinct keys. The entropy is lse - E[logit] - E[log count], and both
    expectations are attention with (key, log count) as values, so no N×N map is formed.
    """
    scale = query.shape[-1] ** -0.5
    weight = (
        torch.zeros(key.shape[:3], device=key.device)
        if counts is None
        else counts.clamp(min=1).log().expand(key.shape[:3])
    )
    output, lse = attention_with_lse(
        query, Segment(key, torch.cat([key, weight.unsqueeze(-1)], -1), counts=counts)
    )
    entropy = lse - scale * (query * output[..., :-1]).sum(-1) - output[..., -1]
    return entropy.exp().mean().item()


def spread_px(place: Tensor) -> float:
    """The rms distance of attended positions from their centre, from attended (x, y, x² + y²)."""
    place = place.double()
    return (place[..., 2] - place[..., 0] ** 2 - place[..., 1] ** 2).clamp(min=0).mean().sqrt().item()


def summarise(taken: Capture, truth: Truth) -> tuple[dict[str, Any], dict[str, Match]]:
    """The figures of one layer, and its matches by signal. Figures of attention use some of the queries."""
    query, ref_query, ref_key = taken.query, taken.ref_query, taken.ref_key
    tokens = query.shape[2]
    matches = {signal: taken.match(signal) for signal in SIGNALS}
    counts = match_counts(matches["query_query"].index, tokens)
    some = query[:, :, :: max(tokens // SOME_QUERIES, 1)]
    position = (truth.position / truth.pitch).to(query.device)  # in tokens: small numbers, for float32
    place = torch.cat([position, position.square().sum(-1, keepdim=True)], -1).expand(1, HEADS, -1, -1)
    readings = {
        "all_keys": attention(some, Segment(ref_key, place)),
        "rearranged": attention(some, Segment(ref_key, place, counts=counts)),
        "guided": qalign_attention(some, ref_query, ref_key, place, refinement="guided"),
    }
    errors = {name: truth.error(match.index.flatten().cpu()) for name, match in matches.items()} | {
        "chance": truth.chance()
    }
    figures = {
        "layer": short_name(taken.layer),
        "tokens": tokens,
        "head_dim": query.shape[3],
        "unique_fraction": (counts > 0).double().mean().item(),
        "judged_tokens": int(truth.known.sum()),
        "median_error_px": {name: error.median().item() for name, error in errors.items()},
        "within_one_token": {
            name: (error <= truth.pitch).double().mean().item() for name, error in errors.items()
        },
        "effective_keys": {
            "all_keys": effective_keys(some, ref_key),
            "rearranged": effective_keys(some, ref_key, counts),
        },
        "attention_spread_px": {name: spread_px(reading) * truth.pitch for name, reading in readings.items()},
    }
    return figures, matches


def agreement(scene: Scene, steps: dict[str, Step]) -> dict[str, float]:
    """The largest differences between predictions, relative to the largest prediction."""
    stock, materialised, shipped = (steps[variant].prediction.double() for variant in VARIANTS)
    largest = shipped.abs().max()
    return {
        "shipped_to_materialised": ((shipped - materialised).abs().max() / largest).item(),
        "output_row_to_stock": ((shipped - stock)[0].abs().max() / largest).item(),
        "reference_rows_to_stock": ((shipped - stock)[1:].abs().max() / largest).item(),
    }


def run(
    *,
    size: int = 512,
    seed: int = 0,
    channels: tuple[int, ...] = CHANNELS,
    progress: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Measure one denoising step of every variant over the photographs.

    Args:
        size: side of the photographs in pixels, a multiple of 32.
        seed: of weights and noise.
        channels: of the UNet's blocks.
        progress: called with a line of text before each part of the work.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        progress(f"photographs: the stereo pair 'motorcycle' of scikit-image, {size}x{size} pixels")
        pair = load_pair(size)
        progress("encode them by a small AutoencoderKL")
        latents = encode(pair, seed)
        progress(f"build the UNet on {describe_device(device)}, with rows [output, appearance, structure]")
        scene = build_scene(latents, seed, device, channels)
        signal = scene.scheduler.alphas_cumprod[TIMESTEP].sqrt().item()
        noise = (1 - signal**2) ** 0.5
        progress(f"first step with Q-Align, timestep {TIMESTEP} ({signal:.2f} signal + {noise:.2f} noise)")
        captures = record(scene)
        steps = _measure_all(scene, progress)
        progress("measure matches and attention of every layer")
        layers, panels = [], []
        for taken in captures:
            truth = grid_truth(pair, taken.query.shape[2])
            figures, matches = summarise(taken, truth)
            layers.append(figures)
            panels.append((truth, matches))
    report = _report(device, steps, agreement(scene, steps), layers) | {"size_px": size, "seed": seed}
    return Outcome(pair, report, panels)


def _report(
    device: torch.device, steps: dict[str, Step], agreed: dict[str, float], layers: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "device": describe_device(device),
        "timestep": TIMESTEP,
        "batch_rows": ["output", "appearance", "structure"],
        "memory": "torch.cuda peak" if device.type == "cuda" else "resident set, sampled every 2 ms",
        "steps": {
            name: {"time_s": s.time_s, "attention_s": s.attention_s, "peak_mib": s.peak_mib}
            for name, s in steps.items()
        },
        "agreement": agreed,
        "layers": layers,
    }


def _measure_all(scene: Scene, progress: Callable[[str], None]) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    for variant, description in VARIANTS.items():
        steps[variant] = measure(scene, variant)
        progress(f"step {description}: {steps[variant].time_s:.1f} s")
    return steps


def describe_device(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
