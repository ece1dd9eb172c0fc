"""The pipeline against ALGORITHMS.md §2 written out (literal.py), step by step, and the traps of its §13.

Truth is the literal run in float64, in float32 on the embedded model. The budget is the slack of
qalign_kernels.testing alone, without an error of PyTorch's own; the sum behind a latent is as long as
the tokens of all edited layers and steps.
"""

import copy
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from qalign import AppearanceTransferPipeline, CrossImage, QAlign
from qalign.context.layer_call import Site
from qalign.embedded.scenes import held_out_pairs, render
from qalign.pipelines import AppearanceTransferOutput, transfer_loop
from qalign.sampling.inversion import Inversion
from qalign.sampling.object_masks import segment
from qalign_kernels.testing import judge
from tests.pipelines import literal
from tests.processors.models import embedded_pipe, make_pipe, quiet

GRID = 8  # of the latents: 64 tokens, and 16 in the block below
EMBEDDED = (256, 1024)  # tokens of the embedded model's last two blocks
EDITED = {16: (10, 70), 64: (10, 90)}  # for 32² and 64²
PROMPT, NOUN, NOUN_TOKEN = "a z", "z", 2
GAIN = 3.0  # random attention is nearly uniform; this makes it choose


def make_pipeline(
    prediction: str, seed: int = 0, channels: tuple[int, int, int] = (16, 32, 32)
) -> StableDiffusionPipeline:
    """Three levels, with self- and cross-attention in the upper two.

    The scheduler is that of SD 1.5, or one that ends without noise.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=GRID,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    ).eval()
    for name, parameter in unet.named_parameters():
        if ".attn" in name and name.endswith(("to_q.weight", "to_k.weight", "to_out.0.weight")):
            parameter.data *= GAIN
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=prediction != "epsilon",
        prediction_type=prediction,
    )
    components = {**make_pipe("sd15").components, "unet": unet, "scheduler": scheduler}
    return StableDiffusionPipeline(**components, requires_safety_checker=False)


def shortened(total: int, tokens=tuple(EDITED), **settings) -> literal.Numbers:
    """The published numbers as fractions of the 68 steps that are executed, for `total` of them."""

    def at(step: int) -> int:
        return math.ceil(Fraction(step * total, 68))

    return literal.Numbers(
        edit=dict.fromkeys(tokens, (at(11) - 1, total)),
        structure_end=at(40),
        guidance=(at(10), total),
        adain=(at(20), total),
        mask_step=at(20) - 1,
        **settings,
    )


@dataclass
class Case:
    """A pipeline, what the literal inverts on it, and its conditions."""

    pipe: StableDiffusionPipeline
    inversion: Inversion
    prompt: Tensor
    text: str = PROMPT
    noun: str = NOUN
    noun_token: int = NOUN_TOKEN

    def literal(
        self, numbers: literal.Numbers, freeu: tuple[int, int] = (0, 0), double: bool = True
    ) -> tuple[Tensor, literal.Run]:
        """float64 [steps, 3, C, h, w] and the record.

        `freeu` has the numbers of channels in place of 1280 and 640. `double` computes in float64.
        """
        unet, grid = copy.deepcopy(self.pipe.unet), self.inversion.latents.shape[-2:]
        latents, z, prompt = self.inversion.latents, self.inversion.noises, self.prompt
        if double:
            unet, latents, z, prompt = unet.double(), latents.double(), z.double(), prompt.double()

        def mask(maps: dict, row: int) -> Tensor:
            self_map, cross_map = maps[True, grid.numel()][row], maps[False, grid.numel() // 4][row]
            return literal.object_mask(self_map, cross_map, self.noun_token, grid, segment)

        with torch.no_grad(), literal.freeu(unet, *freeu):
            trajectory, run = literal.generate(
                unet,
                self.pipe.scheduler,
                latents,
                z,
                prompt,
                numbers,
                skip=round(0.32 * len(z)),
                make_mask=mask,
            )
        return torch.stack(trajectory).double(), run

    def pipeline(
        self, trajectory: list[Tensor] | None = None, **settings
    ) -> tuple[Tensor, AppearanceTransferOutput]:
        """[steps, 3, C, h, w], which grows in `trajectory`, and the result."""
        trajectory = [] if trajectory is None else trajectory

        def keep(pipe, step, timestep, tensors):
            assert step == len(trajectory)
            trajectory.append(tensors["latents"].clone())

        pipe = quiet(AppearanceTransferPipeline.from_pipe(self.pipe))
        options = {"adain": "masked", "inversion": self.inversion, "output_type": "latent", **settings}
        result = pipe(None, None, self.text, callback_on_step_end=keep, **options)
        return torch.stack(trajectory), result


@torch.no_grad()
def make_case(prediction: str, steps: int, *, seed: int = 0, **options) -> Case:
    """Random latents and noises: §2.2 to §2.6 hold for any."""
    pipe, generator = make_pipeline(prediction, seed, **options), torch.Generator().manual_seed(seed + 1)
    latents = literal.noised(
        pipe.scheduler, torch.randn(2, 4, GRID, GRID, generator=generator), steps, generator
    )
    z = torch.randn(latents[1:].shape, generator=generator)
    return Case(
        pipe,
        Inversion("ddpm", latents, z, pipe.scheduler.timesteps, 1.0),
        pipe.encode_prompt(PROMPT, "cpu", 1, False)[0],
    )


@pytest.fixture(scope="module")
def short() -> Case:
    """25 steps, of which 17 are executed."""
    return make_case("v_prediction", 25, seed=1)


@pytest.fixture(scope="module")
def cross_image(short: Case) -> Tensor:
    return short.pipeline(method=CrossImage(), adain="whole")[0]


def assert_same(actual: Tensor, truth: Tensor) -> None:
    """At every step, within the budget."""
    assert len(actual) == len(truth)
    for step, (latents, expected) in enumerate(zip(actual, truth)):
        verdict = judge(
            latents, expected.float(), expected, reduction=4 * len(truth) * truth[0, 0, 0].numel()
        )
        assert verdict.passed, f"step {step}: {verdict}"


# the literal run follows its text


@torch.no_grad()
def test_literal_attention_without_edit_is_that_of_diffusers(short: Case) -> None:
    unet, run = (
        copy.deepcopy(short.pipe.unet).double(),
        literal.Run(literal.Numbers(edit=EDITED), step=30, enable_edit=True),
    )
    sample, text = short.inversion.latents[0].double(), short.prompt.double().expand(2, -1, -1)
    stock = unet(sample, 500, encoder_hidden_states=text).sample
    with literal.processors(unet, run):
        same = unet(sample, 500, encoder_hidden_states=text).sample
    assert torch.allclose(same, stock, rtol=0, atol=1e-12) and not run.edits


@torch.no_grad()
def test_literal_noise_leads_to_the_next_latent(short: Case) -> None:
    unet, scheduler, text = (
        copy.deepcopy(short.pipe.unet).double(),
        short.pipe.scheduler,
        short.prompt.double(),
    )
    latents = short.inversion.latents.double()
    z = literal.invert(
        unet, scheduler, latents, text, text
    )  # one prompt for both: what inversion saw is what generation sees
    trajectory, _ = literal.generate(
        unet, scheduler, latents, z, text, literal.Numbers(edit={}, adain=(0, 0)), skip=8
    )
    ends = torch.stack([rows[[literal.STYLE, literal.STRUCT]] for rows in trajectory])
    assert torch.allclose(ends[:-1], latents[9:-1], rtol=0, atol=1e-10)
    assert (ends[-1] - latents[-1]).abs().max() > 1e-3  # the last z is zero
    assert all(torch.equal(rows[literal.OUT], rows[literal.STRUCT]) for rows in trajectory)


# the pipeline equals the literal run


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_cross_image_as_published(prediction: str) -> None:
    case = make_case(prediction, 100)
    actual, result = case.pipeline(method=CrossImage(), noun=case.noun)
    truth, run = case.literal(literal.Numbers(edit=EDITED))
    assert torch.equal(result.masks, torch.stack([run.masks[literal.STYLE], run.masks[literal.STRUCT]]))
    assert all(0 < mask.float().mean() < 1 for mask in result.masks)
    assert_same(actual, truth)


def test_qalign_with_keys_rearranged_in_memory(short: Case) -> None:
    truth, run = short.literal(shortened(17, rearranged=True, masked=False))
    assert run.margin > 2e-5  # no best match that rounding could change
    assert_same(short.pipeline(method=QAlign(), adain="whole")[0], truth)


def test_freeu_as_published() -> None:
    case = make_case("epsilon", 25, seed=2, channels=(16, 32, 64))
    actual, _ = case.pipeline(method=CrossImage(), adain="whole", freeu=True)
    assert_same(actual, case.literal(shortened(17, masked=False), freeu=(64, 32))[0])
    assert (case.literal(shortened(17, masked=False))[0] - actual).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"swap_guidance_scale": 1.0}, {"swap_scale": 1.0}),
        ({"swap_guidance_scale": 1.5}, {"swap_scale": 1.5}),
        (
            {"method": CrossImage(structure_every=3, contrast=1.2), "adain": None},
            {"structure_every": 3, "contrast": 1.2, "adain": (0, 0)},
        ),
        (
            {"edit_steps": (0.25, 0.75), "adain_start": 0.5},
            {"edit": dict.fromkeys(EDITED, (4, 12)), "adain": (9, 17)},
        ),
        ({"layers": "up_blocks.2"}, {"edit": {64: (2, 17)}}),
    ],
    ids=["no swap guidance", "weak swap guidance", "method", "steps", "layers"],
)
def test_settings_are_the_numbers_they_name(short: Case, settings: dict, numbers: dict) -> None:
    actual, _ = short.pipeline(**{"method": CrossImage(), "adain": "whole", **settings})
    assert_same(actual, short.literal(replace(shortened(17, masked=False), **numbers))[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"edit": dict.fromkeys(EDITED, (3, 17))},
        {"edit": {64: (2, 17)}},
        {"structure_every": 6},
        {"contrast": 1.6},
        {"guidance": (4, 17)},
        {"swap_scale": 3.4},
        {"adain": (6, 17)},
        {"masked": True},
        {"rearranged": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_number_is_seen(short: Case, cross_image: Tensor, changed: dict) -> None:
    """A literal run that is off by one number is not what the pipeline does."""
    with pytest.raises(AssertionError, match="passed=False"):
        assert_same(cross_image, short.literal(replace(shortened(17, masked=False), **changed))[0])


@pytest.mark.parametrize(("prediction", "freeu"), [("epsilon", True), ("v_prediction", False)])
def test_inversion_as_published(prediction: str, freeu: bool) -> None:
    pipe = quiet(AppearanceTransferPipeline.from_pipe(make_pipeline(prediction, channels=(16, 32, 64))))
    pictures = torch.rand(2, 3, 2 * GRID, 2 * GRID, generator=torch.Generator().manual_seed(5))
    inversion = pipe.invert(
        *pictures, PROMPT, num_inference_steps=20, freeu=freeu, generator=torch.Generator().manual_seed(6)
    )
    with torch.no_grad():
        clean = pipe.vae.config.scaling_factor * pipe.vae.encode(2 * pictures - 1).latent_dist.mode()
        embeddings, unet = pipe.encode_prompt(PROMPT, "cpu", 1, True), copy.deepcopy(pipe.unet)
        with literal.freeu(unet, *(64, 32) if freeu else (0, 0)):
            same = literal.invert(unet, pipe.scheduler, inversion.latents, *embeddings)
            truth = literal.invert(
                unet.double(),
                pipe.scheduler,
                inversion.latents.double(),
                *(each.double() for each in embeddings),
            )
    assert torch.allclose(inversion.latents[-1], clean, rtol=0, atol=1e-6)
    before = [int(t) - 1000 // len(inversion.timesteps) for t in inversion.timesteps]
    variance = [
        float(pipe.scheduler._get_variance(int(t), earlier))
        for t, earlier in zip(inversion.timesteps, before)
    ]
    sigma = (
        torch.tensor(variance, dtype=torch.float64).sqrt().view(-1, 1, 1, 1, 1)
    )  # z is a difference over it: what denoising adds is sigma z
    verdict = judge(
        (sigma * inversion.noises).float(), (sigma * same).float(), sigma * truth, reduction=GRID**2
    )
    assert verdict.passed, verdict
    bars = pipe.scheduler.alphas_cumprod[inversion.timesteps].view(-1, 1, 1, 1, 1)
    draws = ((inversion.latents[:-1] - bars.sqrt() * clean) / (1 - bars).sqrt()).flatten(1)
    correlation = torch.corrcoef(draws).fill_diagonal_(0)
    assert (
        correlation.abs().max() < 0.25 and abs(draws.std() - 1) < 0.05
    )  # 512 numbers each, independent from step to step


@pytest.fixture(scope="module")
def held_out() -> Case:
    """Two scenes that the embedded model has not seen, inverted in 13 steps.

    9 of the steps run, and one of them takes keys from the structure.
    """
    pipe = embedded_pipe(AppearanceTransferPipeline)
    pair = held_out_pairs(1)[0]
    scenes = render([pair.appearance, pair.structure])
    noun = scenes.plans[1]
    prompt = f"a photo of a {noun}"
    inversion = pipe.invert(
        *scenes.image, prompt, num_inference_steps=13, generator=torch.Generator().manual_seed(0)
    )
    return Case(
        pipe,
        inversion,
        pipe.encode_prompt(prompt, "cpu", 1, False)[0],
        prompt,
        noun,
        prompt.split().index(noun) + 1,
    )


@pytest.mark.slow
def test_cross_image_on_the_embedded_model(held_out: Case) -> None:
    actual, result = held_out.pipeline(method=CrossImage(), noun=held_out.noun)
    truth, run = held_out.literal(shortened(9, EMBEDDED), double=False)  # which would take ten times as long
    assert {row for *_, row in run.edits} == {literal.STYLE, literal.STRUCT}
    assert torch.equal(result.masks, torch.stack([run.masks[literal.STYLE], run.masks[literal.STRUCT]]))
    assert_same(actual, truth)


@pytest.mark.slow
def test_qalign_on_the_embedded_model(held_out: Case) -> None:
    """The mean is compared: among so many tokens rounding may change a best match, with little effect."""
    actual, _ = held_out.pipeline(method=QAlign(), adain="whole")
    truth, _ = held_out.literal(shortened(9, EMBEDDED, rearranged=True, masked=False), double=False)
    effect = (truth[:, literal.OUT] - truth[:, literal.STRUCT]).abs().mean()
    assert (actual - truth).abs().mean() < 1e-3 * effect


# the traps of §13, on the pipeline: one run of 100 steps, of which 68 are executed


@dataclass(frozen=True, kw_only=True)
class Watched(CrossImage):
    """Cross-Image attention that records its calls and the sums of its weights.

    The sums are its output for values that are all 1.
    """

    seen: list = field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        sums = super().attend(q, k, torch.ones_like(v), site)[..., 0]
        self.seen.append((site.clock.step, not site.idle, bool(site.clock.from_structure), q, k, sums))
        return super().attend(q, k, v, site)


@pytest.fixture(scope="module")
def watched() -> dict[str, list[tuple]]:
    """The calls by function, from the first step to the last: (i, positional arguments)."""
    case, method, ends, calls = make_case("v_prediction", 100), Watched(), [], defaultdict(list)

    def noted(name: str, function):
        def call(*args, **kwargs):
            calls[name].append((len(ends), *args, kwargs))
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("MapCollector", "object_masks", "adain_latents", "swap_guided"):
            patch.setattr(transfer_loop, name, noted(name, getattr(transfer_loop, name)))
        patch.setattr(case.pipe.unet, "forward", noted("unet", case.pipe.unet.forward))
        case.pipeline(ends, method=method, noun=case.noun)
    return {**calls, "attend": method.seen}


def test_each_step_is_one_unet_call_over_four(watched) -> None:
    assert [(i, len(sample)) for i, sample, *_ in watched["unet"]] == [(i, 4) for i in range(68)]


def test_trap_1_output_contrast_is_not_renormalised(watched) -> None:
    for step, active, from_structure, q, k, sums in watched["attend"]:
        p = (q[0] @ k[3 if from_structure else 2].mT / q.shape[-1] ** 0.5).softmax(-1)
        contrasted = ((p - 1 / k.shape[2]) * 1.67 + 1 / k.shape[2]).clip(0, 1).sum(-1)
        assert torch.allclose(sums[0], contrasted if active else torch.ones(()), atol=1e-5), step
        assert torch.allclose(sums[1:], torch.ones(()), atol=1e-5), step
        assert not active or contrasted.max() > 1.2


def test_trap_2_edits_start_late_and_never_stop(watched) -> None:
    assert Counter(step for step, active, *_ in watched["attend"] if active) == dict.fromkeys(
        range(11, 68), 4
    )


def test_trap_3_every_fifth_late_step_reads_structure(watched) -> None:
    steps = [step for step, active, from_structure, *_ in watched["attend"] if active and from_structure]
    assert Counter(steps) == dict.fromkeys([late + 1 for late in (10, 15, 20, 25, 30, 35)], 4)


def test_guidance_falls_from_step_10_on(watched) -> None:
    scales = [float(scale) for *_, scale, _ in watched["swap_guided"]]
    assert scales == pytest.approx([1.0] * 10 + [3.5 - 1.75 * i / 67 for i in range(10, 68)], abs=1e-6)


def test_adain_from_20_with_masks_of_call_20(watched) -> None:
    assert [i for i, *_ in watched["adain_latents"]] == list(range(20, 68))
    assert [i for i, *_ in watched["MapCollector"]] == [i for i, *_ in watched["object_masks"]] == [20]


@dataclass(frozen=True, kw_only=True)
class Shuffled(QAlign):
    """Q-Align with keys and values gathered in memory, in an order that means nothing."""

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        ours, theirs = (
            F.normalize(q[rows.long()].transpose(1, 2).flatten(2), dim=-1) for rows in (output, reference)
        )
        match = (ours @ theirs.mT).argmax(-1)[0]
        match = match[torch.randperm(len(match), generator=torch.Generator().manual_seed(len(match)))]
        keys, values = (x[reference.long()][:, :, match] for x in (k, v))
        p = (q[output.long()] @ keys.mT / q.shape[-1] ** 0.5).softmax(-1)
        return ((p - 1 / len(match)) * self.contrast + 1 / len(match)).clip(0, 1) @ values


def test_trap_10_order_of_rearranged_keys_is_irrelevant(short: Case) -> None:
    methods = QAlign(), Shuffled()
    counted, gathered = (short.pipeline(method=method, adain="whole")[0] for method in methods)
    assert_same(counted, gathered.double())


def test_trap_11_adain_variance_unbiased_eps_inside_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly flat latents show every other convention: the UNet predicts zero and the inversion is faint."""
    case = make_case("v_prediction", 13)
    torch.nn.init.zeros_(case.pipe.unet.conv_out.weight)
    torch.nn.init.zeros_(case.pipe.unet.conv_out.bias)
    faint = torch.tensor([1e-3, 3e-3]).view(2, 1, 1, 1)
    case = replace(
        case,
        inversion=replace(
            case.inversion, latents=faint * case.inversion.latents, noises=faint * case.inversion.noises
        ),
    )
    numbers = shortened(9, masked=False)
    actual, _ = case.pipeline(method=CrossImage(), adain="whole")
    assert_same(actual, case.literal(numbers)[0])
    for deviation in (
        lambda x: x.std((1, 2), keepdim=True),
        lambda x: x.std((1, 2), keepdim=True) + 1e-5,
        lambda x: (x.var((1, 2), keepdim=True, unbiased=False) + 1e-5).sqrt(),
    ):

        def other(content: Tensor, style: Tensor, deviation=deviation) -> Tensor:
            mean, wanted_mean = (x.mean((1, 2), keepdim=True) for x in (content, style))
            return (content - mean) / deviation(content) * deviation(style) + wanted_mean

        monkeypatch.setattr(literal, "adain", other)
        with pytest.raises(AssertionError, match="passed=False"):
            assert_same(actual, case.literal(numbers)[0])
