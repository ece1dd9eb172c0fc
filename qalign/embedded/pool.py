"""The training scenes as latents, labels and caption tokens: a pool that grows while the denoiser trains."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .networks import LATENT, MAX_TOKENS, PICTURE
from .scenes import render, token_labels, training_seed

if TYPE_CHECKING:
    from .training import Training


class Pool:
    """Latents, labels and captions of training scenes: few at first, then more at each step."""

    def __init__(self, training: "Training") -> None:
        self.training = training
        scenes, device = training.settings.scenes, training.device
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
        generator = torch.Generator().manual_seed(settings.seed * 7_368_787 + step)
        drawn = torch.randint(known, (settings.batch,), generator=generator)
        return (
            self.latents[drawn].float().to(device),
            self.labels[drawn].long().to(device),
            self.tokens[drawn].long().to(device),
        )

    def _grow(self, count: int) -> None:
        state = self.training.checkpoints.load("scenes") if self.count == 0 else None
        if state is not None:
            self.count = len(state["latents"])
            for name in ("latents", "labels", "tokens"):
                getattr(self, name)[: self.count] = state[name]
        while self.count < count:
            self._add(min(count - self.count, 64))
            settings = self.training.settings
            if self.count % 4096 < 64 or self.count in (settings.first_scenes, settings.scenes):
                self._save()

    def _save(self) -> None:
        names = ("latents", "labels", "tokens")
        state = {name: getattr(self, name)[: self.count].clone() for name in names}
        self.training.checkpoints.save("scenes", state)

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
