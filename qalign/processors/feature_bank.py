"""A feature bank: one pass over reference pictures serves any number of later ones."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..context.layer_call import Site
from ..context.layout import BatchLayout
from ..methods import Hook, Method, Project, Wrapped
from .attach import attach


class FeatureBank:
    """The hidden states that self-attention layers were given in a reference pass, by layer and step of the loop.

    >>> bank = FeatureBank("appearance")
    >>> with attach(pipe, bank.record(QAlign()), layout=BatchLayout("output")):
    ...     pipe(prompt, latents=reference)
    >>> with attach(pipe, bank.serve(QAlign()), layout=BatchLayout("output")):
    ...     images = pipe([prompt] * 8, latents=latents).images

    In the second pass a layer's rows are those of the batch and, behind them in each guidance part, those of the bank, which run through no
    other part of the UNet. That is the batched pass [outputs, references] to rounding, for its reference rows do not depend on the others. Both
    passes need the same timesteps and picture size. A batch may have rows of the bank's roles as well, which then are not read. A method that acts
    outside self-attention is refused: `StyleAligned(share_group_norm=False)` and `CtrlX(structure_convolutions=())` are served.

    Args:
        roles: of the recorded rows, as a layout names them: one for each prompt of the recording pass.
        device: where the features are kept; None: where they come from.
        dtype: in which; None: as they come.
        limit: bytes on that device; what comes when they are used up is kept on the CPU. None: no limit.
    """

    def __init__(
        self, *roles: str, device: Any = None, dtype: torch.dtype | None = None, limit: int | None = None
    ) -> None:
        if not roles or set(roles) - {"appearance", "structure"}:
            raise ValueError(f"roles: expected 'appearance', 'structure' or both, got {roles!r}")
        self.roles = roles
        self.device, self.dtype, self.limit = device, dtype, limit
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._on_device = 0

    @property
    def nbytes(self) -> int:
        """Of all features, wherever they are."""
        return sum(kept.nbytes for kept in self._kept.values())

    @property
    def spilled(self) -> int:
        """Of those that are kept on the CPU because of `limit`."""
        return self.nbytes - self._on_device

    def record(self, method: Method) -> Method:
        """What to attach in the reference pass, for `method` later: stock attention that fills the bank, whatever the rows are called."""
        return _Recorder(self, method)

    def serve(self, method: Method) -> Method:
        """What to attach to later pictures, whose layout has none of the bank's rows: `method`, reading from the bank."""
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
        """A noise-free reference pass: the same clean latents at each timestep, one call of the UNet each.

        >>> seal = bank.record_clean(pipe, SeAl(), clean, pipe.scheduler.timesteps, encoder_hidden_states=prompts)
        >>> with attach(pipe, seal, layout=BatchLayout("output")):
        ...     images = pipe([prompt] * 8, latents=latents).images

        Args:
            pipe_or_model: a diffusers pipeline with a UNet, or the UNet, on the device of the latents.
            method: that reads the features later.
            latents: [roles, C, h, w], not noised and, whatever the scheduler, not scaled.
            timesteps: of the later loop.
            layers, steps: as `attach`, as later.
            condition: keyword arguments of the UNet, such as `encoder_hidden_states` [roles, T, C].

        Returns:
            `serve(method)`.
        Source: SeAl (CVPR 2026); its timesteps are not published.
        """
        layout = BatchLayout(*["output"] * len(self.roles), guidance=False)
        with attach(pipe_or_model, self.record(method), layout=layout, layers=layers, steps=steps) as control:
            for timestep in control.track(timesteps):
                control.model(latents, timestep, return_dict=False, **condition)
        return self.serve(method)

    def clear(self) -> None:
        self._kept.clear()
        self._on_device = 0

    def write(self, layer: str, step: int, hidden: Tensor) -> None:
        """Keep [parts, roles, images, N, C]."""
        kept = hidden.detach().to(self.device or hidden.device, self.dtype or hidden.dtype, copy=True)
        previous = self._kept.pop((layer, step), None)
        if previous is not None:
            self._on_device -= previous.nbytes
        if self.limit is not None and self._on_device + kept.nbytes > self.limit:
            kept = kept.to("cpu")
        else:
            self._on_device += kept.nbytes
        self._kept[layer, step] = kept

    def read(self, layer: str, step: int, like: Tensor) -> Tensor:
        """What was kept, on the device and in the dtype of `like`.

        Raises:
            RuntimeError: nothing was.
        """
        if (layer, step) not in self._kept:
            layers, steps = (len({key[place] for key in self._kept}) for place in (0, 1))
            wanted = f"features of {layer or 'a layer without a name'} at step {step}"
            raise RuntimeError(
                f"bank: expected {wanted}, got {layers} other layers and {steps} steps (record with the same method and timesteps)"
            )
        return self._kept[layer, step].to(like.device, like.dtype)


class _BankMethod(Wrapped):
    """A method whose layers and steps are another's, with a bank."""

    def __init__(self, bank: FeatureBank, method: Method) -> None:
        super().__init__(method)
        self.bank = bank

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
        raise ValueError(
            f"method: expected one that acts in self-attention alone, which a bank serves, got {self.method!r}"
        )


class _Recorder(_BankMethod):
    def prepare(self, hidden: Tensor, project: Project, site: Site) -> Tensor:
        if not site.idle:
            layout = site.layout
            if len(layout.roles) != len(self.bank.roles):
                raise ValueError(
                    f"layout: expected {len(self.bank.roles)} roles, as the bank has, got {', '.join(layout.roles)}"
                )
            shape = (layout.parts(len(hidden)), len(layout.roles), layout.images_per_prompt)
            self.bank.write(site.layer, site.step, hidden.unflatten(0, shape))
        return hidden

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return site.plain(q, k, v)


class _Server(_BankMethod):
    def prepare(self, hidden: Tensor, project: Project, site: Site) -> Tensor:
        if site.idle:
            return hidden
        if site.mask is not None:
            raise ValueError(
                f"attention_mask: expected none with a bank, got {list(site.mask.shape)} after preparation"
            )
        layout, rows = site.layout, self.bank.read(site.layer, site.step, hidden)
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
