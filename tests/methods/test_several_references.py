"""Several references for one output, pictures that see each other, and matches between pictures."""

import math

import pytest
import torch
from torch import Tensor

from qalign import BatchLayout, FeatureBank, UNetAttnProcessor, attach
from qalign.context.clock import Clock
from qalign.context.layer_call import Site
from qalign.context.outside_graphs import uniform
from qalign.context.regions import Regions
from qalign.evaluation.attention_tally import attention_mass
from qalign.methods import METHODS, ConsiStory, CtrlX, DreamMatcher, FreeCustom, ReferenceOnly, SeAl
from tests.methods import literal
from tests.methods.test_formulas import GRID, MASKS, TWO, make_attention, relative_error
from tests.processors.models import make_unet, unet_inputs

TOKENS = GRID[0] * GRID[1]
TRIPLET = BatchLayout("output", "appearance", "structure")


def run(method, hidden: Tensor, layout: BatchLayout = TWO, **settings) -> Tensor:
    attn = make_attention(2, 40)[0]
    attn.set_processor(UNetAttnProcessor(method, layout, **settings))
    with torch.no_grad():
        return attn(hidden)


def truth(formula, rows: Tensor, **settings) -> Tensor:
    """The layer's output [1, N, C] for the output row of `rows` [3, N, C], in float64."""
    attn = make_attention(2, 40)[0].double()
    with torch.no_grad():
        return attn.to_out[0](formula(attn, *rows.double(), **settings).transpose(0, 1).flatten(1))[None]


@pytest.fixture
def hidden() -> Tensor:
    return make_attention(2, 40)[1]


# -- FreeCustom


def test_free_custom_blends_the_unconditional_half_alone(hidden):
    for fidelity in (0.3, 1.0):
        actual = run(FreeCustom(style_fidelity=fidelity, mask_weights=(1.0, 2.0)), hidden)
        both = truth(literal.free_custom, hidden[:3], weights=(1.0, 2.0))
        own = truth(lambda attn, out, *_: literal.plain(*literal.project(attn, out)), hidden[:3])
        assert relative_error(actual[:1], fidelity * own + (1 - fidelity) * both) < 2e-6
        assert relative_error(actual[3:4], truth(literal.free_custom, hidden[3:], weights=(1.0, 2.0))) < 2e-6


def test_free_custom_without_guidance_sees_its_references(hidden):
    actual = run(FreeCustom(), hidden[:3], BatchLayout("output", "appearance", "appearance", guidance=False))
    assert relative_error(actual[:1], truth(literal.free_custom, hidden[:3], weights=(3.0, 3.0))) < 2e-6


def test_trap_free_custom_adds_weights_instead_of_multiplying(hidden):
    """A weight of ln 2 is every key of the subject twice."""
    actual = run(
        FreeCustom(style_fidelity=0.0, mask_weights=math.log(2)),
        hidden[:2],
        BatchLayout("output", "appearance"),
    )

    def twice(attn, out, app):
        (q, own_k, own_v), (_, k, v) = literal.project(attn, out), literal.project(attn, app)
        return literal.plain(q, torch.cat([own_k, k, k], 1), torch.cat([own_v, v, v], 1))

    assert relative_error(actual[:1], truth(twice, hidden[:2])) < 2e-6


def test_trap_free_custom_hides_all_but_the_subject(hidden):
    """A reference's background changes nothing, its subject does. Without subjects only own keys are left."""
    regions, method = Regions(appearance=MASKS), FreeCustom(style_fidelity=0.0)
    before = run(method, hidden, regions=regions)[0]
    for reference in (0, 1):
        for subject in (0, 1):
            changed = hidden.clone()
            changed[1 + reference, MASKS[reference].flatten() == subject] *= -1.5
            assert torch.allclose(run(method, changed, regions=regions)[0], before, rtol=0, atol=1e-6) == (
                subject == 0
            )
    nothing = Regions(appearance=[torch.zeros(GRID, dtype=torch.long)] * 2)
    torch.testing.assert_close(run(method, hidden, regions=nothing), run(None, hidden), rtol=0, atol=2e-6)


def test_trap_a_weight_belongs_to_its_reference(hidden):
    """References and weights swapped together change nothing, swapped alone they do."""
    swapped = hidden[[0, 2, 1]]
    one, other = (FreeCustom(mask_weights=weights) for weights in ((0.5, 3.0), (3.0, 0.5)))
    layout = BatchLayout("output", "appearance", "appearance", guidance=False)
    first = run(one, hidden[:3], layout)[0]
    torch.testing.assert_close(run(other, swapped, layout)[0], first, rtol=0, atol=2e-6)
    assert not torch.allclose(run(one, swapped, layout)[0], first, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        (FreeCustom(), TWO),
        (DreamMatcher(size=GRID, consistency=100.0), TRIPLET),
        (ConsiStory(), TRIPLET),
        (CtrlX(appearance_layers=()), TRIPLET),
        (SeAl(blend="keys_values"), TRIPLET),
    ],
    ids=lambda x: type(x).__name__,
)
def test_masked_keys_are_hidden_in_every_row(method, layout, hidden):
    mask = torch.zeros(3, 1, TOKENS)
    mask[:, :, TOKENS // 2 :] = -10000.0
    changed = hidden[:3].clone()
    changed[:, TOKENS // 2 :] *= -1.5
    attn = make_attention(2, 40)[0]
    attn.set_processor(UNetAttnProcessor(method, layout, layer="up_blocks.0"))
    with torch.no_grad():
        one, other = (attn(x, attention_mask=mask)[0, : TOKENS // 2] for x in (hidden[:3], changed))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [FreeCustom(), DreamMatcher(size=GRID)], ids=lambda method: type(method).__name__
)
def test_attention_mass_can_be_read(method, hidden):
    """`compare` gives label indicators as values, so the results are shares that sum to one."""
    q, k, _ = (x[None].repeat(3, 1, 1, 1) for x in literal.project(make_attention(2, 40)[0], hidden[0]))
    labels = (torch.arange(TOKENS) % 4).expand(3, -1)
    site, rows = (
        Site(BatchLayout("output", "appearance", "structure", guidance=False)),
        torch.tensor([[0], [1]], dtype=torch.int32),
    )
    mass = attention_mass(method, q, k, labels, *rows, site)
    assert mass.shape[:3] == (1, 2, TOKENS) and mass.shape[3] >= 4
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 2, TOKENS), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_bank_keeps_several_references():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=3)

    def loop(method, layout, rows):
        picked = {name: x[rows] if name != "timestep" else x for name, x in inputs.items()}
        with attach(unet, method, layout=layout) as control:
            for timestep in control.track(torch.tensor([900, 100])):
                picked["sample"] = picked["sample"] - 0.3 * unet(**picked | {"timestep": timestep}).sample
        return picked["sample"]

    method, bank = FreeCustom(mask_weights=(1.0, 2.0)), FeatureBank("appearance", "appearance")
    batched = loop(method, BatchLayout("output", "appearance", "appearance"), [0, 1, 2])
    loop(bank.record(method), BatchLayout("output", "output"), [1, 2])
    served = loop(bank.serve(method), BatchLayout("output"), [0])
    torch.testing.assert_close(served, batched[:1], rtol=0, atol=2e-5)


# -- DreamMatcher


def test_trap_dream_matcher_keeps_the_outputs_layout(hidden):
    """The output with its tokens in another order, as appearance, returns the output's own values."""
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    rows = torch.stack([hidden[0], hidden[0, order], hidden[2]])
    torch.testing.assert_close(
        run(DreamMatcher(size=GRID), rows, TRIPLET), run(None, rows), rtol=0, atol=2e-6
    )


def test_trap_dream_matcher_skips_matches_without_return(hidden):
    """No round trip is shorter than a threshold of 0; every one is shorter than one beyond the diagonal."""
    torch.testing.assert_close(
        run(DreamMatcher(size=GRID, consistency=0.0), hidden, TRIPLET), run(None, hidden), rtol=0, atol=2e-6
    )
    anywhere = run(DreamMatcher(size=GRID, consistency=100.0), hidden, TRIPLET)

    def warped(attn, out, app, struct):
        (q, k, _), (ref_q, _, ref_v) = literal.project(attn, out), literal.project(attn, app)
        one, two = (torch.nn.functional.normalize(x.transpose(0, 1).flatten(1), dim=-1) for x in (q, ref_q))
        return literal.plain(q, k, ref_v[:, (one @ two.mT).argmax(1)])

    assert relative_error(anywhere[:1], truth(warped, hidden[:3])) < 2e-6


def test_trap_dream_matcher_allows_less_for_small_foregrounds(hidden):
    """One token of foreground: the threshold is below one token, so only exact returns count."""
    returns, some, stock = [], range(0, TOKENS, 6), run(None, hidden[:3])[0]
    for token in some:
        mask = torch.zeros(TOKENS, dtype=torch.long)
        mask[token] = 1
        one = run(DreamMatcher(), hidden[:3], TRIPLET, regions=Regions(structure=mask.view(GRID)))[0]
        returns.append(not torch.allclose(one, stock, atol=1e-6))
    attn = make_attention(2, 40)[0]
    with torch.no_grad():
        q, ref_q = (literal.project(attn, row)[0].transpose(0, 1).flatten(1) for row in hidden[:2])
    similarity = torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(ref_q, dim=-1).mT
    exact = similarity.argmax(0)[similarity.argmax(1)] == torch.arange(TOKENS)
    assert returns == exact[some].tolist() and 0 < sum(returns) < len(some)


def test_dream_matcher_on_a_grid_that_nobody_told(hidden):
    with pytest.raises(
        ValueError,
        match=r"size: expected \(height, width\) of the latents outside of attach, got None for 96 tokens",
    ):
        run(DreamMatcher(), hidden, TRIPLET)
    with pytest.raises(ValueError, match="tokens: expected a grid of 9 x 9 halved some times, got 96"):
        run(DreamMatcher(size=(9, 9)), hidden, TRIPLET)


# -- ConsiStory


@pytest.mark.parametrize("anchors", [None, 1])
def test_consistory_sees_kept_tokens_of_other_subjects(hidden, anchors):
    masks = [(torch.arange(TOKENS).view(GRID) * step % 7 > 2).long() for step in (2, 3, 5)]
    clock = Clock()
    clock.set(4, 10)
    method = ConsiStory(dropout=0.4, seed=3, anchors=anchors)
    actual = run(
        method,
        hidden,
        BatchLayout("output", "output", "output"),
        clock=clock,
        regions=Regions(structure=masks),
    )
    kept = [(uniform(TOKENS, 3, 4, picture) >= 0.4) & masks[picture].flatten().bool() for picture in range(3)]
    for part in (0, 3):
        for row in range(3):

            def consistent(attn, *pictures, row=row):
                projected = [literal.project(attn, each) for each in pictures]
                others = [number for number in range(3)[:anchors] if number != row]
                k, v = (
                    torch.cat([projected[row][place], *(projected[n][place][:, kept[n]] for n in others)], 1)
                    for place in (1, 2)
                )
                return literal.plain(projected[row][0], k, v)

            assert relative_error(actual[part + row][None], truth(consistent, hidden[part : part + 3])) < 2e-6


def test_consistory_redraws_dropout_for_each_picture_and_step():
    draws = {
        (step, picture): uniform(1024, 0, step, picture) >= 0.5 for step in range(8) for picture in range(3)
    }
    assert all(0.44 < kept.float().mean() < 0.56 for kept in draws.values())
    assert len({tuple(kept.tolist()) for kept in draws.values()}) == len(draws)
    assert torch.equal(draws[2, 1], uniform(1024, 0, 2, 1) >= 0.5)


def test_a_picture_alone_is_stock(hidden):
    torch.testing.assert_close(
        run(ConsiStory(), hidden, BatchLayout("output", "plain", "plain")),
        run(None, hidden),
        rtol=0,
        atol=2e-6,
    )


# -- several references elsewhere


@pytest.mark.parametrize(
    "name",
    [name for name in METHODS if name not in ("free_custom", "consistory", "bounded", "story_diffusion")],
)
def test_methods_that_read_one_appearance_say_so(name, hidden):
    prepared = UNetAttnProcessor(METHODS[name](), TWO, layer="down_blocks.1")
    attn = make_attention(2, 40)[0]
    attn.set_processor(prepared)
    with pytest.raises(
        ValueError,
        match="^layout: expected one appearance, because this method reads only one, got 2 for one output$",
    ):
        attn(hidden)


@pytest.mark.parametrize(
    ("method", "regions", "message"),
    [
        (
            FreeCustom(mask_weights=(1.0, 2.0, 3.0)),
            None,
            "mask_weights: expected a number, or one for each of 2 references, got 3",
        ),
        (
            FreeCustom(),
            Regions(appearance=MASKS[0]),
            "regions: expected 2 label maps of the appearance, one for each row that has this role, got 1",
        ),
        (
            FreeCustom(),
            Regions(structure=MASKS[0]),
            "regions: expected 2 label maps of the appearance, one for each row that has this role, got None",
        ),
        (
            ConsiStory(),
            Regions(structure=MASKS),
            "regions: expected 1 label maps of the structure, one for each row that has this role, got 2",
        ),
    ],
)
def test_refusals_name_what_was_expected(method, regions, message, hidden):
    with pytest.raises(ValueError, match=f"^{message}"):
        run(method, hidden, regions=regions)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="style_fidelity: expected a fraction of 0 to 1, got 1.5"):
        FreeCustom(style_fidelity=1.5)
    with pytest.raises(ValueError, match="dropout: expected a fraction from 0 to below 1, got 1.0"):
        ConsiStory(dropout=1.0)


def test_several_label_maps_where_one_is_read(hidden):
    with pytest.raises(
        ValueError,
        match="regions: expected one label map of the appearance, because this method reads only one, got 2",
    ):
        run(ReferenceOnly(), hidden, TRIPLET, regions=Regions(appearance=MASKS, structure=MASKS[0]))
    with pytest.raises(
        ValueError, match=r"appearance: expected whole numbers \[h, w\], got torch.float32 \[4, 4\]"
    ):
        Regions(appearance=[torch.zeros(4, 4)])
