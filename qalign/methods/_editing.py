"""What most methods share: they edit the output rows, and every other row is stock attention."""

import random
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..context.layer_call import Site
from ..context.layers import decoder_layers

Hook = Callable[[nn.Module, Tensor, Tensor, Site], Tensor]  # (module, its input, its output, site) -> output


class Method(Protocol):
    """Frozen settings with one function on [B, H, N, D] tensors, and what `attach` asks of them.

    What a method may have besides:
        default_steps: a (start, stop) for `attach` where the user gives none.
        prepare(hidden, project, site): what it makes of the hidden states [B, N, C] before `project` gives queries, keys and values of them.
        hooks(model): by module name, what it makes of the output [B, ...] of modules that are no attention; `site.replace` puts the edited
            rows in place.
        cross_layers(names), attend_cross(q, k, v, site): which cross-attention layers it acts on, and their attention output; keys and values are
            the prompt's.
        start(latents, appearance), change_clean(clean, appearance, timestep): in `AppearanceTransferPipeline`, what the outputs' first latents
            [outputs, C, h, w] become beside the appearance's [1, C, h, w]; and likewise their x̂_0 in a step.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The attention output of every row of the batch, [B, H, N, D]."""

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """Which of a denoiser's self-attention layers the method edits where the user names none."""

    def takes_structure(self, step: int, total: int) -> bool:
        """Whether keys and values come from the structure at this step."""


class Card(NamedTuple):
    """A method in a line of `python -m qalign methods`.

    Attributes:
        title: as the field calls it. paper: its arXiv id, or where it was published.
        edits: what becomes of the output rows. layers: by default, on SD 1.5 and SDXL. steps: by default.
        uses: the ops it is made of.
        cost: of an edited layer and output row, in units of the self-attention that it replaces, at large N.
    """

    title: str
    paper: str
    edits: str
    layers: str
    steps: str
    uses: str
    cost: float


class Editing:
    """The base of a method: its `edit` gives the attention output of the output rows.

    All other rows are stock attention. A method is a frozen dataclass of settings. It knows tensors and
    roles, never a step number or a batch position: `site` knows those.

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

    `attach(pipe, Blend(weight=0.3))` runs it on a UNet. On tensors of three rows, two heads, 16 tokens, eight
    channels:

    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> Blend().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Attributes:
        card: what the method is, in a line of `python -m qalign methods`; only those of this package need
            one.
        default_steps: (start, stop) as fractions of the denoising loop where the user names none; None is all of it.

    What else a method may have (`prepare`, `hooks`, `attend_cross`, ...) stands in `qalign.methods.Method`.
    """

    card: ClassVar[Card]
    default_steps: ClassVar[tuple[float, float] | None] = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
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
        """The attention output of the rows `output`, which read the rows `reference`.

        Args:
            q, k, v: [B, H, N, D] of all rows of the batch; `take(q, output)` are the queries of the output
                rows.
            output: int32 [rows], which rows of the batch are edited, in every guidance part.
            reference: int32 [rows], the row that each of these reads: its appearance, or in some steps its
                structure.
            site: layout, scale, labels and clock.

        Returns:
            [rows, H, N, D] in the dtype of `q`.
        """
        raise NotImplementedError

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """The layers that are edited where the user names none: the decoder's last six."""
        return last_six(names)

    def takes_structure(self, step: int, total: int) -> bool:
        """Whether output rows read their structure instead of their appearance at this step: never."""
        return False


def require_method(method: Any) -> None:
    """The argument `method` has to be an instance of a method, with every part that `attach` uses.

    Raises:
        TypeError: it is not one, or a part is missing.
    """
    needed = ("attend", "default_layers", "takes_structure")
    missing = [name for name in needed if not callable(getattr(method, name, None))]
    if len(missing) == len(needed) and not hasattr(method, "edit"):
        raise TypeError(f"method: expected an instance of a method such as QAlign(), got {method!r}")
    if isinstance(method, type):
        name = method.__name__
        raise TypeError(f"method: expected an instance, got the class {name}: write {name}()")
    name = type(method).__name__
    if missing:
        expected = f"{', '.join(needed)}, all of which qalign.Editing has"
        raise TypeError(f"method: expected {expected}, got {name} without {', '.join(missing)}")
    if not isinstance(method, Editing):
        return
    if type(method).attend is Editing.attend and type(method).edit is Editing.edit:
        parts = "edit(self, q, k, v, output, reference, site) or attend(self, q, k, v, site)"
        raise TypeError(f"method: expected {name} to define {parts}, got neither")
    if not is_dataclass(method):
        advice = "write @dataclass(frozen=True) above it"
        raise TypeError(f"method: expected a frozen dataclass, got the plain class {name}: {advice}")


def last_six(names: Sequence[str]) -> list[str]:
    """The last six layers of the decoder: up_blocks.2 and up_blocks.3 of SD 1.5, up_blocks.1 of SDXL."""
    return decoder_layers(names)[-6:]


def uniform(count: int, *key: int | str) -> Tensor:
    """Numbers of [0, 1), float32 [count] on the CPU, that are a function of `key` and `count`."""
    seed = random.Random(repr((*key, count))).getrandbits(62)
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
