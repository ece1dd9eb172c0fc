"""attach(): install a method on layers of a denoiser, follow the denoising steps, restore everything.

The file is longer than 400 lines because a quarter of it documents `attach`, whose parts undo each other.
"""

import fnmatch
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from ..context.clock import Clock
from ..context.layer_call import ForwardPass, Site
from ..context.layout import BatchLayout
from ..context.regions import Regions
from ..methods import Hook, Method, require_method
from .unet import DEFAULT_LAYOUT, UNetAttnProcessor, is_unet_attention

BLOCKS = ("down_blocks", "mid_block", "up_blocks")
NOT_SPATIAL = (  # the tokens of these modules are not those of one image
    "fuser",
    "motion_modules",
    "temporal_transformer_blocks",
    "temp_attentions",
)
REPLACED_BY = {
    "SlicedAttnProcessor": "attention slicing",
    "FusedAttnProcessor2_0": "fuse_qkv_projections",
    "XFormersAttnProcessor": "xformers",
    "UNetAttnProcessor": "load_ip_adapter or unload_ip_adapter",
}
_ABSENT = object()
_log = logging.getLogger("qalign")


def attach(
    pipe_or_model: Any,
    method: Method,
    *,
    layout: BatchLayout = DEFAULT_LAYOUT,
    layers: str | Sequence[str] | None = None,
    steps: tuple[float, float] | None = None,
    regions: Regions | None = None,
) -> "Control":
    """Run `method` on a pipeline's UNet, or on a UNet, inside a `with` block.

    >>> from qalign import AppearanceTransferPipeline, QAlign, attach
    >>> with attach(pipe, QAlign(), layers="up", steps=(0.1, 0.9)) as control:
    ...     images = pipe([prompt] * 3, latents=latents, num_inference_steps=50, guidance_scale=1).images
    >>> len(images), len(control.layers)
    (3, 6)

    The rows are output, appearance and structure, and the output begins as the structure. One way to get
    their `latents` is inversion, for a pipeline with a DDIMScheduler:

    >>> tool = AppearanceTransferPipeline.from_pipe(pipe)  # shares the weights
    >>> settings = {"num_inference_steps": 50, "inversion": "ddim", "inversion_guidance_scale": 1}
    >>> inverted = tool.invert(appearance, structure, prompt, **settings)
    >>> latents = inverted.latents[0][[1, 0, 1]].to(pipe.dtype)  # the noisiest of [appearance, structure]
    >>> latents.shape
    torch.Size([3, 4, 16, 16])

    Another way is an image-to-image pipeline, with the same noise for output and structure:

    >>> from diffusers import AutoPipelineForImage2Image
    >>> noising = AutoPipelineForImage2Image.from_pipe(pipe)
    >>> clean = tool.encode([structure, appearance])[[0, 1, 0]].to(pipe.dtype)
    >>> generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 0)]
    >>> settings = {"strength": 0.7, "num_inference_steps": 50, "guidance_scale": 1, "generator": generators}
    >>> with attach(noising, QAlign()):
    ...     images = noising([prompt] * 3, image=clean, **settings).images

    Args:
        pipe_or_model: a diffusers pipeline with a UNet, or the UNet. `attach` changes the UNet's
            self-attention layers. A few methods also act in other modules: their docstrings say so, and
            `layers` does not select among those modules.
        method: an instance, such as `QAlign()`.
        layout: the roles of the batch's rows.
        layers: a name, "down", "mid" or "up", the beginning of a name, a pattern with * and ?, or a list of
            these. None is the method's own choice.
        steps: fractions (start, stop) of the denoising loop. None is the method's own choice, mostly the
            whole loop (0, 1).
        regions: labels of the pictures' tokens. A token then matches and reads only tokens with its label.

    Returns:
        The context manager `Control`. It installs processors, hooks and clock on entry, and removes them at
        the end, also after an error.

    Raises:
        TypeError, ValueError: a bad argument, named.
        RuntimeError: on entry, if one of the layers already has a processor of this library.

    Notes:
        The steps are counted by the pipeline's scheduler, so set the scheduler before `attach`. For a loop of
        your own over a bare UNet, use `control.track`. Two methods on different layers are two `with` blocks,
        one inside the other.
    """
    return Control(pipe_or_model, method, layout, layers, steps, regions)


class Control:
    """What `attach` returns: a context manager that installs a method and restores the model.

    >>> from qalign import CrossImage, attach
    >>> control = attach(pipe, CrossImage(), layers="mid")
    >>> list(control.layers)
    ['mid_block.attentions.0.transformer_blocks.0.attn1']

    Attributes:
        layers: the self-attention layers that the method edits, by name.
        cross_layers: the cross-attention layers in which it acts, by name.
        clock: the present step.
    """

    def __init__(
        self,
        pipe_or_model: Any,
        method: Method,
        layout: BatchLayout,
        layers: str | Sequence[str] | None,
        steps: tuple[float, float] | None,
        regions: Regions | None,
    ) -> None:
        self.model = find_unet(pipe_or_model)
        self.pipe = None if isinstance(pipe_or_model, nn.Module) else pipe_or_model
        require_method(method)
        if not isinstance(layout, BatchLayout):
            raise TypeError(f"layout: expected a BatchLayout, got {layout!r}")
        self.method = method
        self.layout = layout
        if regions is not None and not isinstance(regions, Regions):
            raise TypeError(
                f"regions: expected Regions(appearance=..., structure=...) or None, got {regions!r}"
            )
        self.regions = regions
        self.clock = Clock(method.default_steps if steps is None else steps, method.takes_structure)
        self.layers = select_layers(self.model, layers, method, required=not method.may_edit_no_layer)
        self.hooks = {
            name: ModuleHook(function, layout, name, self.clock, regions)
            for name, function in _hooks_of(method, self.model).items()
        }
        self.cross_layers = _cross_layers_of(method, self.model)
        self._attention = {**self.layers, **self.cross_layers}
        self._handles: list[Any] = []
        self._processors: dict[str, UNetAttnProcessor] = {}
        self._originals: dict[str, Any] = {}
        self._scheduler: Any = None
        self._scheduler_attributes: dict[str, Any] = {}

    def __enter__(self) -> Self:
        carried = [
            name for name, attn in self._attention.items() if isinstance(attn.processor, UNetAttnProcessor)
        ]
        if carried:
            advice = "attached twice? two methods need layers of their own"
            got = f"{len(carried)} with one, {carried[0]} the first ({advice})"
            raise RuntimeError(
                f"layers: expected {len(self._attention)} without a processor of this library, got {got}"
            )
        for name, attn in self.cross_layers.items():
            if isinstance(attn.processor, nn.Module):  # its weights would have no effect
                advice = f"{type(self.method).__name__} needs cross-attention without an IP-Adapter"
                got = f"{type(attn.processor).__name__} on {name} ({advice})"
                raise RuntimeError(f"cross-attention: expected processors without weights, got {got}")
        forward = ForwardPass() if self.cross_layers else None
        settings: dict[str, Any] = {"clock": self.clock, "regions": self.regions, "forward": forward}
        self._processors = {
            name: UNetAttnProcessor(self.method, self.layout, layer=name, **settings)
            for name in self._attention
        }
        self._originals = {name: attn.processor for name, attn in self._attention.items()}
        self._follow(getattr(self.pipe, "scheduler", None))
        for name, attn in self._attention.items():
            attn.set_processor(self._processors[name])
        self._handles = [
            self.model.get_submodule(name).register_forward_hook(hook) for name, hook in self.hooks.items()
        ]
        if forward is not None:
            self._handles.append(
                self.model.register_forward_pre_hook(functools.partial(_begin, forward), with_kwargs=True)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, attn in self._attention.items():
            attn.set_processor(self._originals[name])
            self._processors[name].method = None  # unfuse_qkv_projections may put it back: as stock attention
        while self._handles:
            self._handles.pop().remove()
        self._unfollow()
        self.clock.reset()
        self._processors, self._originals = {}, {}

    def track(self, timesteps: Sequence[Any] | Tensor) -> Iterator[Any]:
        """Iterate over the timesteps of a denoising loop of your own, and set the clock to each step.

        >>> from qalign import QAlign, attach
        >>> pipe.scheduler.set_timesteps(2)
        >>> prompts = pipe.encode_prompt([prompt] * 3, "cpu", 1, False)[0]
        >>> with attach(pipe.unet, QAlign()) as control, torch.no_grad():
        ...     for timestep in control.track(pipe.scheduler.timesteps):
        ...         noise = pipe.unet(latents, timestep, encoder_hidden_states=prompts).sample
        >>> noise.shape
        torch.Size([3, 4, 16, 16])
        """
        try:
            for step, timestep in enumerate(timesteps):
                self._set(step, len(timesteps))
                yield timestep
        finally:
            self.clock.reset()

    def verify(self) -> None:
        """Check that the installed processors are still in place.

        Raises:
            RuntimeError: others replaced them; the message says which.
        """
        attended = self._attention.items()
        replaced = Counter(
            type(attn.processor).__name__
            for name, attn in attended
            if attn.processor is not self._processors.get(name)
        )
        if replaced:
            causes = [REPLACED_BY[name] for name in replaced if name in REPLACED_BY]
            advice = f"attach after {', '.join(causes)}" if causes else "attach after whatever set them"
            expected = f"UNetAttnProcessor on {len(attended)} attached layers"
            raise RuntimeError(f"processors: expected {expected}, got {_count(replaced)}: {advice}")

    def _set(self, step: int, total: int) -> None:
        if step == 0:
            self.verify()
            self._declare_guidance()
        self.clock.set(
            step,
            max(total, step + 1),
            getattr(self.pipe, "_execution_device", None) or next(self.model.parameters()).device,
        )

    def _declare_guidance(self) -> None:
        """Take the guidance halves from a pipeline that runs without guidance.

        A batch with twice the rows is then an error, and not a second half.
        """
        layout = self.layout
        if layout.guidance is None and getattr(self.pipe, "do_classifier_free_guidance", None) is False:
            layout = BatchLayout(
                *layout.roles,
                guidance=False,
                images_per_prompt=layout.images_per_prompt,
                unread=layout.unread,
            )
        for processor in self._processors.values():
            processor.layout = layout
        for hook in self.hooks.values():
            hook.layout = layout

    def _follow(self, scheduler: Any) -> None:
        """Follow the steps at the scheduler's functions.

        A loop sets the timesteps, scales the input before the UNet, and steps after it.
        """
        self._scheduler = scheduler
        for name, callback in (
            ("set_timesteps", self._rewind),
            ("scale_model_input", self._refresh),
            ("step", self._advance),
        ):
            if hasattr(scheduler, name):
                self._scheduler_attributes[name] = vars(scheduler).get(name, _ABSENT)
                setattr(scheduler, name, _then(getattr(scheduler, name), callback))

    def _unfollow(self) -> None:
        if getattr(self.pipe, "scheduler", None) is not self._scheduler:
            _log.warning(
                "scheduler: it was replaced while %s was attached, "
                "and the steps of the new one were not followed",
                type(self.method).__name__,
            )
        for name, original in self._scheduler_attributes.items():
            if original is _ABSENT:
                delattr(self._scheduler, name)
            else:
                setattr(self._scheduler, name, original)
        self._scheduler, self._scheduler_attributes = None, {}

    def _rewind(self) -> None:
        self._set(0, len(self._scheduler.timesteps))

    def _refresh(self) -> None:
        self._set(self.clock.step or 0, self._total())

    def _advance(self) -> None:
        self._set((self.clock.step or 0) + 1, self._total())

    def _total(self) -> int:
        """The number of steps in the loop: fewer than in the schedule for image-to-image."""
        return getattr(self.pipe, "num_timesteps", None) or len(self._scheduler.timesteps)


class ModuleHook:
    """A method's function on the output of the module `layer`, in the steps in which the method edits."""

    def __init__(
        self, function: Hook, layout: BatchLayout, layer: str, clock: Clock, regions: Regions | None
    ) -> None:
        self.function, self.layout, self.layer = function, layout, layer
        self.clock, self.regions = clock, regions
        self.forward: ForwardPass | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        site = Site(self.layout, None, None, self.clock, self, self.regions)
        if site.idle or "output" not in self.layout.roles:
            return output
        return self.function(module, inputs[0], output, site)


def find_unet(pipe_or_model: Any) -> nn.Module:
    """Return the UNet of a pipeline, or the UNet itself, without the wrapper of torch.compile.

    Raises:
        TypeError: there is none.
    """
    model = getattr(pipe_or_model, "unet", pipe_or_model)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or not all(hasattr(model, block) for block in BLOCKS):
        raise TypeError(
            f"pipe_or_model: expected a pipeline with a UNet, or a UNet, got {type(pipe_or_model).__name__}"
        )
    return model


def select_layers(
    model: nn.Module, layers: str | Sequence[str] | None, method: Method, *, required: bool = True
) -> dict[str, Any]:
    """Select the self-attention layers of a UNet, in the order of the model. Arguments as in `attach`.

    Raises:
        ValueError: a name that matches no layer, or no layer at all and `required`.
    """
    present = _attention_layers(model, cross=False)
    if not present:
        expected, got = f"self-attention in {', '.join(BLOCKS)}", f"{type(model).__name__} without any"
        raise ValueError(f"pipe_or_model: expected {expected}, got {got}")
    if layers is None:
        chosen = set(method.default_layers(list(present)))
        if not chosen and required:
            reason = f"{type(method).__name__} has no default on {type(model).__name__}"
            raise ValueError(f"layers: expected names, because {reason}, got None")
    else:
        chosen = set()
        if not layers:
            raise ValueError(f"layers: expected at least one name or pattern, or None, got {layers!r}")
        for wanted in [layers] if isinstance(layers, str) else layers:
            found = {name for name in present if _matches(name, wanted)}
            if not found:
                expected = f"names or patterns of self-attention layers of {type(model).__name__}"
                got = f"{wanted!r}, which none of {len(present)} matches (first: {next(iter(present))})"
                raise ValueError(f"layers: expected {expected}, got {got}")
            chosen |= found
    return {name: module for name, module in present.items() if name in chosen}


def _attention_layers(model: nn.Module, *, cross: bool) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(BLOCKS)
        and is_unet_attention(module)
        and module.is_cross_attention == cross
        and not any(part in NOT_SPATIAL for part in name.split("."))
    }


def _cross_layers_of(method: Method, model: nn.Module) -> dict[str, Any]:
    present = _attention_layers(model, cross=True)
    chosen = set(method.cross_layers(list(present)))
    return {name: module for name, module in present.items() if name in chosen}


def _hooks_of(method: Method, model: nn.Module) -> dict[str, Hook]:
    hooks = method.hooks(model)
    present = dict(model.named_modules())
    for name in hooks:
        if name not in present:
            expected = f"names of modules of {type(model).__name__}"
            raise ValueError(f"hooks: expected {expected}, got {name!r} from {type(method).__name__}")
    return hooks


def _matches(name: str, wanted: str) -> bool:
    block = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}.get(wanted, wanted)
    return name == block or name.startswith(f"{block}.") or fnmatch.fnmatchcase(name, wanted)


def _begin(forward: ForwardPass, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    forward.begin(*(args[0] if args else kwargs["sample"]).shape[-2:])


def _then(function: Callable, callback: Callable[[], None]) -> Callable:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        callback()
        return result

    return wrapped


def _count(names: Counter) -> str:
    return ", ".join(f"{name} on {count}" for name, count in names.items())
