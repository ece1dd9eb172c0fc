"""attach(): install a method on layers of a denoiser, follow the denoising steps, restore everything."""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..context.clock import Clock
from ..context.layer_call import ForwardPass
from ..context.layers import layer_grid
from ..context.layout import BatchLayout
from ..context.regions import Regions
from ..context.timeline import step_numbers
from ..methods import Method, require_method
from .following import CHANGING, LoopFollower, follow, unfollow
from .installing import AttachedHook, AttachedProcessor, ModuleHook, Undoing, hold, release, require_free
from .selection import find_unet, hooks_of, select_cross_layers, select_layers
from .unet import DEFAULT_LAYOUT

REPLACED_BY = {
    "SlicedAttnProcessor": "attention slicing",
    "FusedAttnProcessor2_0": "fuse_qkv_projections",
    "XFormersAttnProcessor": "xformers",
    "AttachedProcessor": "load_ip_adapter or unload_ip_adapter",
}
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
        A step is one timestep, however often the UNet is called at it. In a pipeline's call, the timesteps
        are its scheduler's. For a loop of your own over a bare UNet, use `control.track`.

        Two methods are two `with` blocks on different layers of one UNet; on a common layer the second is
        refused. They may end in any order. Blocks change the UNet, not the thread: what runs the UNet in
        another thread runs both methods. A copy of the UNet or of the scheduler made inside a block is a
        plain one.

        A warning says so, once, if the method edits none of the steps or layers that run.
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
            for name, function in hooks_of(method, self.model).items()
        }
        self.cross_layers = select_cross_layers(method, self.model)
        self._attention = {**self.layers, **self.cross_layers}
        self._processors: dict[str, AttachedProcessor] = {}
        self._follower = LoopFollower(self.pipe, self._begin_loop, self._move)
        self._installation = Undoing()
        self._called = False
        self._size: tuple[int, int] | None = None  # of the latents that were checked
        self._warned = False
        self._expected: int | None = None

    def __enter__(self) -> Self:
        with CHANGING:
            require_free(self._attention)
            self._require_no_adapter()
            self._expect_layers()
            try:
                self._install()
            except BaseException:
                self._installation.undo()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._called and not any(each.ran for each in self._installed()):
                self._warn(f"it edited nothing, as none of its {len(self._attention)} layers ran")
        finally:
            with CHANGING:
                self._installation.undo()  # each part is undone, whatever another one raises

    def track(self, timesteps: Iterable[Any] | Tensor) -> "Tracked":
        """Iterate over the timesteps of a denoising loop of your own, and set the clock to each step.

        A step is one timestep: equal neighbours in a tensor or list of timesteps are one step. The result has
        a length. An iterator without a length is read to its end first.

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
            length = len(timesteps)  # type: ignore[arg-type]
        except TypeError:
            timesteps = list(timesteps)
            length = len(timesteps)
        return Tracked(self._walk(timesteps, length), length)

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

    def check(self, size: tuple[int, int]) -> None:
        """Check that latents of this (height, width), and the label maps of their pictures, suit the method.

        Raises:
            ValueError: they do not; the message says why.
        """
        grids = dict.fromkeys(layer_grid(name, self.model, size) for name in self.layers)
        self.method.check(size, list(grids), self.layout, self.regions)

    def _install(self) -> None:
        """Install everything. What undoes a part is known before the part is done."""
        forward = ForwardPass() if self.cross_layers or self.method.reads_size else None
        settings: dict[str, Any] = {"clock": self.clock, "regions": self.regions, "forward": forward}
        self._processors = {
            name: AttachedProcessor(self.method, self.layout, layer=name, **settings)
            for name in self._attention
        }
        for each in self._installed():
            each.ran = False
        self._installation.add(self._forget)
        for name, hook in self.hooks.items():
            hook.regions = self.regions
            self._hook(self.model.get_submodule(name).register_forward_hook, hook, compiled=True)
        if forward is not None:
            begin = functools.partial(_begin, forward)
            self._hook(self.model.register_forward_pre_hook, begin, compiled=True, with_kwargs=True)
        called = set() if self.pipe is None else {self.model, self.pipe.unet}  # the UNet, and torch.compile's
        for model in called:
            self._hook(model.register_forward_pre_hook, self._before_call, prepend=True, with_kwargs=True)
        for name, attn in self._attention.items():
            self._installation.add(release, attn, self._processors[name])
            hold(attn, self._processors[name])
        scheduler = getattr(self.pipe, "scheduler", None)
        self._installation.add(unfollow, scheduler, self._follower)
        follow(scheduler, self._follower)

    def _hook(
        self,
        register: Callable[..., Any],
        function: Callable[..., Any],
        *,
        compiled: bool = False,
        **options: Any,
    ) -> None:
        hook = AttachedHook(function, compiled=compiled)
        self._installation.add(hook.remove)
        hook.handle = register(hook, **options)

    def _forget(self) -> None:
        """Return to the state before `__enter__`."""
        self._follower = LoopFollower(self.pipe, self._begin_loop, self._move)
        self._processors, self._called, self._size = {}, False, None
        self._warned, self._expected = False, None
        self.clock.reset()

    def _installed(self) -> Iterator[AttachedProcessor | ModuleHook]:
        yield from self._processors.values()
        yield from self.hooks.values()

    def _require_no_adapter(self) -> None:
        for name, attn in self.cross_layers.items():
            if isinstance(attn.processor, nn.Module):  # its weights would have no effect
                advice = f"{type(self.method).__name__} needs cross-attention without an IP-Adapter"
                got = f"{type(attn.processor).__name__} on {name} ({advice})"
                raise RuntimeError(f"cross-attention: expected processors without weights, got {got}")

    def _walk(self, timesteps: Iterable[Any] | Tensor, length: int) -> Iterator[Any]:
        """The timesteps, each with the clock at its step. The pipeline's own loop does not count."""
        steps = step_numbers(timesteps, length)
        self._follower.resting = True
        try:
            self._begin_loop()
            for step, timestep in zip(steps, timesteps):
                self._move(step, steps[-1] + 1)
                yield timestep
                self._called = True
        finally:
            self._follower.resting = False
            self.clock.reset()

    def _begin_loop(self) -> None:
        self.verify()
        self.clock.begin()
        self._declare(self._unguided or self.layout)

    def _move(self, step: int, total: int, *, executed: bool = True) -> None:
        """Set the clock. Before the first timestep of a loop, `total` is that of the whole schedule."""
        if executed:
            if (step, total) == (self.clock.step, self.clock.total) and self._expected == total:
                return
            if self._expected != total:
                self._expected = total
                self.expect(total)
        device = getattr(self.pipe, "_execution_device", None) or next(self.model.parameters()).device
        self.clock.set(step, total, device)

    def expect(self, total: int) -> None:
        """Warn, once for a `with` block, if the method edits in none of `total` steps."""
        edited = [step for step in range(total) if self.clock.edits(step, total)]
        if not edited:
            start, stop = self.clock.steps or (0, 1)
            self._warn(f"it edits none of {total} steps, as steps=({start:.3g}, {stop:.3g}) holds none")
        elif "structure" in self.layout.roles and all(
            self.method.takes_structure(step, total) for step in edited
        ):
            self._warn(
                f"in all of its {len(edited)} of {total} steps it reads the structure, not the appearance"
            )

    def _expect_layers(self) -> None:
        """Warn if the method edits no row or layer of those that are chosen."""
        if "output" not in self.layout.roles:
            self._warn(
                f"it edits nothing, as the layout has no output row, only {', '.join(self.layout.roles)}"
            )
        elif not self.hooks and not self.cross_layers and not any(map(self.method.acts_in, self.layers)):
            first = "".join(f", {name} the first" for name in list(self.layers)[:1])
            self._warn(f"it edits none of the {len(self.layers)} chosen layers{first}")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("%s: %s", type(self.method).__name__, text)

    def _before_call(self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """See a call of the UNet: its timestep, and how many rows it has."""
        self._called = True
        self._follower.call(*arguments, **options)
        sample = arguments[0] if arguments else options["sample"]
        if self._size != (size := (sample.shape[-2], sample.shape[-1])):
            self.check(size)
            self._size = size
        if self._unguided is not None:
            self._derive_guidance(sample)

    @property
    def _unguided(self) -> BatchLayout | None:
        """The layout without guidance, if the pipeline runs without guidance and the user says nothing."""
        denied = getattr(self.pipe, "do_classifier_free_guidance", None) is False
        return self.layout.unguided() if denied and self.layout.guidance is None else None

    def _derive_guidance(self, sample: Tensor) -> None:
        """Believe the batch more than the pipeline: some say "no guidance" always, and run with it.

        Guidance halves have the same latents. Other batches with twice the rows are an error, and not halves.
        """
        rows = len(self.layout.roles) * self.layout.images_per_prompt
        doubled = len(sample) == 2 * rows
        if doubled and not torch.equal(*sample.chunk(2)):
            try:
                self.layout.unguided().parts(len(sample))
            except ValueError as error:
                said = f"{type(self.pipe).__name__}.do_classifier_free_guidance is False"
                advice = "two guidance halves would have the same latents; the layout may say guidance=True"
                raise ValueError(f"{error} ({said}; {advice})") from None
        self._declare(self.layout if doubled else self.layout.unguided())

    def _declare(self, layout: BatchLayout) -> None:
        for each in self._installed():
            if each.layout != layout:
                each.layout = layout


class Tracked(Iterator[Any]):
    """The timesteps of `Control.track`. They have a length, which progress bars show."""

    def __init__(self, timesteps: Iterator[Any], length: int) -> None:
        self._timesteps, self._length = timesteps, length

    def __next__(self) -> Any:
        return next(self._timesteps)

    def __len__(self) -> int:
        return self._length


def _begin(forward: ForwardPass, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    forward.begin(*(args[0] if args else kwargs["sample"]).shape[-2:])


def _count(names: Counter) -> str:
    return ", ".join(f"{name} on {count}" for name, count in names.items())
