"""The parts that all pipelines share: latents, predictions and pictures of a Stable Diffusion pipeline."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor

from ..sampling.denoising import require_finite
from ..sampling.inversion import Predict
from ..sampling.inversion_cache import digest
from .pictures import choose_size, to_tensors

_CALLBACK = "callback_on_step_end"

Condition = dict[str, Any]  # keyword arguments of the UNet for one row
Found = TypeVar("Found")
OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]  # callback_on_step_end


@dataclass(frozen=True)
class StepCallback:
    """`callback_on_step_end` of a call, and `callback_on_step_end_tensor_inputs`."""

    function: OnStepEnd | None
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.function is not None and not callable(self.function):
            raise TypeError(f"{_CALLBACK}: expected a function or None, got {self.function!r}")

    def __call__(self, pipe: Any, step: int, timestep: Any, latents: Tensor) -> Tensor | None:
        """The latents that the function returns; None where it returns none, or there is no function."""
        if self.function is None:
            return None
        returned = self.function(pipe, step, timestep, {name: latents for name in self.names})
        return None if returned is None else _returned_latents(returned, latents)


def _returned_latents(returned: Any, latents: Tensor) -> Tensor | None:
    """The latents in what a callback returned, as the loop's own have dtype and device."""
    if not isinstance(returned, dict):
        raise TypeError(f"{_CALLBACK}: expected a dict or None from it, got {type(returned).__name__}")
    if unknown := sorted(map(str, returned.keys() - {"latents"})):
        raise ValueError(f"{_CALLBACK}: expected a dict of latents alone from it, got {', '.join(unknown)}")
    found = returned.get("latents")
    if found is None:
        return None
    if not isinstance(found, Tensor) or not found.is_floating_point():
        got = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"{_CALLBACK}: expected latents of floating point from it, got {got}")
    if found.shape != latents.shape:
        raise ValueError(f"{_CALLBACK}: expected latents {list(latents.shape)}, got {list(found.shape)}")
    return require_finite(found, "latents of callback_on_step_end", found.dtype).to(latents)


class LatentDiffusion:
    """A mixin before a Stable Diffusion pipeline: pictures to latents and back, and predictions.

    Latents and predictions are float32, whatever the dtype of the networks.
    """

    _callback_tensor_inputs = ["latents"]

    @classmethod
    def _kinds(cls) -> tuple[Any, Any]:
        """The classes that `from_pipe` makes for Stable Diffusion and for Stable Diffusion XL."""
        raise NotImplementedError

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """Make a pipeline of this kind from another pipeline's components.

        Args:
            pipeline: any diffusers pipeline of Stable Diffusion or Stable Diffusion XL.
            kwargs: components and settings that replace the pipeline's.

        Returns:
            an instance of this class. For Stable Diffusion XL, an instance of its XL class: an
            `AppearanceTransferXLPipeline` of `AppearanceTransferPipeline`, with the same methods.

        Raises:
            TypeError: `pipeline` is of another family.
            ValueError: its UNet has more channels than the VAE, as for inpainting.

        Example:
            >>> from qalign import AppearanceTransferPipeline
            >>> tool = AppearanceTransferPipeline.from_pipe(pipe)
            >>> tool.unet is pipe.unet
            True

        Notes:
            Weights are shared and keep their dtypes and devices. Call `enable_model_cpu_offload` and the
            like on the result.
        """
        components = getattr(pipeline, "components", {})
        if "unet" not in components or "text_encoder" not in components:
            expected = "a Stable Diffusion or Stable Diffusion XL pipeline"
            raise TypeError(f"pipeline: expected {expected}, got {type(pipeline).__name__}")
        if (takes := components["unet"].config.in_channels) != (
            gives := components["vae"].config.latent_channels
        ):
            expected = f"a UNet for the VAE's {gives} latent channels"
            raise ValueError(f"pipeline: expected {expected}, got one for {takes} (inpainting?)")
        kind = cls._kinds()["text_encoder_2" in components]
        target: Any = cls if issubclass(cls, kind) else kind
        needed, settings = target._get_signature_keys(target)
        given = {name: components.get(name) for name in needed} | {
            name: pipeline.config[name] for name in settings if name in pipeline.config
        }
        return target(**{**given, **kwargs})

    @classmethod
    def embedded(cls, dtype: torch.dtype = torch.float32) -> Self:
        """Make a pipeline with the small model of this package, for pictures of 128 x 128 pixels.

        Args:
            dtype: of the weights.

        Returns:
            an instance of this class, on the CPU. Nothing is downloaded.

        Example:
            >>> from qalign import AppearanceTransferPipeline
            >>> AppearanceTransferPipeline.embedded().unet.config.sample_size
            32
        """
        from .. import embedded

        return cls.from_pipe(embedded.load(dtype))

    def encode(self: Any, pictures: Any) -> Tensor:
        """Encode pictures to latents: the mode of the VAE's distribution, picture by picture.

        Args:
            pictures: one picture or several of one size: PIL, tensors [3, H, W] or arrays [H, W, 3], floats
                in [0, 1] or bytes; or a batch of tensors or arrays.

        Returns:
            float32 [B, C, h, w], scaled as the stock pipeline of the family scales them.

        Raises:
            TypeError: a picture is of the wrong type.
            ValueError: there is no picture, or the sizes differ or are no multiples of 8.
            FloatingPointError: the latents are NaN or infinite.

        Example:
            >>> from qalign import AppearanceTransferPipeline
            >>> AppearanceTransferPipeline.from_pipe(pipe).encode([structure, appearance]).shape
            torch.Size([2, 4, 16, 16])
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
            return self._scaled(require_finite(latents, "VAE latents", self.vae.dtype).float())

    def conditions(self: Any, prompt: str, height: int, width: int) -> tuple[Condition, Condition]:
        """Make the UNet's keyword arguments for a prompt.

        Args:
            prompt: one prompt.
            height: of the pictures in pixels. Only Stable Diffusion XL uses it.
            width: the same across.

        Returns:
            two dicts for one row, of the prompt and of the empty prompt.

        Example:
            >>> from qalign import AppearanceTransferPipeline
            >>> tool = AppearanceTransferPipeline.from_pipe(pipe)
            >>> condition, unconditional = tool.conditions(prompt, 32, 32)
            >>> {name: list(value.shape) for name, value in condition.items()}
            {'encoder_hidden_states': [1, 16, 32]}
        """
        embeddings = self.encode_prompt(prompt, self._execution_device, 1, True)
        condition, unconditional = (
            {"encoder_hidden_states": each.to(self.unet.dtype), **self._guidance_condition(1.0)}
            for each in embeddings
        )
        return condition, unconditional

    def predict(self: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Run the UNet.

        Args:
            latents: [B, C, h, w].
            timesteps: int64 [B], or one for all rows.
            condition: for one row, from `conditions`.

        Returns:
            float32 [B, C, h, w], the output of the UNet.

        Raises:
            FloatingPointError: the output has NaN or infinite values.

        Example:
            >>> from qalign import AppearanceTransferPipeline
            >>> tool = AppearanceTransferPipeline.from_pipe(pipe)
            >>> with torch.no_grad():
            ...     output = tool.predict(latents, torch.tensor(301), tool.conditions(prompt, 32, 32)[0])
            >>> output.shape
            torch.Size([3, 4, 16, 16])
        """
        options = expand_condition(condition, len(latents))
        output = self.unet(
            latents.to(self.unet.dtype), timesteps.to(latents.device), return_dict=False, **options
        )[0]
        return require_finite(output, "UNet output", self.unet.dtype).float()

    def _same_tokens(self: Any, find: Callable[[Any], Found]) -> Found:
        """What `find` returns for the tokenizer, if it returns the same for the second one of SDXL."""
        tokenizers = [self.tokenizer, getattr(self, "tokenizer_2", None)]
        first, *others = [find(each) for each in tokenizers if each is not None]
        if any(other != first for other in others):
            expected = "the same tokens from both tokenizers"
            got = "others (a textual inversion belongs to both: load_textual_inversion twice)"
            raise ValueError(f"prompt: expected {expected}, got {got}")
        return first

    def _scaled(self: Any, latents: Tensor) -> Tensor:
        """The UNet's latents of those of the VAE: as in `StableDiffusionImg2ImgPipeline.prepare_latents`."""
        return latents * self.vae.config.scaling_factor

    def _unscaled(self: Any, latents: Tensor) -> Tensor:
        """The VAE's latents of those of the UNet: as in `StableDiffusionPipeline.__call__`."""
        return latents / self.vae.config.scaling_factor

    def _guidance_condition(self: Any, scale: float) -> Condition:
        """The UNet's `timestep_cond`, as in `StableDiffusionPipeline.__call__`; only distilled UNets take it.

        Such a UNet, as of LCM, has learned the guided output for a scale that is embedded with the timestep.
        """
        width = self.unet.config.time_cond_proj_dim
        if width is None:
            return {}
        embedded = self.get_guidance_scale_embedding(torch.tensor([scale - 1.0]), embedding_dim=width)
        return {"timestep_cond": embedded.to(self._execution_device, self.unet.dtype)}

    def _check_unet(self: Any) -> None:
        """Check that the UNet needs no input that these pipelines have none of."""
        config, needs = self.unet.config, ""
        if getattr(config, "encoder_hid_dim_type", None) in (
            "ip_image_proj",
            "image_proj",
            "text_image_proj",
        ):
            needs = "image_embeds (an IP-Adapter? pipe.unload_ip_adapter() removes it)"
        elif getattr(self.unet, "class_embedding", None) is not None:
            needs = "class_labels"
        if needs:
            raise ValueError(f"unet: expected one that needs text alone, got one that needs {needs}")

    def _size(self: Any, latents: Tensor) -> list[int]:
        """[height, width] of the pictures of these latents, in pixels."""
        return [side * self.vae_scale_factor for side in latents.shape[-2:]]

    def _guided(self: Any, condition: Condition, unconditional: Condition, scale: float) -> Predict:
        """The prediction with classifier-free guidance.

        One UNet call is enough for equal conditions, and for a UNet that takes the scale.
        """
        distilled = self._guidance_condition(scale)
        same = bool(distilled) or digest(condition) == digest(unconditional)
        condition = {**condition, **distilled}

        def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
            output = self.predict(latents, timesteps, condition)
            if scale == 1 or same:
                return output
            base = self.predict(latents, timesteps, unconditional)
            return base + scale * (output - base)

        return predict

    def _finished(self: Any, latents: Tensor, output_type: str) -> Tensor:
        """The latents themselves if they are the output, and the pictures of them if not."""
        require_finite(latents, "latents", latents.dtype)
        return latents if output_type == "latent" else self._decode(latents)

    def _decode(self: Any, latents: Tensor) -> Tensor:
        with self._wide_vae():
            rows = self._unscaled(latents).to(self.vae.dtype).split(1)
            return require_finite(
                torch.cat([self.vae.decode(row, return_dict=False)[0] for row in rows]),
                "VAE pictures",
                self.vae.dtype,
            ).float()

    @contextlib.contextmanager
    def _wide_vae(self: Any) -> Iterator[None]:
        """Run a float16 VAE in float32 if its configuration says that it overflows."""
        if self.vae.dtype != torch.float16 or not getattr(self.vae.config, "force_upcast", False):
            yield
            return
        self.vae.to(torch.float32)
        try:
            yield
        finally:
            self.vae.to(torch.float16)


class XLConditions:
    """Conditions and scale of latents of Stable Diffusion XL, as a mixin before the others."""

    def conditions(self: Any, prompt: str, height: int, width: int) -> tuple[Condition, Condition]:
        """Make the UNet's keyword arguments for a prompt, with pooled text and size.

        Args:
            prompt: one prompt.
            height: of the pictures in pixels, also given as their original size.
            width: the same across.

        Returns:
            two dicts for one row, of the prompt and of the empty prompt.
        """
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
                **self._guidance_condition(1.0),
            }
            for text, pooled in (embeddings[::2], embeddings[1::2])
        )
        return condition, unconditional

    def _scaled(self: Any, latents: Tensor) -> Tensor:
        """As in `StableDiffusionXLImg2ImgPipeline.prepare_latents`: with the VAE's mean and deviation."""
        mean, deviation = self._statistics(latents)
        return (latents - mean) * self.vae.config.scaling_factor / deviation

    def _unscaled(self: Any, latents: Tensor) -> Tensor:
        """As in `StableDiffusionXLPipeline.__call__`: with the VAE's mean and deviation."""
        mean, deviation = self._statistics(latents)
        return latents * deviation / self.vae.config.scaling_factor + mean

    def _statistics(self: Any, latents: Tensor) -> tuple[Any, Any]:
        """The VAE's `latents_mean` and `latents_std`, or 0 and 1 unless it has both."""
        both = [getattr(self.vae.config, name, None) for name in ("latents_mean", "latents_std")]
        if None in both:
            return 0.0, 1.0
        mean, deviation = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in both)
        return mean, deviation


def expand_condition(condition: Condition, rows: int) -> Condition:
    """A condition of one row for `rows` rows, without copies."""
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
