"""A method from outside the package runs as those inside do; a missing part gets one line."""

import doctest
import inspect
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("diffusers")

import qalign  # noqa: E402
from qalign import (  # noqa: E402
    BatchLayout,
    Editing,
    FeatureBank,
    QAlign,
    Regions,
    Site,
    UNetAttnProcessor,
    attach,
    take,
)
from qalign.methods import Method, Wrapped  # noqa: E402
from qalign_kernels import attention  # noqa: E402
from tests.processors.models import SIZE, generate, make_pipe, make_unet, unet_inputs  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Blend(Editing):
    """Own attention blended with attention to the appearance."""

    weight: float = 0.5

    def edit(self, q, k, v, output, reference, site):
        appearance = site.reference(k, v, reference)
        read = attention(take(q, output), appearance, scale=site.scale, query_labels=site.query_labels(q))
        return torch.lerp(site.stock(q, k, v, output), read, self.weight)


LABELS = torch.zeros(SIZE, SIZE, dtype=torch.long)
LABELS[:, SIZE // 2 :] = 1


@pytest.mark.parametrize("parts", (1, 2))
@pytest.mark.parametrize(
    "regions", (None, Regions(appearance=LABELS, structure=LABELS)), ids=("all", "regions")
)
def test_own_method_runs_on_a_unet(parts, regions) -> None:
    unet = make_unet("sd15")
    inputs = unet_inputs(unet, batch=3 * parts)
    layout = BatchLayout("output", "appearance", "structure", guidance=parts == 2)
    with torch.no_grad():
        stock = unet(**inputs).sample
        with attach(unet, Blend(), layout=layout, layers="up", regions=regions):
            edited = unet(**inputs).sample
        with attach(unet, Blend(weight=0.0), layout=layout, layers="up", regions=regions):
            neutral = unet(**inputs).sample
    rows = torch.tensor(layout.rows("output", 3 * parts))
    others = torch.tensor(layout.rows("other", 3 * parts))
    assert torch.equal(edited[others], stock[others]) and torch.equal(neutral, stock)
    assert edited.isfinite().all() and all((edited[row] - stock[row]).abs().max() > 1e-4 for row in rows)


def test_own_method_reads_its_regions_only() -> None:
    half = SIZE**2 // 2
    q, k, v = torch.randn(3, 3, 2, SIZE**2, 8, generator=torch.manual_seed(0))
    top = torch.zeros(SIZE, SIZE, dtype=torch.long)
    top[SIZE // 2 :] = 1
    site = Site(
        BatchLayout("output", "appearance", "structure"), regions=Regions(appearance=top, structure=top)
    )
    found = Blend(weight=1.0).attend(q, k, v, site)[0]
    for tokens in (slice(None, half), slice(half, None)):
        alone = torch.nn.functional.scaled_dot_product_attention(
            q[0, :, tokens], k[1, :, tokens], v[1, :, tokens]
        )
        torch.testing.assert_close(found[:, tokens], alone)


def test_own_method_runs_in_pipeline_and_bank() -> None:
    pipe, bank = make_pipe("sd15"), FeatureBank("appearance")
    stock = generate(pipe)
    with attach(pipe, Blend(), layers="up"):
        edited = generate(pipe)
    assert torch.equal(edited[1:], stock[1:]) and not torch.equal(edited[0], stock[0])
    with attach(pipe, bank.record(Blend()), layout=BatchLayout("output", guidance=True)):
        pipe("a zebra", num_inference_steps=1, output_type="latent")
    assert bank.nbytes


def test_every_ability_has_a_neutral_default() -> None:
    q, k, v = torch.randn(3, 3, 2, 16, 8, generator=torch.manual_seed(0))
    site, method, names = (
        Site(BatchLayout("output", "appearance", "structure")),
        Method(),
        ["up_blocks.0.attn2"],
    )
    for attend in (method.attend, method.attend_cross):
        assert torch.equal(attend(q, k, v, site), site.plain(q, k, v))
    assert method.prepare(q, None, site) is method.start(q, k) is method.change_clean(q, k, 0) is q
    assert method.hooks(make_unet("small")) == {} and method.cross_layers(names) == []
    assert method.default_steps is None and not method.takes_structure(0, 10)


def test_a_wrapped_method_has_its_abilities() -> None:
    """Every ability of the base is passed on: a new one must not fall back to its default."""
    abilities = {name for name in vars(Method) if not name.startswith("__")} - {"card", "title"}
    assert abilities == {name for name in vars(Wrapped) if not name.startswith("__")}


class Nothing(Editing):
    """Neither edits nor is a dataclass."""


class Plain(Editing):
    """Is no dataclass."""

    def edit(self, q, k, v, output, reference, site):
        return take(q, output)


@dataclass(frozen=True)
class Loose:
    """Has no base."""

    def edit(self, q, k, v, output, reference, site):
        return take(q, output)


PLAIN = "method: expected a frozen dataclass, got the plain class Plain: "
SUCH = "method: expected an instance of a method such as QAlign(), got "
EXTEND = " (a method of your own extends qalign.Editing)"
DEFINE = "method: expected Nothing to define edit(self, q, k, v, output, reference, site) or "
REFUSALS = [
    (None, SUCH + "None" + EXTEND),
    ("qalign", SUCH + "'qalign'" + EXTEND),
    (int, SUCH + "<class 'int'>" + EXTEND),
    (QAlign, "method: expected an instance, got the class QAlign: write QAlign()"),
    (Blend, "method: expected an instance, got the class Blend: write Blend()"),
    (Nothing(), DEFINE + "attend(self, q, k, v, site), got neither"),
    (Plain(), PLAIN + "write @dataclass(frozen=True) above it"),
    (Loose(), SUCH + "Loose()" + EXTEND),
]


@pytest.mark.parametrize("wrong, line", REFUSALS, ids=[line[-40:] for _, line in REFUSALS])
def test_incomplete_method_is_refused_in_one_line(wrong, line) -> None:
    unet, bank = make_unet("small"), FeatureBank("appearance")
    for use in (lambda: attach(unet, wrong), lambda: bank.record(wrong), lambda: bank.serve(wrong)):
        with pytest.raises(TypeError) as refusal:
            use()
        assert str(refusal.value) == line
    if wrong is not None:
        with pytest.raises(TypeError) as refusal:
            UNetAttnProcessor(wrong)
        assert str(refusal.value) == line


@dataclass(frozen=True)
class AllRows(Editing):
    def edit(self, q, k, v, output, reference, site):
        return q


@dataclass(frozen=True)
class Wide(Editing):
    def edit(self, q, k, v, output, reference, site):
        return take(q, output).double()


@pytest.mark.parametrize(
    "method, got", [(AllRows(), "torch.float32 [3, 2, 4, 8]"), (Wide(), "torch.float64 [1, 2, 4, 8]")]
)
def test_edit_of_another_shape_or_dtype_is_refused(method, got) -> None:
    q = torch.zeros(3, 2, 4, 8)
    with pytest.raises(ValueError) as refusal:
        method.attend(q, q, q, Site(BatchLayout("output", "appearance", "structure")))
    expected = "expected torch.float32 [rows, H, N, D] = [1, 2, 4, 8]"
    assert str(refusal.value) == f"{type(method).__name__}.edit: {expected}, got {got}"


@pytest.mark.parametrize("part", (qalign.Editing, qalign.Site, qalign.take), ids=lambda part: part.__name__)
def test_examples_of_public_parts_run(part) -> None:
    names = vars(inspect.getmodule(part)).copy()
    examples = doctest.DocTestFinder(recurse=False).find(part, part.__name__, globs=names)
    results = [doctest.DocTestRunner().run(example) for example in examples]
    assert sum(result.attempted for result in results) > 2 and not any(result.failed for result in results)


def test_lazy_names_agree_and_are_listed() -> None:
    homes = [name for names in qalign._HOMES.values() for name in names]
    assert sorted(homes) == qalign.__all__ == sorted(qalign.__all__)
    assert set(qalign.__all__) <= set(dir(qalign))
    assert all(getattr(qalign, name) is not None for name in qalign.__all__)


@pytest.mark.parametrize(
    "wanted, near",
    [
        ("Qalign", "near names: QAlign"),
        ("Edit", "near names: Editing"),
        ("Nope", "dir(qalign) lists all names"),
    ],
)
def test_attribute_of_a_wrong_name_shows_near_ones(wanted, near) -> None:
    assert not hasattr(qalign, wanted)
    with pytest.raises(AttributeError) as refusal:
        getattr(qalign, wanted)
    assert str(refusal.value).startswith(f"module 'qalign' has no attribute '{wanted}' (") and near in str(
        refusal.value
    )
    with pytest.raises(
        ImportError, match=f"^cannot import name '{wanted}' from 'qalign'"
    ):  # Python's own line
        exec(f"from qalign import {wanted}")


@pytest.mark.slow
def test_help_shows_lazy_names() -> None:
    code = "import qalign; help(qalign)"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in text for name in qalign.__all__)
