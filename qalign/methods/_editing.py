"""The base classes of methods: what a method may define, and what it does where it defines nothing."""

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..context.layer_call import Site
from ..context.layers import decoder_layers, token_grid
from ..context.layout import BatchLayout
from ..context.regions import Regions

Hook = Callable[[nn.Module, Tensor, Tensor, Site], Tensor]  # (module, its input, its output, site) -> output
Project = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # hidden states -> queries, keys and values


class Card(NamedTuple):
    """Describe a method in one entry of `python -m qalign methods`.

    Attributes:
        title: the name that the field uses.
        paper: the arXiv id, or the place of publication.
        edits: what replaces the attention output of the output rows.
        layers: the layers that are edited by default, on SD 1.5 and SDXL.
        steps: the denoising steps in which they are edited by default.
        uses: the ops that compute it.
        cost: the multiply-adds of an edited layer and output row at large N. The unit is the self-attention
            that the method replaces.
    """

    title: str
    paper: str
    edits: str
    layers: str
    steps: str
    uses: str
    cost: float


class Method:
    """The base of all methods. This class itself changes nothing: each ability has its neutral default here.

    A method of your own extends `Editing`, which needs a single function. Extend `Method` to decide about
    every row of the batch. Settings are immutable: a method is a frozen dataclass.

    >>> import torch
    >>> from qalign import BatchLayout, Site
    >>> from qalign.methods import Method
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> torch.equal(Method().attend(q, k, v, site), site.plain(q, k, v))
    True

    Attributes:
        card: the entry in `python -m qalign methods`. Only the methods of this package have one.
        default_steps: the fractions (start, stop) of the denoising loop in which the method edits when the
            user names none. None is the whole loop.
        reads_labels: the pictures whose label map the method reads where there are regions.
        reads_size: whether the method reads `site.forward.size`, the size of the latents.
        may_edit_no_layer: whether `default_layers` may be empty because the settings say so.
    """

    card: ClassVar[Card | None] = None
    default_steps: ClassVar[tuple[float, float] | None] = None
    reads_labels: ClassVar[tuple[str, ...]] = ()
    reads_size: ClassVar[bool] = False

    @property
    def may_edit_no_layer(self) -> bool:
        return False

    @classmethod
    def title(cls) -> str:
        """Return the name that tables and pictures show: that of the card, or the name of the class."""
        return cls.__name__ if cls.card is None else cls.card.title

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Return the self-attention output [B, H, N, D] of every row; here stock attention."""
        return site.plain(q, k, v)

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """Select the self-attention layers that are edited by default; here the decoder's last six."""
        return last_six(names)

    def check(
        self,
        size: tuple[int, int],
        grids: Sequence[tuple[int, int]],
        layout: BatchLayout,
        regions: Regions | None,
    ) -> None:
        """Check, before any work, that the pictures and their labels suit the method.

        Args:
            size: (height, width) of the latents.
            grids: (rows, columns) of the tokens of the edited layers.
            layout: the roles of the batch's rows.
            regions: the labels, or None.

        Raises:
            ValueError: they do not. Here: `regions` lack a map of `reads_labels`, or it fits no grid.
        """
        if regions is None:
            return
        for picture in self.reads_labels:
            labels = getattr(regions, picture)
            for grid in grids:
                if isinstance(labels, Tensor):
                    check_labels(labels, picture, size, grid)
                regions.picture_labels(picture, grid[0] * grid[1], torch.device("cpu"))

    def acts_in(self, layer: str) -> bool:
        """Return whether the method edits a chosen self-attention layer of that name; here always."""
        return True

    def takes_structure(self, step: int, total: int) -> bool:
        """Return whether output rows read the structure, and not the appearance, at `step` of `total`."""
        return False

    def prepare(self, hidden: Tensor, project: Project, site: Site) -> Tensor:
        """Return the hidden states [B, N, C] that are projected; `project` gives queries, keys and values."""
        return hidden

    def hooks(self, model: nn.Module) -> dict[str, Hook]:
        """Return functions that change the outputs of modules other than attention, by module name.

        A function gets the module, its input, its output [B, ...] and the site, and returns the new output.
        `site.replace` writes the edited rows into it.
        """
        return {}

    def cross_layers(self, names: Sequence[str]) -> list[str]:
        """Select the cross-attention layers in which `attend_cross` runs; here none."""
        return []

    def attend_cross(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Return the cross-attention output [B, H, N, D] of every row; keys and values are the prompt's."""
        return site.plain(q, k, v)

    def start(self, latents: Tensor, appearance: Tensor) -> Tensor:
        """Return the outputs' first latents [outputs, C, h, w] in `AppearanceTransferPipeline`.

        The appearance's latents are [1, C, h, w].
        """
        return latents

    def change_clean(self, clean: Tensor, appearance: Tensor, timestep: int) -> Tensor:
        """Return the outputs' clean latents x̂_0 [outputs, C, h, w] in `AppearanceTransferPipeline`.

        The appearance's x̂_0 is [1, C, h, w].
        """
        return clean


class Editing(Method):
    """The base of a method that edits the output rows. All other rows are stock attention.

    A method is a frozen dataclass of settings with one function, `edit`. It knows tensors and roles, and
    never a step number or a position in the batch: `site` knows those.

    >>> from dataclasses import dataclass
    >>> import torch
    >>> from qalign import BatchLayout, Editing, Site, take
    >>> from qalign_kernels import attention
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Blend(Editing):
    ...     weight: float = 0.5
    ...
    ...     def edit(self, q, k, v, output, reference, site):
    ...         appearance = site.reference(k, v, reference)  # keys and values, with the labels of regions
    ...         labels = site.query_labels(q)
    ...         read = attention(take(q, output), appearance, scale=site.scale, query_labels=labels)
    ...         return torch.lerp(site.stock(q, k, v, output), read, self.weight)

    `attach(pipe, Blend(weight=0.3))` runs it on a UNet. On tensors of three rows, two heads, 16 tokens and
    eight channels:

    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> Blend().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    The other abilities of a method (`prepare`, `hooks`, `attend_cross`, ...) are those of
    `qalign.methods.Method`. Define the ones that you need.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Return `edit` in the output rows and stock attention in the others; only stock in an idle step."""
        if site.idle:
            return site.plain(q, k, v)
        output = site.output_rows(q)
        edited = self.edit(q, k, v, output, site.reference_rows(q), site)
        shape = [len(output), *q.shape[1:]]
        if list(edited.shape) != shape or edited.dtype != q.dtype:
            expected, got = f"{q.dtype} [rows, H, N, D] = {shape}", f"{edited.dtype} {list(edited.shape)}"
            raise ValueError(f"{type(self).__name__}.edit: expected {expected}, got {got}")
        return site.merge(q, k, v, edited)

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        """Return the attention output of the rows `output`, which read the rows `reference`.

        Args:
            q, k, v: [B, H, N, D], of all rows of the batch. `take(q, output)` are the queries of the output
                rows.
            output: int32 [rows], the rows of the batch that are edited, in every guidance half.
            reference: int32 [rows], the row that each of these reads: its appearance, or its structure at
                structure steps.
            site: layout, scale, labels and clock.

        Returns:
            [rows, H, N, D] in the dtype of `q`.
        """
        raise NotImplementedError


class Wrapped(Method):
    """The base of a method that runs another one and adds something, such as a measurement.

    Every ability is the other method's.
    """

    def __init__(self, method: Method) -> None:
        require_method(method)
        self.method = method

    @property
    def default_steps(self) -> tuple[float, float] | None:  # type: ignore[override]
        return self.method.default_steps

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return self.method.attend(q, k, v, site)

    @property
    def reads_labels(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.method.reads_labels

    @property
    def reads_size(self) -> bool:  # type: ignore[override]
        return self.method.reads_size

    @property
    def may_edit_no_layer(self) -> bool:
        return self.method.may_edit_no_layer

    def check(
        self,
        size: tuple[int, int],
        grids: Sequence[tuple[int, int]],
        layout: BatchLayout,
        regions: Regions | None,
    ) -> None:
        self.method.check(size, grids, layout, regions)

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return self.method.default_layers(names)

    def acts_in(self, layer: str) -> bool:
        return self.method.acts_in(layer)

    def takes_structure(self, step: int, total: int) -> bool:
        return self.method.takes_structure(step, total)

    def prepare(self, hidden: Tensor, project: Project, site: Site) -> Tensor:
        return self.method.prepare(hidden, project, site)

    def hooks(self, model: nn.Module) -> dict[str, Hook]:
        return self.method.hooks(model)

    def cross_layers(self, names: Sequence[str]) -> list[str]:
        return self.method.cross_layers(names)

    def attend_cross(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return self.method.attend_cross(q, k, v, site)

    def start(self, latents: Tensor, appearance: Tensor) -> Tensor:
        return self.method.start(latents, appearance)

    def change_clean(self, clean: Tensor, appearance: Tensor, timestep: int) -> Tensor:
        return self.method.change_clean(clean, appearance, timestep)


def check_labels(labels: Any, picture: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Check that a label map belongs to latents of this size and gives labels to a layer's grid.

    Raises:
        ValueError: it does not.
    """
    try:
        fits = token_grid(labels.shape, grid[0] * grid[1]) == grid
    except ValueError:
        fits = False
    if not fits:
        latents, layer, map = (f"{height} x {width}" for height, width in (size, grid, labels.shape))
        expected = f"a label map of the {picture} for {latents} latents and a layer of {layer} tokens"
        raise ValueError(f"regions: expected {expected}, got {map}")


def require_method(method: Any) -> None:
    """Check that the argument `method` is an instance of a complete method.

    Raises:
        TypeError: it is not an instance of a method, or it lacks a part.
    """
    if isinstance(method, type) and issubclass(method, Method):
        name = method.__name__
        raise TypeError(f"method: expected an instance, got the class {name}: write {name}()")
    if not isinstance(method, Method):
        advice = "a method of your own extends qalign.Editing"
        raise TypeError(
            f"method: expected an instance of a method such as QAlign(), got {method!r} ({advice})"
        )
    if not isinstance(method, Editing):
        return
    name = type(method).__name__
    if type(method).attend is Editing.attend and type(method).edit is Editing.edit:
        parts = "edit(self, q, k, v, output, reference, site) or attend(self, q, k, v, site)"
        raise TypeError(f"method: expected {name} to define {parts}, got neither")
    if not is_dataclass(method):
        advice = "write @dataclass(frozen=True) above it"
        raise TypeError(f"method: expected a frozen dataclass, got the plain class {name}: {advice}")


def last_six(names: Sequence[str]) -> list[str]:
    """Select the decoder's last six: up_blocks.2 and up_blocks.3 of SD 1.5, up_blocks.1 of SDXL."""
    return decoder_layers(names)[-6:]
