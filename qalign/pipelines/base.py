"""What the pipelines share: the networks of a Stable Diffusion pipeline, asked for latents, predictions and pictures."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor

from ..sampling.denoising import require_finite
from ..sampling.inversion import Predict
from ..sampling.inversion_cache import digest
from .pictures import choose_size, to_tensors

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Condition = dict[str, Any]  # keyword arguments of the UNet for one row
OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]  # callback_on_step_end


class StepCallback(NamedTuple):
    """`callback_on_step_end` of a call, and `callback_on_step_end_tensor_inputs`."""

    function: OnStepEnd | None
    names: tuple[str, ...]

    def __call__(self, pipe: Any, step: int, timestep: Any, latents: Tensor) -> Tensor | None:
        """The latents that the function returns; None where it returns none, or there is no function."""
        if self.function is None:
            return None
        returned = self.function(pipe, step, timestep, {name: latents for name in self.names}) or {}
        return returned.get("latents")


class LatentDiffusion:
    """A mixin before a Stable Diffusion pipeline: pictures to float32 latents and back, and what the UNet says of them, whatever its dtype."""

    _callback_tensor_inputs = ["latents"]

    @classmethod
    def _kinds(cls) -> tuple[Any, Any]:
        """What `from_pipe` makes of Stable Diffusion, and of Stable Diffusion XL."""
        raise NotImplementedError

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """A pipeline of this kind with the components of any other of Stable Diffusion or Stable Diffusion XL.

        >>> pipe = AppearanceTransferPipeline.from_pipe(StableDiffusionPipeline.from_pretrained(folder).to(torch.bfloat16))

        Weights are shared, and stay in the dtypes that they have. Call `enable_model_cpu_offload` and the like on the result.

        Args:
            pipeline: a diffusers pipeline.
            kwargs: components and settings to take in place of the pipeline's.

        Returns:
            an instance of this class, or of its kin for the other family:
            `AppearanceTransferPipeline.from_pipe` of a Stable Diffusion XL pipeline makes an
            `AppearanceTransferXLPipeline`, which has the same methods.
        """
        components = getattr(pipeline, "components", {})
        if "unet" not in components or "text_encoder" not in components:
            raise TypeError(
                f"pipeline: expected a Stable Diffusion or Stable Diffusion XL pipeline, got {type(pipeline).__name__}"
            )
        if (takes := components["unet"].config.in_channels) != (
            gives := components["vae"].config.latent_channels
        ):
            raise ValueError(
                f"pipeline: expected a UNet for the VAE's {gives} latent channels, got one for {takes} (inpainting?)"
            )
        kind = cls._kinds()["text_encoder_2" in components]
        target: Any = cls if issubclass(cls, kind) else kind
        needed, settings = target._get_signature_keys(target)
        given = {name: components.get(name) for name in needed} | {
            name: pipeline.config[name] for name in settings if name in pipeline.config
        }
        return target(**{**given, **kwargs})

    @classmethod
    def embedded(cls, dtype: torch.dtype = torch.float32) -> Self:
        """A pipeline on the small model that comes with the package: pictures of 128 x 128 pixels, nothing to download."""
        from .. import embedded

        return cls.from_pipe(embedded.load(dtype))

    def encode(self: Any, pictures: Any) -> Tensor:
        """float32 latents [B, C, h, w] of pictures: the mode of what the VAE says, picture by picture.

        >>> clean = pipe.encode([structure, appearance])

        Args:
            pictures: one or several of one size: PIL, tensors [3, H, W] or arrays [H, W, 3], floats in [0, 1]
                or bytes; or a batch of these.

        Raises:
            TypeError, ValueError: no pictures, or not of one size. FloatingPointError: NaN or infinite
                latents.
        """
        rows = to_tensors(pictures, "pictures")
        size = choose_size(rows[0], None, None, "pictures")
        other = next((tuple(row.shape[1:]) for row in rows if row.shape[1:] != size), None)
        if other is not None:
            got = f"{size[0]} x {size[1]} and {other[0]} x {other[1]}"
            raise ValueError(f"pictures: expected one size, got {got}")
        with self._wide_vae():
            pixels = self.image_processor.normalize(torch.stack(rows))
            pixels = pixels.to(self._execution_device, self.vae.dtype)
            latents = torch.cat(
                [retrieve_latents(self.vae.encode(row), sample_mode="argmax") for row in pixels.split(1)]
            )
            return (
                require_finite(latents, "VAE latents", self.vae.dtype).float()
                * self.vae.config.scaling_factor
            )

    def conditions(self: Any, prompt: str, height: int, width: int) -> tuple[Condition, Condition]:
        """The UNet's keyword arguments for one row of `height` x `width` pixels, of the prompt and of the empty one."""
        embeddings = self.encode_prompt(prompt, self._execution_device, 1, True)
        condition, unconditional = (
            {"encoder_hidden_states": each.to(self.unet.dtype)} for each in embeddings
        )
        return condition, unconditional

    def predict(self: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """float32 [B, C, h, w], the UNet's output, whatever its dtype.

        Args:
            latents: [B, C, h, w].
            timesteps: int64 [B], or one for all rows.
            condition: of one row, from `conditions`.

        Raises:
            FloatingPointError: NaN or infinity in the output.
        """
        options = expand_condition(condition, len(latents))
        output = self.unet(
            latents.to(self.unet.dtype), timesteps.to(latents.device), return_dict=False, **options
        )[0]
        return require_finite(output, "UNet output", self.unet.dtype).float()

    def _size(self: Any, latents: Tensor) -> list[int]:
        """[height, width] of the pictures of these latents, in pixels."""
        return [side * self.vae_scale_factor for side in latents.shape[-2:]]

    def _guided(self: Any, condition: Condition, unconditional: Condition, scale: float) -> Predict:
        """The prediction with classifier-free guidance; one call of the UNet is enough where both conditions are the same."""
        same = digest(condition) == digest(unconditional)

        def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
            output = self.predict(latents, timesteps, condition)
            if scale == 1 or same:
                return output
            base = self.predict(latents, timesteps, unconditional)
            return base + scale * (output - base)

        return predict

    def _decode(self: Any, latents: Tensor) -> Tensor:
        with self._wide_vae():
            rows = (latents / self.vae.config.scaling_factor).to(self.vae.dtype).split(1)
            return require_finite(
                torch.cat([self.vae.decode(row, return_dict=False)[0] for row in rows]),
                "VAE pictures",
                self.vae.dtype,
            ).float()

    @contextlib.contextmanager
    def _wide_vae(self: Any) -> Iterator[None]:
        """A VAE in float16 that its configuration says overflows, in float32 meanwhile."""
        if self.vae.dtype != torch.float16 or not getattr(self.vae.config, "force_upcast", False):
            yield
            return
        self.vae.to(torch.float32)
        try:
            yield
        finally:
            self.vae.to(torch.float16)


class XLConditions:
    """The conditioning of Stable Diffusion XL, as a mixin before the others."""

    def conditions(self: Any, prompt: str, height: int, width: int) -> tuple[Condition, Condition]:
        """As that of Stable Diffusion, with the pooled text and the size that the pictures are said to have had."""
        options = {
            "device": self._execution_device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
        }
        embeddings = self.encode_prompt(prompt, **options)
        size, width_of_text = (height, width), embeddings[2].shape[-1]
        ids = self._get_add_time_ids(
            size, (0, 0), size, self.unet.dtype, text_encoder_projection_dim=width_of_text
        ).to(self._execution_device)
        condition, unconditional = (
            {
                "encoder_hidden_states": text.to(self.unet.dtype),
                "added_cond_kwargs": {"text_embeds": pooled.to(self.unet.dtype), "time_ids": ids},
            }
            for text, pooled in (embeddings[::2], embeddings[1::2])
        )
        return condition, unconditional


def check_output(output_type: str, names: Sequence[str]) -> None:
    """`output_type` and `callback_on_step_end_tensor_inputs` of a call."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    if set(names) - {"latents"}:
        raise ValueError(f"callback_on_step_end_tensor_inputs: expected ('latents',) or (), got {names!r}")


def expand_condition(condition: Condition, rows: int) -> Condition:
    """A condition of one row for as many rows, without copies."""
    return {
        name: expand_condition(each, rows) if isinstance(each, dict) else each.expand(rows, *each.shape[1:])
        for name, each in condition.items()
    }


def concatenate_conditions(first: Condition, second: Condition) -> Condition:
    """Both in one batch, `first` in front."""
    pairs = {name: (each, second[name]) for name, each in first.items()}
    return {
        name: concatenate_conditions(*pair) if isinstance(pair[0], dict) else torch.cat(pair)
        for name, pair in pairs.items()
    }
