"""`python -m qalign.embedded.train`: train the embedded model from a seed, and write it as a Stable Diffusion folder.

Three stages, each resumed where it stopped: an autoencoder on crops of training scenes; a denoiser, with its text encoder, on their latents;
and the fitness of the denoiser's own self-attention on held-out scenes. What step k sees depends on the seed and k alone. With `--start`, a model
that was written is trained on, on other scenes, by a new optimizer; the autoencoder stays as it is.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qalign_kernels import _command_line
from qalign_kernels._command_line import Reading
from qalign_kernels._files import Files, replacing

from . import FOLDER
from .fitness import best_decoder_layer, self_attention_fitness
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    OBJECT_PARTS,
    PARTS,
    PLANS,
    TEXTURES,
    held_out_seed,
    render,
    token_labels,
    training_seed,
)

LATENT = 32  # tokens along a side of the latents
PICTURE = 4 * LATENT
WORDS = (
    "a",
    "photo",
    "of",
    "on",
    "the",
    "by",
    "in",
    "above",
    "among",
    "ground",
    "water",
    "forest",
    "branch",
    "weeds",
    "sky",
    "quadrupeds",
    "birds",
)
MAX_TOKENS = 20
LATENT_NOISE = 0.03  # on the latents that the decoder learns from
LOG_VARIANCE = -8.0
SHARE_OF_PART = 0.5  # weight of the part labels' loss
# the features [B, tokens, channels] from which the part is read in training: what each of the decoder's self-attention layers is given
LABELLED = {
    f"up_blocks.{block}.attentions.{layer}.transformer_blocks.0.norm1": (128, 96, 32)[block]
    for block in range(3)
    for layer in range(2)
}
PART_SCALE = 16.0  # of the cosines from which the part is read, and by which neighbours are weighed
SHARE_OF_NEIGHBOURS = 0.25  # weight of the neighbours' loss
NEIGHBOURS = 48  # tokens drawn from each picture of a batch, parts alike
NO_CAPTION = 0.15  # how often the caption is dropped, for classifier-free guidance


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result; lengths in optimiser steps."""

    seed: int = 0
    autoencoder_steps: int = 1600
    autoencoder_batch: int = 8
    autoencoder_rate: float = 2e-3
    crop: int = 64
    steps: int = 7000
    refine_steps: int = 4200  # after them, with the neighbours' loss; the rate rises once more and falls to 0
    batch: int = 16
    rate: float = 8e-4
    decay: float = 0.3  # the last part of `steps`, over which the rate falls to 0
    warmup: int = 200
    average: float = 0.998  # of the exponential moving average of the weights
    noisy: float = 0.75  # timestep = 1000 · u^noisy: below 1 the noisy ones come more often
    first_scenes: int = 4096
    scenes_per_step: int = 2  # until there are `scenes`
    scenes: int = 32768
    first_scene: int = 0  # the number of the first training scene


def build_tokenizer() -> Any:
    """CLIP's tokenizer with each word of the captions as one token, and letters for every other word."""
    from tokenizers import AddedToken
    from transformers import CLIPTokenizer

    letters = [*map(chr, range(ord("a"), ord("z") + 1)), *"0123456789.,-'"]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: place for place, token in enumerate(vocab)}, merges=[], model_max_length=MAX_TOKENS
    )
    words = sorted({*WORDS, *PLANS, *TEXTURES, *COLOURS, *COUNTS, *BACKGROUNDS, *OBJECT_PARTS})
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words])
    return tokenizer


def build_autoencoder() -> Any:
    """A small AutoencoderKL, 4 x 4 pixels to a latent; the deviation of its posterior is fixed and small."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=PICTURE,
    )
    with torch.no_grad():
        model.quant_conv.weight[4:].zero_()
        model.quant_conv.bias[4:].fill_(LOG_VARIANCE)
    return model


def build_text_encoder(tokenizer: Any) -> Any:
    """A small CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_denoiser() -> Any:
    """A small UNet2DConditionModel with transformer blocks at 32², 16² and 8² tokens of the decoder."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(32, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=(1, 3, 4),  # of this class: the number of heads
        cross_attention_dim=64,
        norm_num_groups=16,
    )


def build_scheduler() -> Any:
    """DDIM over Stable Diffusion's noise levels, for a model that predicts v."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


class CosineReader(nn.Module):
    """Tells the part from the direction of a feature alone, as similarity between queries does: [..., channels] to logits [..., parts]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.randn(len(PARTS), channels))

    def forward(self, features: Tensor) -> Tensor:
        return PART_SCALE * F.linear(F.normalize(features, dim=-1), F.normalize(self.directions, dim=-1))


class Training:
    """One run in one folder: checkpoints, losses, wall time."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        device: torch.device,
        report: Callable[[str], None],
        limit_s: float = math.inf,
        start: Path | None = None,
    ) -> None:
        self.folder, self.settings, self.device, self.report, self.start = (
            folder,
            settings,
            device,
            report,
            start,
        )
        self.deadline = time.monotonic() + limit_s
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        self.tokenizer = build_tokenizer()
        self.autoencoder = build_autoencoder().to(device)
        self.text_encoder = build_text_encoder(self.tokenizer).to(device)
        self.denoiser = build_denoiser().to(device)
        if device.type == "cpu":
            from diffusers.models.attention_processor import AttnProcessor

            self.denoiser.set_attn_processor(AttnProcessor())  # twice as fast to train as SDPA on a CPU
        self.readers = nn.ModuleList(CosineReader(width) for width in LABELLED.values()).to(device)
        self.scheduler = build_scheduler()
        self.record: dict[str, Any] = {
            "settings": dataclasses.asdict(settings),
            "part_labels": {
                "read_from": list(LABELLED),
                "weight": SHARE_OF_PART,
                "scale": PART_SCALE,
                "neighbours": SHARE_OF_NEIGHBOURS,
            },
            "machine": machine(device),
        }
        if start is not None:
            self.take_weights(start)

    def take_weights(self, start: Path) -> None:
        """The models of a folder that `write` wrote, and what its record says of how they came to be."""
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(start, local_files_only=True, safety_checker=None).to(
            torch.float32
        )
        for name, written in (
            ("autoencoder", pipe.vae),
            ("text_encoder", pipe.text_encoder),
            ("denoiser", pipe.unet),
        ):
            getattr(self, name).load_state_dict(written.state_dict())
        self.tokenizer = pipe.tokenizer
        self.autoencoder.register_to_config(scaling_factor=pipe.vae.config.scaling_factor)
        self.autoencoder.requires_grad_(False).eval()
        before = json.loads((start / "record.json").read_text())
        self.record["autoencoder"] = before["autoencoder"]
        self.record["started_from"] = {
            name: value for name, value in before.items() if name not in ("autoencoder", "fitness")
        }

    def save(self, name: str, state: dict[str, Any]) -> None:
        with replacing(self.folder / f"{name}.pt") as part:
            torch.save(state, part)

    def load(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}.pt"
        return torch.load(path, map_location=self.device, weights_only=True) if path.exists() else None

    def loop(
        self, name: str, parts: dict[str, Any], steps: int, batch: int, step: Callable[[int], list[float]]
    ) -> None:
        """Run `step` from the checkpoint on, with a line and a checkpoint every few minutes; Ctrl-C keeps what there is."""
        state = self.load(name) or {"step": 0, "wall_s": 0.0, "losses": []}
        for key, part in parts.items():
            if key in state:
                part.load_state_dict(state[key])
        begun, spoken = time.monotonic(), time.monotonic()
        before_s, losses, recent = state["wall_s"], state["losses"], []

        def keep(done: int) -> None:
            saved = {key: part.state_dict() for key, part in parts.items()}
            self.save(
                name, {**saved, "step": done, "wall_s": before_s + time.monotonic() - begun, "losses": losses}
            )

        number = said = state["step"]
        try:
            while number < steps:
                recent.append(step(number))
                number += 1
                if number % 50 == 0:
                    losses.append([number, *(round(sum(each) / len(each), 5) for each in zip(*recent))])
                    recent = []
                if time.monotonic() - spoken > 60 or number == steps:
                    rate = (number - said) * batch / (time.monotonic() - spoken)
                    self.report(
                        f"{name}: step {number}/{steps}, losses {losses[-1][1:] if losses else '-'}, {rate:.1f} pictures/s"
                    )
                    keep(number)
                    said, spoken = number, time.monotonic()
                if time.monotonic() > self.deadline:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            keep(number)
            raise
        wall_s = before_s + time.monotonic() - begun
        self.record[name] = {
            "steps": steps,
            "samples": steps * batch,
            "wall_s": round(wall_s, 1),
            "losses": losses,
        }

    # -- stage 1

    def train_autoencoder(self) -> None:
        settings, model = self.settings, self.autoencoder
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.autoencoder_rate, weight_decay=0.0, fused=True
        )
        crops = (PICTURE // settings.crop) ** 2

        def step(number: int) -> list[float]:
            for group in optimizer.param_groups:
                group["lr"] = settings.autoencoder_rate * _rate(
                    number, settings.autoencoder_steps, settings.warmup, 0.5
                )
            count = settings.autoencoder_batch // crops
            first = number * count
            image = render([training_seed(first + place) for place in range(count)], PICTURE).image.to(
                self.device
            )
            image = image.unfold(2, settings.crop, settings.crop).unfold(3, settings.crop, settings.crop)
            image = image.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, settings.crop, settings.crop) * 2 - 1
            with self.autocast():
                latents = model.encode(image.contiguous()).latent_dist.mode()
                noise = torch.randn(latents.shape, generator=self.generator(number), device=self.device)
                decoded = model.decode(latents + LATENT_NOISE * noise).sample.float()
            edges = sum((decoded.diff(dim=dim) - image.diff(dim=dim)).abs().mean() for dim in (2, 3))
            colour = (latents[:, :3] - F.avg_pool2d(image, PICTURE // LATENT)).abs().mean()
            size = latents[:, 3:].square().mean()
            loss = (decoded - image).abs().mean() + 0.5 * edges + 0.5 * colour + 0.01 * size
            _descend(loss, optimizer, model)
            return [loss.item()]

        self.loop(
            "autoencoder",
            {"model": model, "optimizer": optimizer},
            settings.autoencoder_steps,
            settings.autoencoder_batch,
            step,
        )
        model.requires_grad_(False).eval()
        image = render([training_seed(place) for place in range(64)], PICTURE).image.to(self.device) * 2 - 1
        with torch.no_grad():
            latents = model.encode(image).latent_dist.mode()
            error = (model.decode(latents).sample - image).square().mean()
        model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        self.record["autoencoder"] |= {
            "psnr_db": round(10 * math.log10(4 / error.item()), 2),
            "scaling_factor": model.config.scaling_factor,
        }
        self.report(
            f"autoencoder: {self.record['autoencoder']['psnr_db']} dB, scaling factor {model.config.scaling_factor}"
        )

    # -- stage 2

    def train_denoiser(self) -> None:
        settings = self.settings
        trained = nn.ModuleList([self.denoiser, self.text_encoder, self.readers])
        followed = nn.ModuleList([self.denoiser, self.text_encoder])
        average = copy.deepcopy(followed).requires_grad_(False)
        optimizer = torch.optim.AdamW(
            trained.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        pool = Pool(self)
        if self.start is not None and self.load("denoiser") is None:
            self.find_directions(pool)
        weight = torch.tensor([1.0] * len(BACKGROUNDS) + [2.0] * len(OBJECT_PARTS), device=self.device)

        def step(number: int) -> list[float]:
            refining = number - settings.steps
            for group in optimizer.param_groups:
                if refining < 0:
                    group["lr"] = settings.rate * _rate(
                        number, settings.steps, settings.warmup, settings.decay
                    )
                else:
                    group["lr"] = settings.rate * _rate(refining, settings.refine_steps, settings.warmup, 1.0)
            latents, labels, tokens = pool.batch(number)
            generator = self.generator(number)
            timestep = (
                (1000 * torch.rand(settings.batch, generator=generator, device=self.device) ** settings.noisy)
                .long()
                .clamp(max=999)
            )
            noise = torch.randn(latents.shape, generator=generator, device=self.device)
            tokens[torch.rand(settings.batch, generator=generator, device=self.device) < NO_CAPTION] = (
                pool.nothing
            )
            noisy = self.scheduler.add_noise(latents, noise, timestep)
            with self.autocast():
                text = self.text_encoder(tokens)[0]
                predicted = self.denoiser(noisy, timestep, text).sample.float()
                told = [reader(taps[name]) for reader, name in zip(self.readers, LABELLED)]
            loss = F.mse_loss(predicted, self.scheduler.get_velocity(latents, noise, timestep))
            parts = torch.stack(
                [
                    F.cross_entropy(each.float().flatten(0, 1), _at(labels, each.shape[1]).flatten(), weight)
                    for each in told
                ]
            ).sum()
            neighbours = torch.zeros(())
            if refining >= 0:
                costs = [
                    _neighbours_loss(taps[name], _at(labels, taps[name].shape[1]), weight, generator)
                    for name in LABELLED
                ]
                neighbours = torch.stack(costs).sum()
            _descend(loss + SHARE_OF_PART * parts + SHARE_OF_NEIGHBOURS * neighbours, optimizer, trained)
            keep = min(settings.average, (number + 1) / (number + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(followed.parameters()), 1 - keep)
            return [loss.item(), parts.item() / len(told), neighbours.item() / len(told)]

        parts = {"model": trained, "average": average, "optimizer": optimizer}
        try:
            with self.tapped() as taps:
                self.loop("denoiser", parts, settings.steps + settings.refine_steps, settings.batch, step)
        finally:
            self.denoiser.load_state_dict(average[0].state_dict())
            self.text_encoder.load_state_dict(average[1].state_dict())
        self.record["denoiser"]["parameters"] = sum(p.numel() for p in average.parameters())

    @torch.no_grad()
    def find_directions(self, pool: "Pool", batches: int = 16) -> None:
        """Let each reader begin with the mean direction that the features of every part have."""
        directions = list(self.readers.parameters())
        sums = [torch.zeros_like(each) for each in directions]
        with self.tapped() as taps:
            for number in range(batches):
                latents, labels, tokens = pool.batch(number)
                timestep = torch.randint(
                    1000, (len(latents),), generator=self.generator(number), device=self.device
                )
                noise = torch.randn(latents.shape, generator=self.generator(number), device=self.device)
                with self.autocast():
                    self.denoiser(
                        self.scheduler.add_noise(latents, noise, timestep),
                        timestep,
                        self.text_encoder(tokens)[0],
                    )
                for total, name in zip(sums, LABELLED):
                    features = F.normalize(taps[name].float(), dim=-1).flatten(0, 1)
                    total.index_add_(0, _at(labels, taps[name].shape[1]).flatten(), features)
        for each, total in zip(directions, sums):
            each.copy_(total)

    @contextlib.contextmanager
    def tapped(self) -> Iterator[dict[str, Tensor]]:
        """The features of LABELLED in the last forward pass, by name."""
        kept: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept[name] = output

        with contextlib.ExitStack() as stack:
            for name in LABELLED:
                stack.callback(
                    self.denoiser.get_submodule(name)
                    .register_forward_hook(functools.partial(keep, name))
                    .remove
                )
            yield kept

    # -- all stages

    def pipeline(self) -> Any:
        """The models as a StableDiffusionPipeline in float32."""
        from diffusers import StableDiffusionPipeline
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.denoiser.set_attn_processor(AttnProcessor2_0())
        trained = {"vae": self.autoencoder, "text_encoder": self.text_encoder, "unet": self.denoiser}
        modules = {name: copy.deepcopy(module).to("cpu").eval() for name, module in trained.items()}
        return StableDiffusionPipeline(
            **modules,
            tokenizer=self.tokenizer,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def autocast(self) -> Any:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type != "cpu" or _has_bfloat16()
        )

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.settings.seed * 1_000_003 + step)


class Pool:
    """Latents, labels and captions of training scenes: a few thousand at first, some more at each step."""

    def __init__(self, training: Training) -> None:
        self.training = training
        scenes, device = training.settings.scenes, training.device
        self.path = training.folder / "scenes.pt"
        self.count = 0
        self.latents = torch.empty(scenes, 4, LATENT, LATENT, dtype=torch.float16)
        self.labels = torch.empty(scenes, LATENT**2, dtype=torch.uint8)
        self.tokens = torch.empty(scenes, MAX_TOKENS, dtype=torch.int16)
        self.nothing = self._tokens([""]).to(device).long()

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, 4, 32, 32], labels [B, 1024] and caption tokens of one step."""
        settings, device = self.training.settings, self.training.device
        known = min(settings.scenes, settings.first_scenes + step * settings.scenes_per_step)
        self._grow(known)
        drawn = torch.randint(
            known,
            (settings.batch,),
            generator=torch.Generator().manual_seed(settings.seed * 7_368_787 + step),
        )
        return (
            self.latents[drawn].float().to(device),
            self.labels[drawn].long().to(device),
            self.tokens[drawn].long().to(device),
        )

    def _grow(self, count: int) -> None:
        if self.count == 0 and self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.count = len(state["latents"])
            for name in ("latents", "labels", "tokens"):
                getattr(self, name)[: self.count] = state[name]
        while self.count < count:
            self._add(min(count - self.count, 64))
            if self.count % 4096 < 64 or self.count in (
                self.training.settings.first_scenes,
                self.training.settings.scenes,
            ):
                torch.save(
                    {
                        name: getattr(self, name)[: self.count].clone()
                        for name in ("latents", "labels", "tokens")
                    },
                    self.path,
                )

    @torch.no_grad()
    def _add(self, count: int) -> None:
        first = self.training.settings.first_scene + self.count
        scenes = render([training_seed(first + place) for place in range(count)], PICTURE)
        model = self.training.autoencoder
        with self.training.autocast():
            image = (scenes.image * 2 - 1).to(self.training.device)
            latents = model.encode(image).latent_dist.mode() * model.config.scaling_factor
        new = slice(self.count, self.count + count)
        self.latents[new] = latents.cpu()
        self.labels[new] = token_labels(scenes.labels, (LATENT, LATENT))
        self.tokens[new] = self._tokens(scenes.captions)
        self.count += count

    def _tokens(self, captions: Any) -> Tensor:
        padded = self.training.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return padded.input_ids.short()


def _has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16; one that does not takes twice the time of float32."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """Linear warm-up, constant, linear decay over the last part."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def _neighbours_loss(features: Tensor, labels: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """-log of the share that a token's own part has among its soft nearest neighbours in the other pictures; features [B, N, C], labels [B, N].

    Neighbourhood components analysis by cosine: a match between pictures is a nearest neighbour, which a part told by its direction alone
    need not be.
    """
    size = torch.zeros(len(labels), len(weight), device=labels.device).scatter_add(
        1, labels, torch.ones_like(labels, dtype=torch.float32)
    )
    drawn = torch.multinomial(weight[labels] / size.gather(1, labels), NEIGHBOURS, generator=generator)
    directions = F.normalize(
        features.float().gather(1, drawn.unsqueeze(-1).expand(-1, -1, features.shape[2])), dim=-1
    ).flatten(0, 1)
    part = labels.gather(1, drawn).flatten()
    picture = torch.arange(len(labels), device=labels.device).repeat_interleave(NEIGHBOURS)
    elsewhere = picture[:, None] != picture
    same = elsewhere & (part[:, None] == part)
    logits = (PART_SCALE * directions @ directions.T).masked_fill(~elsewhere, -math.inf)
    found = same.any(1)
    surprise = logits[found].logsumexp(1) - logits[found].masked_fill(~same[found], -math.inf).logsumexp(1)
    return surprise.sum() / found.sum().clamp(min=1)


def _at(labels: Tensor, tokens: int) -> Tensor:
    """Labels [B, 1024] on a coarser grid: of four (or more) cells the one in the middle."""
    side, fine = math.isqrt(tokens), math.isqrt(labels.shape[1])
    stride = fine // side
    return labels.view(-1, fine, fine)[:, stride // 2 :: stride, stride // 2 :: stride].flatten(1)


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def machine(device: torch.device) -> dict[str, Any]:
    """What the training ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def prepare_process() -> None:
    """Adam's tiny second moments are denormals, and glibc returns every large block to the system: both cost a CPU more than the arithmetic."""
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def write(training: Training, folder: Path) -> None:
    """The pipeline in half precision, a sheet of samples, and the record with the fitness of what was written, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = training.pipeline().to(torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    pipe = pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rows = self_attention_fitness(pipe)
    training.record["fitness"] = {"best_decoder_layer": best_decoder_layer(rows), "layers": rows}
    (folder / "record.json").write_text(json.dumps(training.record, indent=1) + "\n")
    contact_sheet(pipe).save(folder / "samples.png")


def contact_sheet(pipe: Any, steps: int = 50, seed: int = 0) -> Any:
    """32 unconditional samples, and 16 for captions of held-out scenes at guidance scale 3, as one PIL image."""
    from diffusers.utils import make_image_grid

    captions = render([held_out_seed(number) for number in range(16)], 8).captions
    generator = torch.Generator().manual_seed(seed)
    free = pipe([""] * 32, num_inference_steps=steps, guidance_scale=1.0, generator=generator).images
    told = pipe(list(captions), num_inference_steps=steps, guidance_scale=3.0, generator=generator).images
    return make_image_grid(free + told, 6, 8)


MAY_BE_ZERO = ("autoencoder_steps", "steps", "refine_steps", "scenes_per_step", "first_scene")
READINGS = (
    Reading(
        ("autoencoder_steps", "autoencoder_batch", "autoencoder_rate", "crop"),
        lambda options: options.start is None,
        "without --start",
    ),
    Reading(("decay",), lambda options: options.steps > 0, "with --steps above 0"),
)


def parser() -> argparse.ArgumentParser:
    top = _command_line.Parser(prog="python -m qalign.embedded.train", description=__doc__.splitlines()[0])
    _command_line.add_command(top, sys.modules[__name__])
    return top


def files(options: argparse.Namespace) -> Files:
    written = [("--out", options.out / name) for name in ("model_index.json", "record.json", "samples.png")]
    return Files(writes=written, folders=[("--out", options.out), ("--work", options.work)])


def _type_of(field: dataclasses.Field) -> Callable[[str], Any]:
    """By which an option of `Settings` is read."""
    if field.name == "seed":
        return _command_line.seed
    if field.type is float:
        return _command_line.number
    return _command_line.whole if field.name in MAY_BE_ZERO else _command_line.count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("embedded_training"),
        help="checkpoints; a second call goes on from there (%(default)s)",
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the model is written (%(default)s)")
    parser.add_argument(
        "--start", type=Path, metavar="FOLDER", help="train this written model on in place of a new one"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="NAME",
        help="cuda or cpu (%(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=_command_line.number,
        default=math.inf,
        help="stop after this long, to go on with a second call",
    )
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_type_of(field),
            default=field.default,
            help="(%(default)s)",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    return _command_line.main(parser, arguments)


def run(options: argparse.Namespace) -> int:
    given = vars(options)
    _command_line.require_device(options.device)
    if options.start is not None and not (options.start / "record.json").is_file():
        raise ValueError(
            f"--start: expected a folder that this command wrote, got {options.start} without a record.json"
        )
    settings = Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings)})
    prepare_process()
    report = functools.partial(print, flush=True)
    training = Training(
        options.work, settings, torch.device(options.device), report, 60 * options.minutes, options.start
    )
    try:
        if training.start is None:
            training.train_autoencoder()
        training.train_denoiser()
    except KeyboardInterrupt:
        goes_on = f"the same command goes on from {options.work}"
        if time.monotonic() <= training.deadline:
            raise KeyboardInterrupt(goes_on) from None
        print(f"stopped; {goes_on}", flush=True)
        return 1
    write(training, options.out)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
