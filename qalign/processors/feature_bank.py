"""A feature bank: one pass over reference pictures serves any number of later ones."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import require_uninterrupted
from ..context.layer_call import Site
from ..context.layout import BatchLayout
from ..context.regions import Regions
from ..methods import Hook, Method, Project, Wrapped
from .attach import attach


class FeatureBank:
    """The hidden states of a reference pass, by self-attention layer and denoising step.

    One reference pass then serves any number of later batches without reference rows.

    >>> from qalign import BatchLayout, FeatureBank, QAlign, attach
    >>> bank, settings = FeatureBank("appearance"), {"num_inference_steps": 50, "guidance_scale": 1}
    >>> with attach(pipe, bank.record(QAlign()), layout=BatchLayout("output")):
    ...     reference = pipe(prompt, latents=latents[:1], **settings).images
    >>> with attach(pipe, bank.serve(QAlign()), layout=BatchLayout("output", "output")):
    ...     images = pipe([prompt] * 2, latents=latents[1:], **settings).images
    >>> len(images), bank.nbytes > 0
    (2, True)

    In a later pass, the rows of the bank follow the batch's rows of each guidance half inside the edited
    layers. They pass through no other part of the UNet. The result is that of the batch [outputs, references]
    up to rounding, because reference rows do not depend on other rows. Both passes need the same timesteps
    and picture size. Rows of the batch that have a role of the bank are not read. A method that acts outside
    self-attention is refused. `StyleAligned(share_group_norm=False)` and `CtrlX(structure_convolutions=())`
    are served. Where the UNet is called several times at one timestep, as for the views of a panorama, each
    call has its features. A single recorded call serves all calls at its timestep.

    Args:
        roles: "appearance" or "structure" for each prompt of the reference pass.
        device: where the features are kept. None keeps them where they are computed.
        dtype: of the kept features. None is the dtype in which they are computed.
        limit: the number of bytes on that device. Further features are kept on the CPU. None is no limit.

    Raises:
        ValueError: `roles` has other names, or none.
    """

    def __init__(
        self, *roles: str, device: Any = None, dtype: torch.dtype | None = None, limit: int | None = None
    ) -> None:
        if not roles or set(roles) - {"appearance", "structure"}:
            raise ValueError(f"roles: expected 'appearance', 'structure' or both, got {roles!r}")
        self.roles = roles
        self.device, self.dtype, self.limit = device, dtype, limit
        self._kept: dict[tuple[str, int], list[_Kept]] = {}  # by layer and step, one for each call
        self._on_device = 0

    @property
    def nbytes(self) -> int:
        """The bytes of all features, on the device and on the CPU."""
        return sum(kept.features.nbytes for calls in self._kept.values() for kept in calls)

    @property
    def spilled(self) -> int:
        """The bytes of the features that `limit` moved to the CPU."""
        return self.nbytes - self._on_device

    def record(self, method: Method) -> Method:
        """Return what to attach in the reference pass: stock attention that fills the bank for `method`."""
        return _Recorder(self, method)

    def serve(self, method: Method) -> Method:
        """Return what to attach in later passes: `method`, which reads the bank's rows."""
        return _Server(self, method)

    @torch.no_grad()
    def record_clean(
        self,
        pipe_or_model: Any,
        method: Method,
        latents: Tensor,
        timesteps: Sequence[Any] | Tensor,
        *,
        layers: str | Sequence[str] | None = None,
        steps: tuple[float, float] | None = None,
        **condition: Any,
    ) -> Method:
        """Fill the bank in a reference pass without noise: the same clean latents at each timestep.

        The UNet is called once for each timestep.

        >>> from qalign import BatchLayout, FeatureBank, SeAl, attach
        >>> pipe.scheduler.set_timesteps(2)
        >>> prompts = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
        >>> bank, clean = FeatureBank("appearance"), torch.randn(1, 4, 16, 16)
        >>> timesteps = pipe.scheduler.timesteps
        >>> seal = bank.record_clean(pipe, SeAl(), clean, timesteps, encoder_hidden_states=prompts)
        >>> with attach(pipe, seal, layout=BatchLayout("output")):
        ...     images = pipe(prompt, latents=latents[:1], guidance_scale=1, num_inference_steps=2).images

        Args:
            pipe_or_model: a diffusers pipeline with a UNet, or the UNet, on the device of the latents.
            method: the method that reads the features later.
            latents: [roles, C, h, w], without noise, and not scaled for any scheduler.
            timesteps: those of the later loop.
            layers, steps: as `attach`, and the same as later.
            condition: keyword arguments of the UNet, such as `encoder_hidden_states` [roles, T, C].

        Returns:
            `serve(method)`, to be attached in later passes.

        Raises:
            RuntimeError: `pipe._interrupt` ended the pass early.

        Source: SeAl (CVPR 2026). Its timesteps are not published.
        """
        if hasattr(pipe_or_model, "_interrupt"):
            pipe_or_model._interrupt = False  # as a pipeline's own call begins
        layout = BatchLayout(*["output"] * len(self.roles), guidance=False)
        with attach(pipe_or_model, self.record(method), layout=layout, layers=layers, steps=steps) as control:
            for timestep in control.track(timesteps):
                require_uninterrupted(pipe_or_model, "the reference pass")
                control.model(latents, timestep, return_dict=False, **condition)
        return self.serve(method)

    def clear(self) -> None:
        """Remove all features."""
        self._kept.clear()
        self._on_device = 0

    def write(self, layer: str, step: int, hidden: Tensor, *, call: int = 0) -> None:
        """Keep the features [guidance halves, roles, images, N, C] of a layer in a call at a step.

        They replace those of this call and of later ones.
        """
        features = hidden.detach().to(self.device or hidden.device, self.dtype or hidden.dtype, copy=True)
        calls = self._kept.setdefault((layer, step), [])
        while len(calls) > call:
            previous = calls.pop()
            self._on_device -= 0 if previous.spilled else previous.features.nbytes
        spilled = self.limit is not None and self._on_device + features.nbytes > self.limit
        calls.append(_Kept(features.to("cpu") if spilled else features, spilled))
        self._on_device += 0 if spilled else features.nbytes

    def read(self, layer: str, step: int, like: Tensor, *, call: int = 0) -> Tensor:
        """Return the kept features on the device and in the dtype of `like`.

        Raises:
            RuntimeError: there are none of this layer, step and call.
        """
        calls = self._kept.get((layer, step), [])
        if not calls:
            layers, steps = (len({key[place] for key in self._kept}) for place in (0, 1))
            wanted = f"features of {layer or 'a layer without a name'} at step {step}"
            got = f"{layers} other layers and {steps} steps (record with the same method and timesteps)"
            raise RuntimeError(f"bank: expected {wanted}, got {got}")
        if call >= len(calls) > 1:
            self._refuse_calls(layer, step, call + 1)
        return calls[min(call, len(calls) - 1)].features.to(like.device, like.dtype)

    def require_all_read(self, layer: str, step: int, calls: int) -> None:
        """Check that as many calls have read a step as were recorded, or that one was recorded for all.

        Raises:
            RuntimeError: other calls were recorded too.
        """
        if calls < len(self._kept.get((layer, step), [])):
            self._refuse_calls(layer, step, calls)

    def _refuse_calls(self, layer: str, step: int, calls: int) -> None:
        recorded = len(self._kept[layer, step])
        expected = f"{recorded} calls of {layer or 'a layer without a name'} at step {step}, as recorded"
        raise RuntimeError(f"bank: expected {expected}, got {calls} (record one call for all, or as many)")


class _Kept(NamedTuple):
    features: Tensor
    spilled: bool  # to the CPU, by the limit


class _Calls:
    """Count the calls of each layer at each step of a loop."""

    def __init__(self) -> None:
        self._loop: Any = None
        self._counts: dict[tuple[str, int], int] = {}

    def number(self, site: Site) -> int:
        """The number of this call among those of its layer and step, from 0."""
        if site.clock is None or site.clock.step is None:
            running = "inside a pipeline call, or control.track(timesteps)"
            raise RuntimeError(f"bank: expected a running clock ({running}), got a call outside of one")
        loop = (site.clock, site.clock.loops)
        if loop != self._loop:
            self._loop, self._counts = loop, {}
        number = self._counts.get((site.layer, site.step), 0)
        self._counts[site.layer, site.step] = number + 1
        return number

    def before(self, site: Site) -> tuple[int, int] | None:
        """The step that the layer has left for this one, and the number of its calls there."""
        steps = [step for layer, step in self._counts if layer == site.layer and step != site.step]
        return (steps[-1], self._counts[site.layer, steps[-1]]) if steps else None


class _BankMethod(Wrapped):
    """A method whose layers and steps are another's, with a bank."""

    def __init__(self, bank: FeatureBank, method: Method) -> None:
        super().__init__(method)
        self.bank = bank
        self.calls = _Calls()

    def hooks(self, model: nn.Module) -> dict[str, Hook]:
        """Return no hooks: a bank keeps no reference rows of other modules.

        Raises:
            ValueError: the method acts on modules other than self-attention.
        """
        if self.method.hooks(model):
            self._refuse()
        return {}

    def cross_layers(self, names: Sequence[str]) -> list[str]:
        """Return no layers, as `hooks`."""
        if self.method.cross_layers(names):
            self._refuse()
        return []

    def _refuse(self) -> None:
        expected = "one that acts in self-attention alone, because a bank keeps no other features"
        raise ValueError(f"method: expected {expected}, got {self.method!r}")


class _Recorder(_BankMethod):
    reads_size = False

    def check(self, *_: Any) -> None:
        """Check nothing: stock attention takes all pictures."""

    def prepare(self, hidden: Tensor, project: Project, site: Site) -> Tensor:
        if not site.idle:
            layout = site.layout
            if len(layout.roles) != len(self.bank.roles):
                expected = f"{len(self.bank.roles)} roles, as the bank has"
                raise ValueError(f"layout: expected {expected}, got {', '.join(layout.roles)}")
            shape = (layout.parts(len(hidden)), len(layout.roles), layout.images_per_prompt)
            call = self.calls.number(site)
            self.bank.write(site.layer, site.step, hidden.unflatten(0, shape), call=call)
        return hidden

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return site.plain(q, k, v)


class _Server(_BankMethod):
    def check(
        self,
        size: tuple[int, int],
        grids: Sequence[tuple[int, int]],
        layout: BatchLayout,
        regions: Regions | None,
    ) -> None:
        self.method.check(size, grids, layout.extended(*self.bank.roles), regions)

    def prepare(self, hidden: Tensor, project: Project, site: Site) -> Tensor:
        if site.idle:
            return hidden
        if site.mask is not None:
            got = f"{list(site.mask.shape)} after preparation"
            raise ValueError(f"attention_mask: expected none with a bank, got {got}")
        layout, call = site.layout, self.calls.number(site)
        left = self.calls.before(site)
        if call == 0 and left is not None:
            self.bank.require_all_read(site.layer, *left)
        rows = self.bank.read(site.layer, site.step, hidden, call=call)
        shape = (layout.parts(len(hidden)), len(layout.roles), layout.images_per_prompt)
        rows = rows.expand(shape[0], -1, shape[2], -1, -1)
        joined = torch.cat([hidden.unflatten(0, shape), rows], dim=1).flatten(0, 2)
        return self.method.prepare(joined, project, self._joined(site))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.idle:
            return site.plain(q, k, v)
        joined = self._joined(site)
        parts, roles = joined.layout.parts(len(q)), len(joined.layout.roles)
        attended = self.method.attend(q, k, v, joined).unflatten(0, (parts, roles, -1))
        return attended[:, : len(site.layout.roles)].flatten(0, 2)

    def _joined(self, site: Site) -> Site:
        return replace(site, layout=site.layout.extended(*self.bank.roles))
