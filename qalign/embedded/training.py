"""The two stages of training: the autoencoder, then the denoiser with its text encoder.

Both stages keep checkpoints in one folder. A run that was stopped continues from them.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import Checkpoints
from .host import describe, has_bfloat16
from .losses import labels_at, neighbours_loss
from .networks import (
    LABELLED,
    LATENT,
    PART_SCALE,
    PICTURE,
    CosineReader,
    build_autoencoder,
    build_denoiser,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
)
from .pool import Pool
from .scenes import BACKGROUNDS, OBJECT_PARTS, render, training_seed

LATENT_NOISE = 0.03  # added to the latents from which the decoder learns
SHARE_OF_PART = 0.5  # weight of the loss on part labels
SHARE_OF_NEIGHBOURS = 0.25  # weight of the loss on neighbours
NO_CAPTION = 0.15  # fraction of the captions that are dropped, for classifier-free guidance


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a training run. Lengths are in optimiser steps."""

    seed: int = 0
    autoencoder_steps: int = 1600
    autoencoder_batch: int = 8
    autoencoder_rate: float = 2e-3
    crop: int = 64
    steps: int = 7000
    refine_steps: int = (
        4200  # run after `steps`, with the loss on neighbours; the rate rises again and falls to 0
    )
    batch: int = 16
    rate: float = 8e-4
    decay: float = 0.3  # the last part of `steps`, over which the rate falls to 0
    warmup: int = 200
    average: float = 0.998  # of the exponential moving average of the weights
    noisy: float = 0.75  # timestep = 1000 · u^noisy: below 1, noisy timesteps are drawn more often
    first_scenes: int = 4096
    scenes_per_step: int = 2  # added until there are `scenes`
    scenes: int = 32768
    first_scene: int = 0  # number of the first training scene


class Training:
    """One training run in one folder, with its checkpoints, losses and wall time.

    Args:
        folder: for the checkpoints; made if it is missing.
        settings: what decides the result.
        device: where the networks train.
        report: called with each line of progress.
        limit_s: seconds after which the run stops as on Ctrl-C.
        start: folder of a written model to continue from; None begins with new networks.

    Raises:
        ValueError: the folder has checkpoints of other settings or of another start.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        device: torch.device,
        report: Callable[[str], None],
        limit_s: float = math.inf,
        start: Path | None = None,
    ) -> None:
        self.settings, self.device = settings, device
        self.report, self.start = report, start
        self.deadline = time.monotonic() + limit_s
        decides = dataclasses.asdict(settings) | {"start": _digest_of(start)}
        self.checkpoints = Checkpoints(folder, decides, device)
        torch.manual_seed(settings.seed)
        self.tokenizer = build_tokenizer()
        self.autoencoder = build_autoencoder().to(device)
        self.text_encoder = build_text_encoder(self.tokenizer).to(device)
        self.denoiser = build_denoiser().to(device)
        if device.type == "cpu":
            from diffusers.models.attention_processor import AttnProcessor

            self.denoiser.set_attn_processor(AttnProcessor())  # trains twice as fast as SDPA on a CPU
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
            "machine": describe(device),
        }
        if start is not None:
            self.take_weights(start)

    def take_weights(self, start: Path) -> None:
        """Load the networks of a written model, and keep the history that its record tells."""
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(start, local_files_only=True, safety_checker=None)
        pipe = pipe.to(torch.float32)
        written = {"autoencoder": pipe.vae, "text_encoder": pipe.text_encoder, "denoiser": pipe.unet}
        for name, network in written.items():
            getattr(self, name).load_state_dict(network.state_dict())
        self.tokenizer = pipe.tokenizer
        self.autoencoder.register_to_config(scaling_factor=pipe.vae.config.scaling_factor)
        self.autoencoder.requires_grad_(False).eval()
        before = json.loads((start / "record.json").read_text())
        self.record["autoencoder"] = before["autoencoder"]
        self.record["started_from"] = {
            name: value for name, value in before.items() if name not in ("autoencoder", "fitness")
        }

    # -- the loop of both stages

    def loop(
        self, name: str, parts: dict[str, Any], steps: int, batch: int, step: Callable[[int], list[float]]
    ) -> None:
        """Run `step` from the last checkpoint on. Report and save about once a minute, and save on Ctrl-C.

        Args:
            name: of the stage and of its checkpoint.
            parts: the networks and optimizers whose state is saved, by name.
            steps: how many steps the stage has.
            batch: pictures in a step.
            step: takes the number of the step and returns its losses.
        """
        state = self.checkpoints.load(name) or {"step": 0, "wall_s": 0.0, "losses": []}
        for key, part in parts.items():
            if key in state:
                part.load_state_dict(state[key])
        begun, spoken = time.monotonic(), time.monotonic()
        before_s, losses, recent = state["wall_s"], state["losses"], []

        def keep(done: int) -> None:
            saved = {key: part.state_dict() for key, part in parts.items()}
            wall_s = before_s + time.monotonic() - begun
            self.checkpoints.save(name, {**saved, "step": done, "wall_s": wall_s, "losses": losses})

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
                    last = losses[-1][1:] if losses else "-"
                    self.report(f"{name}: step {number}/{steps}, losses {last}, {rate:.1f} pictures/s")
                    keep(number)
                    said, spoken = number, time.monotonic()
                if time.monotonic() > self.deadline:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            keep(number)
            raise
        wall_s = round(before_s + time.monotonic() - begun, 1)
        self.record[name] = {"steps": steps, "samples": steps * batch, "wall_s": wall_s, "losses": losses}

    # -- stage 1

    def train_autoencoder(self) -> None:
        """Train the autoencoder on crops of training scenes, then fix it and set its scaling factor."""
        settings, model = self.settings, self.autoencoder
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.autoencoder_rate, weight_decay=0.0, fused=True
        )

        def step(number: int) -> list[float]:
            share = _rate(number, settings.autoencoder_steps, settings.warmup, 0.5)
            _set_rate(optimizer, settings.autoencoder_rate * share)
            loss = self.autoencoder_loss(number)
            _descend(loss, optimizer, model)
            return [loss.item()]

        parts = {"model": model, "optimizer": optimizer}
        self.loop("autoencoder", parts, settings.autoencoder_steps, settings.autoencoder_batch, step)
        model.requires_grad_(False).eval()
        image = render([training_seed(place) for place in range(64)], PICTURE).image.to(self.device) * 2 - 1
        with torch.no_grad():
            latents = model.encode(image).latent_dist.mode()
            error = (model.decode(latents).sample - image).square().mean()
        factor = round(1 / latents.std().item(), 5)
        model.register_to_config(scaling_factor=factor)
        psnr_db = round(10 * math.log10(4 / error.item()), 2)
        self.record["autoencoder"] |= {"psnr_db": psnr_db, "scaling_factor": factor}
        self.report(f"autoencoder: {psnr_db} dB, scaling factor {factor}")

    def autoencoder_loss(self, number: int) -> Tensor:
        """The loss of step `number`: pixels, edges, and the colours and size of the latents."""
        settings, model = self.settings, self.autoencoder
        count = settings.autoencoder_batch // (PICTURE // settings.crop) ** 2
        scenes = [training_seed(number * count + place) for place in range(count)]
        image = render(scenes, PICTURE).image.to(self.device)
        image = image.unfold(2, settings.crop, settings.crop).unfold(3, settings.crop, settings.crop)
        image = image.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, settings.crop, settings.crop) * 2 - 1
        with self.autocast():
            latents = model.encode(image.contiguous()).latent_dist.mode()
            noise = torch.randn(latents.shape, generator=self.generator(number), device=self.device)
            decoded = model.decode(latents + LATENT_NOISE * noise).sample.float()
        edges = sum((decoded.diff(dim=dim) - image.diff(dim=dim)).abs().mean() for dim in (2, 3))
        colour = (latents[:, :3] - F.avg_pool2d(image, PICTURE // LATENT)).abs().mean()
        size = latents[:, 3:].square().mean()
        return (decoded - image).abs().mean() + 0.5 * edges + 0.5 * colour + 0.01 * size

    # -- stage 2

    def train_denoiser(self) -> None:
        """Train denoiser, text encoder and readers on latents, then keep their averaged weights."""
        settings = self.settings
        trained = nn.ModuleList([self.denoiser, self.text_encoder, self.readers])
        followed = nn.ModuleList([self.denoiser, self.text_encoder])
        average = copy.deepcopy(followed).requires_grad_(False)
        optimizer = torch.optim.AdamW(
            trained.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        pool = Pool(self)
        if self.start is not None and "denoiser" not in self.checkpoints:
            self.find_directions(pool)

        def step(number: int) -> list[float]:
            refining = number - settings.steps
            if refining < 0:
                share = _rate(number, settings.steps, settings.warmup, settings.decay)
            else:
                share = _rate(refining, settings.refine_steps, settings.warmup, 1.0)
            _set_rate(optimizer, settings.rate * share)
            loss, parts, neighbours = self.denoiser_losses(number, pool, taps, refining >= 0)
            _descend(loss + SHARE_OF_PART * parts + SHARE_OF_NEIGHBOURS * neighbours, optimizer, trained)
            keep = min(settings.average, (number + 1) / (number + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(followed.parameters()), 1 - keep)
            return [loss.item(), parts.item() / len(LABELLED), neighbours.item() / len(LABELLED)]

        parts = {"model": trained, "average": average, "optimizer": optimizer}
        try:
            with self.tapped() as taps:
                self.loop("denoiser", parts, settings.steps + settings.refine_steps, settings.batch, step)
        finally:
            self.denoiser.load_state_dict(average[0].state_dict())
            self.text_encoder.load_state_dict(average[1].state_dict())
        self.record["denoiser"]["parameters"] = sum(p.numel() for p in average.parameters())

    def denoiser_losses(
        self, number: int, pool: Pool, taps: dict[str, Tensor], refining: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of step `number`: prediction, part labels, and neighbours if `refining`."""
        latents, labels, tokens = pool.batch(number)
        device, generator, batch = self.device, self.generator(number), self.settings.batch
        uniform = torch.rand(batch, generator=generator, device=device)
        timestep = (1000 * uniform**self.settings.noisy).long().clamp(max=999)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        tokens[torch.rand(batch, generator=generator, device=device) < NO_CAPTION] = pool.nothing
        noisy = self.scheduler.add_noise(latents, noise, timestep)
        with self.autocast():
            text = self.text_encoder(tokens)[0]
            predicted = self.denoiser(noisy, timestep, text).sample.float()
            logits = [reader(taps[name]) for reader, name in zip(self.readers, LABELLED)]
        loss = F.mse_loss(predicted, self.scheduler.get_velocity(latents, noise, timestep))
        weight = torch.tensor([1.0] * len(BACKGROUNDS) + [2.0] * len(OBJECT_PARTS), device=device)
        part_losses = [
            F.cross_entropy(each.float().flatten(0, 1), labels_at(labels, each.shape[1]).flatten(), weight)
            for each in logits
        ]
        neighbours = torch.zeros(())
        if refining:
            costs = [
                neighbours_loss(taps[name], labels_at(labels, taps[name].shape[1]), weight, generator)
                for name in LABELLED
            ]
            neighbours = torch.stack(costs).sum()
        return loss, torch.stack(part_losses).sum(), neighbours

    @torch.no_grad()
    def find_directions(self, pool: Pool, batches: int = 16) -> None:
        """Start each reader from the mean direction of the features of every part."""
        directions = list(self.readers.parameters())
        sums = [torch.zeros_like(each) for each in directions]
        with self.tapped() as taps:
            for number in range(batches):
                latents, labels, tokens = pool.batch(number)
                timestep = torch.randint(
                    1000, (len(latents),), generator=self.generator(number), device=self.device
                )
                noise = torch.randn(latents.shape, generator=self.generator(number), device=self.device)
                noisy = self.scheduler.add_noise(latents, noise, timestep)
                with self.autocast():
                    self.denoiser(noisy, timestep, self.text_encoder(tokens)[0])
                for total, name in zip(sums, LABELLED):
                    features = F.normalize(taps[name].float(), dim=-1).flatten(0, 1)
                    total.index_add_(0, labels_at(labels, taps[name].shape[1]).flatten(), features)
        for each, total in zip(directions, sums):
            each.copy_(total)

    @contextlib.contextmanager
    def tapped(self) -> Iterator[dict[str, Tensor]]:
        """Keep the features of `LABELLED` in the last forward pass, by name."""
        kept: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept[name] = output

        with contextlib.ExitStack() as stack:
            for name in LABELLED:
                module = self.denoiser.get_submodule(name)
                stack.callback(module.register_forward_hook(functools.partial(keep, name)).remove)
            yield kept

    # -- all stages

    def pipeline(self) -> Any:
        """The networks as a StableDiffusionPipeline in float32."""
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
        """Compute in bfloat16, except on a CPU that does not multiply it."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type != "cpu" or has_bfloat16()
        )

    def generator(self, step: int) -> torch.Generator:
        """The generator of one step: what a step sees depends on the seed and its number alone."""
        return torch.Generator(self.device).manual_seed(self.settings.seed * 1_000_003 + step)


def _digest_of(start: Path | None) -> str | None:
    """What tells written models apart: the hash of a model's record, which has its losses and fitness."""
    return None if start is None else hashlib.sha256((start / "record.json").read_bytes()).hexdigest()


def _rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """Linear warm-up, then constant, then linear decay over the last part."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
