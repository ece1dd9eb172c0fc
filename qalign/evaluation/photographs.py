"""The first part of the demo: one denoising step over two photographs, stock, with Q-Align materialised, and with Q-Align as shipped.

The photographs are the two views of a stereo pair, so the true correspondence of almost every pixel is known. Nothing is downloaded:
the pictures come with scikit-image, and the networks have the geometry of Stable Diffusion 1.5 with seeded random weights.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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

CHANNELS = (320, 640, 1280)
HEADS = 8
TIMESTEP = 301
CROPS_APART = 120
SOME_QUERIES = 512
PAPER = QAlign()
LAYERS = "up"
VARIANTS = ("stock", "materialised", "shipped")


@dataclass(frozen=True, eq=False)
class StereoPair:
    """Two photographs of one scene, [3, S, S] in [0, 1], and how far each of its points moves to the right from the first to the second.

    `shift` is [S', S'], in pixels of the photographs; infinite where it was not measured.
    """

    structure: Tensor
    appearance: Tensor
    shift: Tensor

    @property
    def size(self) -> int:
        return self.structure.shape[-1]


@dataclass(frozen=True, eq=False)
class Truth:
    """Where the tokens of a square grid truly correspond to.

    Attributes:
        position: [N, 2] token centres in pixels (x, y); the grid is the same in both photographs.
        target: [N, 2] the same points of the scene in the appearance photograph.
        known: bool [N], False where the scene point is hidden, outside the photograph or not measured.
        pitch: pixels from token to token.
    """

    position: Tensor
    target: Tensor
    known: Tensor
    pitch: float

    def error(self, index: Tensor) -> Tensor:
        """Pixels between the matched tokens and the true positions, over the known tokens."""
        return (self.position[index.long()] - self.target).norm(dim=-1)[self.known]

    def chance(self) -> Tensor:
        """The errors of matches drawn at random, 64 for each known token."""
        drawn = torch.randint(
            len(self.position), (64, len(self.position)), generator=torch.Generator().manual_seed(0)
        )
        return torch.cat([self.error(index) for index in drawn])


def load_pair(size: int) -> StereoPair:
    """The stereo photographs that scikit-image ships (Middlebury 2014, motorcycle): two square crops, resized to `size`.

    The crops lie 120 pixels apart, further than the scene shifts between the views, so that no token's match is the token in its own place.
    """
    import skimage
    from PIL import Image

    folder = Path(skimage.__file__).parent / "data"
    disparity = _array(folder / "motorcycle_disp.npz")
    side, width = disparity.shape
    middle = (width - side) // 2

    def picture(name: str, left: int) -> Tensor:
        with Image.open(folder / name) as image:
            resized = (
                image.convert("RGB")
                .crop((left, 0, left + side, side))
                .resize((size, size), Image.Resampling.BICUBIC)
            )
        return (
            torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
            .reshape(size, size, 3)
            .permute(2, 0, 1)
            / 255
        )

    left, right = middle + CROPS_APART // 2, middle - CROPS_APART // 2
    shift = (CROPS_APART - disparity[:, left : left + side]) * (size / side)
    return StereoPair(picture("motorcycle_left.png", left), picture("motorcycle_right.png", right), shift)


def _array(path: Path) -> Tensor:
    import numpy

    with numpy.load(path) as arrays:
        return torch.from_numpy(arrays[arrays.files[0]].astype("float32"))


def grid_truth(pair: StereoPair, tokens: int) -> Truth:
    """The true correspondence at the centres of a square grid of `tokens` tokens."""
    side = round(tokens**0.5)
    pitch = pair.size / side
    centre = (torch.arange(side) + 0.5) * pitch
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    position = torch.stack([x, y], -1).reshape(-1, 2)
    pixel = (centre * (pair.shift.shape[0] / pair.size)).long()
    shift = pair.shift[pixel][:, pixel].reshape(-1)
    target = position + torch.stack([shift.nan_to_num(posinf=0, neginf=0), torch.zeros_like(shift)], -1)
    return Truth(position, target, shift.isfinite() & (0 <= target[:, 0]) & (target[:, 0] < pair.size), pitch)


def encode(pair: StereoPair, seed: int) -> Tensor:
    """Latents [2, 4, S/8, S/8] of (appearance, structure) by a small seeded AutoencoderKL, each channel scaled to mean 0, deviation 1."""
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
    """A UNet2DConditionModel with the self-attention geometry of Stable Diffusion 1.5, fewer layers, and seeded weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        layers_per_block=1,
        attention_head_dim=HEADS,  # of this model's configuration: the number of heads
        cross_attention_dim=768,
    ).eval()


@dataclass(frozen=True, eq=False)
class Step:
    """What one denoising step gave and cost."""

    prediction: Tensor
    time_s: float
    attention_s: float
    peak_mib: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the measured step gave.

    Attributes:
        pair: the photographs.
        report: plain numbers and lists, ready for JSON.
        panels: the truth, and the matches by signal, of each of the report's layers.
    """

    pair: StereoPair
    report: dict[str, Any]
    panels: list[tuple[Truth, dict[str, Match]]]


@dataclass(frozen=True, eq=False)
class Scene:
    """The inputs of one denoising step: a batch of rows [output, appearance, structure], where output starts as structure."""

    unet: nn.Module
    scheduler: Any
    sample: Tensor
    text: Tensor

    def step(self) -> Tensor:
        """The model's prediction; the scheduler's step is taken too."""
        prediction = self.unet(self.sample, TIMESTEP, encoder_hidden_states=self.text).sample
        self.scheduler.step(prediction, TIMESTEP, self.sample)
        if prediction.is_cuda:
            torch.cuda.synchronize(prediction.device)
        return prediction


def build_scene(
    latents: Tensor, seed: int, device: torch.device, channels: tuple[int, ...] = CHANNELS
) -> Scene:
    """Noise the latents of (appearance, structure) independently at a mid timestep and set the UNet before them."""
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
    """`method` on the self-attention of the decoder."""
    return attach(scene.unet, method, layout=BatchLayout("output", "appearance", "structure"), layers=LAYERS)


@contextlib.contextmanager
def edited(scene: Scene, variant: str) -> Iterator[None]:
    """Q-Align for the variants that have it; "materialised" computes every N×N map by its formula."""
    with contextlib.ExitStack() as stack:
        if variant != "stock":
            stack.enter_context(control(scene, PAPER))
        if variant == "materialised":
            stack.enter_context(use_backend("reference"))
        yield


def measure(scene: Scene, variant: str) -> Step:
    """One denoising step of `variant`: wall time, time inside the edited layers, and peak memory above the level before it."""
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
    """One step with Q-Align, keeping the queries and keys of the edited layers."""
    recording = Recording(PAPER)
    with control(scene, recording):
        scene.step()
    return recording.captures


def effective_keys(query: Tensor, key: Tensor, counts: Tensor | None = None) -> float:
    """exp of the entropy of each query's attention over distinct keys, averaged: N for a uniform map, 1 for a one-hot one.

    The entropy lse - E[logit] - E[log count] is itself attention over the values (key, log count): no map is formed.
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
    """Root mean square distance of the attended positions from their centre, from attended (x, y, x^2 + y^2)."""
    place = place.double()
    return (place[..., 2] - place[..., 0] ** 2 - place[..., 1] ** 2).clamp(min=0).mean().sqrt().item()


def summarise(taken: Capture, truth: Truth) -> tuple[dict[str, Any], dict[str, Match]]:
    """Figures of one layer (those of attention over some of its queries), and its matches by query-query and by query-key similarity."""
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
    """Largest differences of the predictions, relative to the largest prediction."""
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
        size: side of the photographs, in pixels.
        seed: of weights and noise.
        channels: of the UNet's blocks.
        progress: called with what comes next, or with what has just been measured.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        progress(
            f"photographs: the stereo pair 'motorcycle' of scikit-image, {size}x{size}; the left one is structure, the right one appearance"
        )
        pair = load_pair(size)
        progress("latents: a small AutoencoderKL")
        latents = encode(pair, seed)
        progress(f"UNet on {describe_device(device)}, rows [output, appearance, structure]")
        scene = build_scene(latents, seed, device, channels)
        signal = scene.scheduler.alphas_cumprod[TIMESTEP].sqrt().item()
        noise = (1 - signal**2) ** 0.5
        progress(
            f"warm-up step with Q-Align at timestep {TIMESTEP} ({signal:.2f} signal + {noise:.2f} noise), keeping queries and keys"
        )
        captures = record(scene)
        steps = _measure_all(scene, progress)
        progress("where matches and attention go, layer by layer")
        layers, panels = [], []
        for taken in captures:
            truth = grid_truth(pair, taken.query.shape[2])
            figures, matches = summarise(taken, truth)
            layers.append(figures)
            panels.append((truth, matches))
    report = {
        "torch": torch.__version__,
        "device": describe_device(device),
        "size_px": size,
        "seed": seed,
        "timestep": TIMESTEP,
        "batch_rows": ["output", "appearance", "structure"],
        "memory": "torch.cuda peak" if device.type == "cuda" else "resident set, sampled every 2 ms",
        "steps": {
            name: {"time_s": s.time_s, "attention_s": s.attention_s, "peak_mib": s.peak_mib}
            for name, s in steps.items()
        },
        "agreement": agreement(scene, steps),
        "layers": layers,
    }
    return Outcome(pair, report, panels)


def _measure_all(scene: Scene, progress: Callable[[str], None]) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    for variant in VARIANTS:
        steps[variant] = measure(scene, variant)
        progress(f"{variant}: {steps[variant].time_s:.1f} s")
    return steps


def describe_device(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
