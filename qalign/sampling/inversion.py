"""Inversion: the noise from which a diffusion model reproduces given latents. Arithmetic is in float32."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qalign_kernels._files import replacing

from .denoising import (
    ddim_scheduler,
    noise_levels,
    posterior,
    require_ddim,
    require_finite,
    set_steps,
    spread,
)
from .weights_digest import tensor_bytes

# (latents [B, C, h, w], timesteps int64 [B]) -> the guided output, in the scheduler's prediction type
Predict = Callable[[Tensor, Tensor], Tensor]

KINDS = ("ddpm", "ddim")
_FORMAT = "qalign.inversion.2"
_WITHOUT_CHECKSUM = "qalign.inversion.1"


@dataclass(frozen=True, eq=False)
class Inversion:
    """Hold the result of an inversion, noisiest first.

    Attributes:
        kind: "ddpm" or "ddim".
        latents: float32 [T + 1, B, C, h, w], the latents before each of the T steps, then the clean ones.
        noises: float32 [T, B, C, h, w], z of each step, zero in the last. None if `kind` is "ddim".
        timesteps: int64 [T], on the CPU.
        eta: η, the weight of the noises in `denoise_step`; 0 if `kind` is "ddim".

    Raises:
        ValueError: the shapes or the kind do not fit together.

    Example:
        >>> one = Inversion("ddim", torch.zeros(3, 2, 4, 8, 8), None, torch.tensor([500, 0]), 0.0)
        >>> one.latents.shape
        torch.Size([3, 2, 4, 8, 8])
    """

    kind: str
    latents: Tensor
    noises: Tensor | None
    timesteps: Tensor
    eta: float

    def __post_init__(self) -> None:
        shape, steps = list(self.latents.shape), len(self.timesteps)
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if len(shape) != 5 or shape[0] != steps + 1:
            raise ValueError(f"latents: expected [T + 1 = {steps + 1}, B, C, h, w], got {shape}")
        if (self.noises is None) != (self.kind == "ddim"):
            expected = "None" if self.kind == "ddim" else "a tensor"
            raise ValueError(
                f"noises: expected {expected} with kind {self.kind!r}, got {type(self.noises).__name__}"
            )
        if self.noises is not None and list(self.noises.shape) != [steps, *shape[1:]]:
            raise ValueError(f"noises: expected {[steps, *shape[1:]]}, got {list(self.noises.shape)}")

    def to(self, device: torch.device | str) -> Self:
        """Return the inversion with latents and noises on `device`.

        Args:
            device: any torch device. The timesteps stay on the CPU.

        Returns:
            a new Inversion; tensors that are there already are shared.

        Example:
            >>> one = Inversion("ddim", torch.zeros(3, 2, 4, 8, 8), None, torch.tensor([500, 0]), 0.0)
            >>> one.to("cpu").latents.device
            device(type='cpu')
        """
        return replace(
            self,
            latents=self.latents.to(device),
            noises=None if self.noises is None else self.noises.to(device),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, and its folder if there is none.

        Args:
            path: of the file. An existing file is replaced in one move: a reader never sees half a file.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> import tempfile
            >>> one = Inversion("ddim", torch.zeros(3, 2, 4, 8, 8), None, torch.tensor([500, 0]), 0.0)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     one.save(f"{folder}/one.safetensors")
            ...     Inversion.load(f"{folder}/one.safetensors").timesteps
            tensor([500,   0])
        """
        write_inversion(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: torch.device | str = "cpu") -> "Inversion":
        """Read a file that `save` wrote.

        Args:
            path: of the file.
            device: for latents and noises; default the CPU.

        Returns:
            the inversion. `save` shows an example.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is something else, or damaged.
        """
        return read_inversion(path)[0].to(device)


def write_inversion(inversion: Inversion, path: str | os.PathLike, *, key: str = "") -> None:
    """Write a safetensors file with a checksum, as `Inversion.save`.

    Args:
        inversion: to write.
        path: of the file.
        key: of all that the inversion depends on, kept in the file.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> one = Inversion("ddim", torch.zeros(3, 2, 4, 8, 8), None, torch.tensor([500, 0]), 0.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_inversion(one, f"{folder}/one.safetensors", key="one")
        ...     read_inversion(f"{folder}/one.safetensors")[1]
        'one'
    """
    tensors = {
        name: getattr(inversion, name).contiguous()
        for name in ("latents", "noises", "timesteps")
        if getattr(inversion, name) is not None
    }
    about = {"format": _FORMAT, "kind": inversion.kind, "eta": repr(inversion.eta), "key": key}
    about["checksum"] = _checksum(tensors, about)
    with replacing(Path(path)) as unfinished:
        try:
            save_file(tensors, unfinished, metadata=about)
        except SafetensorError as error:  # what safetensors raises where the disk is full
            raise OSError(str(error)) from error


def read_inversion(path: str | os.PathLike) -> tuple[Inversion, str]:
    """Read a file that `write_inversion` wrote, and verify its checksum.

    Args:
        path: of the file.

    Returns:
        the inversion and its key. `write_inversion` shows an example.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is something else, or damaged.
    """
    if not Path(path).is_file():
        got = f"{os.fspath(path)!r}, which does not exist"
        raise FileNotFoundError(f"path: expected a file written by Inversion.save, got {got}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = file.metadata() or {}
            if about.get("format") not in (_FORMAT, _WITHOUT_CHECKSUM):
                raise ValueError(f"its format is {about.get('format')!r}, not {_FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        checksum = about.pop("checksum", "")
        if about["format"] == _FORMAT and checksum != _checksum(tensors, about):
            raise ValueError("its checksum is not that of its contents")
        found = Inversion(
            about["kind"],
            tensors["latents"],
            tensors.get("noises"),
            tensors["timesteps"],
            float(about["eta"]),
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"path: expected a file written by Inversion.save, got {os.fspath(path)!r} ({error})"
        ) from error
    return found, about.get("key", "")


def _checksum(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    whole = hashlib.sha256(repr(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(tensor_bytes(tensor))
    return whole.hexdigest()


@torch.no_grad()
def invert_ddpm(
    predict: Predict,
    scheduler: DDIMScheduler,
    clean: Tensor,
    *,
    steps: int,
    eta: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    batch_size: int = 8,
    progress: Callable[[int], Any] | None = None,
) -> Inversion:
    """Invert by edit-friendly DDPM: find latents and the noises that lead from each to the next.

    x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε_t
    z_t = (x_{t-1} - μ_t(x_t)) / (η σ_t)
    x_{t-1} ← μ_t + η σ_t z_t

    μ and σ are those of `denoise_step`. Every ε_t is drawn on its own. No x_t depends on a prediction, so
    several timesteps share one batch. The last z is zero: the last step takes the model's own estimate, and
    denoising may end elsewhere than at `clean`.

    Args:
        predict: the model with guidance, (latents [R, C, h, w], timesteps int64 [R]) -> [R, C, h, w].
            The R rows are whole timesteps, each with all B images in their order.
        scheduler: a DDIMScheduler. It is left set to `steps` timesteps. Its clipping is ignored.
        clean: [B, C, h, w], x_0.
        steps: T, at least 1.
        eta: η in (0, 1].
        generator: of the noise: one for all images, or a list with one for each. One generator draws
            image after image, so an image's noise does not depend on later images. None is torch's own.
        batch_size: rows in one call of `predict`, rounded down to whole timesteps, and at least one
            timestep.
        progress: called with the number of timesteps that are newly done, like `tqdm.update`; None is none.

    Returns:
        an `Inversion` of kind "ddpm" on the device of `clean`.

    Raises:
        TypeError: `scheduler` is not a DDIMScheduler.
        ValueError: an argument is invalid; the message names it.
        FloatingPointError: a prediction has NaN or infinite values.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> clean = torch.randn(2, 4, 8, 8)
        >>> found = invert_ddpm(lambda x, t: torch.zeros_like(x), DDIMScheduler(), clean, steps=5)
        >>> found.latents.shape, found.noises.shape
        (torch.Size([6, 2, 4, 8, 8]), torch.Size([5, 2, 4, 8, 8]))

    Notes:
        Memory is 2T + 1 latents. The result is deterministic for a given generator.

    Source: arXiv 2304.06140.
    """
    if not 0 < eta <= 1:
        raise ValueError(
            f"eta: expected a number in (0, 1], got {eta!r} (deterministic inversion is invert_ddim)"
        )
    clean, timesteps = _begin(scheduler, clean, steps)
    images = len(clean)
    alpha = spread(noise_levels(scheduler, timesteps)[0].unsqueeze(1), clean.unsqueeze(0))
    latents = torch.cat(
        [alpha.sqrt() * clean + (1 - alpha).sqrt() * _draws(generator, steps, clean), clean.unsqueeze(0)]
    )
    noises = torch.empty_like(latents[:-1])
    together = max(1, batch_size // images)
    # least noisy first: the prediction from x_{t-1} is done before x_{t-1} is corrected
    for start in reversed(range(0, steps, together)):
        some = slice(start, min(start + together, steps))
        sample, timestep = latents[some].flatten(0, 1), timesteps[some].repeat_interleave(images)
        mean, deviation = posterior(scheduler, _predict(predict, sample, timestep), timestep, sample, eta)
        mean, deviation = mean.unflatten(0, (-1, images)), deviation.unflatten(0, (-1, images))
        noises[some] = (latents[1:][some] - mean) / deviation
        latents[1:][some] = mean + deviation * noises[some]
        if progress is not None:
            progress(len(mean))
    latents[-1], noises[-1] = clean, 0
    return Inversion("ddpm", latents, noises, timesteps, float(eta))


@torch.no_grad()
def invert_ddim(
    predict: Predict,
    scheduler: DDIMScheduler,
    clean: Tensor,
    *,
    steps: int,
    progress: Callable[[int], Any] | None = None,
) -> Inversion:
    """Invert by DDIM: run its equation from clean latents to noise.

    Each step uses the prediction at its start in place of the one at its end. Denoising therefore returns
    near `clean`, and nearer with more steps.

    Args:
        predict: the model with guidance, (latents [B, C, h, w], timesteps int64 [B]) -> [B, C, h, w].
        scheduler: a DDIMScheduler. It is left set to `steps` timesteps. Its clipping is ignored.
        clean: [B, C, h, w], x_0.
        steps: T, at least 1.
        progress: called with 1 after each step, like `tqdm.update`; None is none.

    Returns:
        an `Inversion` of kind "ddim", without noises, on the device of `clean`.

    Raises:
        TypeError: `scheduler` is not a DDIMScheduler.
        ValueError: an argument is invalid; the message names it.
        FloatingPointError: a prediction has NaN or infinite values.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> clean = torch.randn(2, 4, 8, 8)
        >>> invert_ddim(lambda x, t: torch.zeros_like(x), DDIMScheduler(), clean, steps=5).latents.shape
        torch.Size([6, 2, 4, 8, 8])

    Notes:
        Memory is T + 1 latents. The result is deterministic.

    Source: arXiv 2010.02502.
    """
    clean, timesteps = _begin(scheduler, clean, steps)
    inverse = ddim_scheduler(scheduler, kind=DDIMInverseScheduler)
    inverse.set_timesteps(steps)
    latents = [clean]
    for timestep in inverse.timesteps:
        output = _predict(predict, latents[-1], timestep.expand(len(clean)))
        latents.append(inverse.step(output, timestep, latents[-1]).prev_sample)
        if progress is not None:
            progress(1)
    return Inversion("ddim", torch.stack(latents[::-1]), None, timesteps, 0.0)


def _begin(scheduler: DDIMScheduler, clean: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The clean latents in float32, and the timesteps on the CPU, noisiest first."""
    if clean.ndim != 4 or not clean.is_floating_point() or not len(clean):
        raise ValueError(
            f"clean: expected floating-point latents [B, C, h, w], got {clean.dtype} {list(clean.shape)}"
        )
    require_ddim(scheduler)
    set_steps(scheduler, steps)
    return require_finite(clean, "clean latents", clean.dtype).float(), scheduler.timesteps.cpu().long()


def _draws(
    generator: torch.Generator | Sequence[torch.Generator] | None, steps: int, clean: Tensor
) -> Tensor:
    """Normal noise [steps, B, C, h, w], drawn for image after image."""
    images = len(clean)
    generators = (
        [generator] * images
        if generator is None or isinstance(generator, torch.Generator)
        else list(generator)
    )
    if len(generators) != images:
        raise ValueError(
            f"generator: expected one, or one for each of {images} images, got {len(generators)}"
        )
    shape = (steps, *clean.shape[1:])
    return torch.stack(
        [
            randn_tensor(shape, generator=each, device=clean.device, dtype=torch.float32)
            for each in generators
        ],
        dim=1,
    )


def _predict(predict: Predict, sample: Tensor, timesteps: Tensor) -> Tensor:
    output = predict(sample, timesteps.to(sample.device))
    return require_finite(output, "model output", output.dtype).float()
