"""BoundedAttentionPipeline: masks, guided latents, results, and restored processors."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler
from transformers import CLIPTokenizer

from qalign import BatchLayout, Regions, attach, embedded
from qalign.methods import BoundedAttention
from qalign.pipelines import BoundedAttentionPipeline, BoundedAttentionXLPipeline, bounded_attention
from qalign.processors.attach import find_unet, select_layers
from qalign.sampling.attention_reader import AttentionReader, frozen, gradient
from qalign.sampling.bounded_guidance import BoundedGuidance
from qalign.sampling.bounded_masks import MaskRefiner
from tests.pipelines.transfers import seeded
from tests.processors.models import make_pipe, pipe_of, self_attention

PROMPT = "an ox by a fox"  # start, a, n, o, x, b, y, a, f, o, x, end
SUBJECTS = [("ox", (0.0, 0.1, 0.5, 0.9)), ("fox", (0.5, 0.3, 1.0, 0.8))]
BOXES = Regions.from_boxes([box for _, box in SUBJECTS], 16, 16)
METHOD = BoundedAttention(
    subject_tokens={1: (3, 4), 2: (8, 9, 10)}, filter_tokens=(1, 2, 5, 6, 7), eos_token=11
)
BLIND = BoundedGuidance(until=0.0, refine_every=0)


def make(family="sd15"):
    return pipe_of(BoundedAttentionPipeline, family)


def noise(seed=0):
    return torch.randn(1, 4, 16, 16, generator=seeded(seed))


def call(pipe, **options):
    return pipe(
        PROMPT, SUBJECTS, **{"latents": noise(), "num_inference_steps": 4, "output_type": "latent", **options}
    )


def stock(latents, **options):
    """A stock pipeline under the attached method, both guidance halves in one batch."""
    pipe = make_pipe("sd15")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with attach(pipe, METHOD, layout=BatchLayout("output", guidance=True), regions=BOXES):
        return pipe(
            PROMPT,
            latents=latents,
            num_inference_steps=4,
            guidance_scale=5.0,
            output_type="latent",
            **options,
        ).images


def processors(pipe):
    return [module.processor for module in pipe.unet.modules() if hasattr(module, "processor")]


def test_boxes_become_labels():
    labels = Regions.from_boxes([(0, 0, 0.5, 0.75), (0.25, 0.5, 1.0, 1.0)], 4, 8)
    assert labels.structure.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 2 + [
        [1, 1, 2, 2, 2, 2, 2, 2],
        [0, 0, 2, 2, 2, 2, 2, 2],
    ]
    assert labels.background == 0 and labels.appearance is None


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "boxes: expected 1 to 30, got 0"),
        (
            [(0.5, 0, 0.5, 1)],
            "boxes: expected x0 y0 x1 y1 with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got 0.5 0 0.5 1",
        ),
        ([(0, 0, 1, 1.2)], "boxes: expected x0 y0 x1 y1 with .* got 0 0 1 1.2"),
        ([(0, 0, 1)], "boxes: expected x0 y0 x1 y1 with .* got 0 0 1$"),
        ([(0, 0, 0.01, 1)], "boxes: expected each to contain a cell of 4 x 8, got 0 0 0.01 1"),
    ],
)
def test_boxes_that_are_refused(boxes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Regions.from_boxes(boxes, 4, 8)


def test_words_are_found_in_the_prompt():
    tokenizer = CLIPTokenizer.from_pretrained(embedded.FOLDER / "tokenizer")

    def find(prompt, *words):
        return bounded_attention._method(tokenizer, prompt, words, bounded_attention.FILTER_WORDS)

    # start, a, photo, of, two, striped, red, birds, on, a, branch, end
    found = find("a photo of two striped red birds on a branch", "bird", "red birds", "branch")
    assert found == BoundedAttention(
        subject_tokens={1: (7,), 2: (6, 7), 3: (10,)}, filter_tokens=(1, 3, 4, 8, 9), eos_token=11
    )
    assert find("two birds", "two birds").filter_tokens == ()  # a subject's words are not hidden
    assert find("a " * 30 + "bird", "a").eos_token == 19  # cut off where the tokenizer cuts
    with pytest.raises(ValueError, match="^subjects: expected words of the prompt 'two birds', got 'fish'$"):
        find("two birds", "fish")
    assert bounded_attention._method(make().tokenizer, PROMPT, ["ox", "fox"], ["an", "by", "a"]) == METHOD


def test_without_guidance_it_is_stock_under_the_method():
    found = call(make(), guidance=BLIND, guidance_scale=5.0)
    expected = stock(noise())
    assert (found.images - expected).norm() <= 2e-5 * expected.norm()
    assert len(found.losses) == 0 and torch.equal(found.regions.structure, BOXES.structure)
    plain = make_pipe("sd15")(
        PROMPT, latents=noise(), num_inference_steps=4, guidance_scale=5.0, output_type="latent"
    ).images
    assert (plain - expected).norm() > 1e-3 * expected.norm()


def test_guided_step_descends_both_attention_losses():
    pipe, guidance = (
        make(),
        BoundedGuidance(rates=(300.0, 300.0), until=0.25, iterations=1, enough=0.0, refine_every=0),
    )
    found = call(pipe, guidance=guidance, guidance_scale=5.0)
    moving, condition = (
        noise().requires_grad_(),
        {name: each.detach() for name, each in pipe.conditions(PROMPT, 32, 32)[0].items()},
    )
    layers = guidance.default_layers(
        list(self_attention(pipe.unet, "mid_block") | self_attention(pipe.unet, "up_blocks"))
    )
    optimized = dataclasses.replace(METHOD, optimized=True)
    with (
        frozen(pipe.unet),
        AttentionReader(pipe, layers, method=optimized, regions=BOXES, cross=True) as read,
    ):
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(4)
        features = read(moving, scheduler.timesteps[0], condition)
        assert (
            sorted(features) == sorted([*layers, *(name[:-1] + "2" for name in layers)]) and len(layers) == 3
        )
        own, words = ({name: each for name, each in features.items() if name[-1] == kind} for kind in "12")
        loss = guidance.loss(own, BOXES, words, METHOD)
        moved = moving.detach() - 300 * gradient(loss, moving)
    assert found.losses.tolist() == [[0, pytest.approx(loss.item() / 2, rel=1e-5)]]
    expected = stock(moved)
    assert (found.images - expected).norm() <= 2e-5 * expected.norm()
    assert (found.images - stock(noise())).norm() > 1e-3 * expected.norm()


def test_guidance_lowers_the_loss_within_its_steps():
    pipe = make()
    before = processors(pipe)
    guidance = BoundedGuidance(rates=(400.0, 400.0), until=0.5, iterations=4, enough=0.0)
    guided = call(pipe, guidance=guidance)
    assert guided.losses[:, 0].tolist() == [0] * 4 + [1] * 4
    assert guided.losses[3, 1] < guided.losses[0, 1] and guided.losses[7, 1] < guided.losses[4, 1]
    once = [call(pipe, guidance=BoundedGuidance(enough=2.0)) for _ in range(2)]
    assert once[0].losses[:, 0].tolist() == [0] and torch.equal(
        once[0].images, once[1].images
    )  # the first loss is enough
    assert processors(pipe) == before and not any(
        parameter.grad is not None for parameter in pipe.unet.parameters()
    )


def test_a_box_without_cells_is_said_once(caplog):
    guidance = BoundedGuidance(until=0.5, iterations=2, enough=0.0)
    subjects = [SUBJECTS[0], ("fox", (0.81, 0.81, 0.87, 0.87))]  # one cell of 16 x 16, none of 4 x 4
    found = make()(
        PROMPT, subjects, latents=noise(), num_inference_steps=4, guidance=guidance, output_type="latent"
    )
    assert found.images.isfinite().all()
    assert caplog.messages == [bounded_attention.UNSEEN % "2"]


def test_trap_background_reads_prompt_end_during_guidance(monkeypatch):
    seen, real = [], BoundedAttention.attend_cross

    def watch(self, q, k, v, site):
        seen.append((self.optimized, len(q)))
        return real(self, q, k, v, site)

    monkeypatch.setattr(BoundedAttention, "attend_cross", watch)
    call(make(), num_inference_steps=2, guidance=BoundedGuidance(until=0.5, iterations=1, enough=0.0))
    layers = len([name for name in make().unet.attn_processors if "attn2" in name])
    read = seen.index((False, 2))
    assert 3 <= read < layers and seen == [(True, 1)] * read + [(False, 2)] * 2 * layers


def test_masks_replace_boxes_after_the_guided_steps(monkeypatch):
    added, refined, read, predicting = [], [], [], []
    real_add, real_refine, real_loss = MaskRefiner.add, MaskRefiner.refine, BoundedGuidance.loss
    monkeypatch.setattr(
        MaskRefiner,
        "add",
        lambda self, own, regions, *rest: added.append((own, regions)) or real_add(self, own, regions, *rest),
    )

    def refine(self, regions):
        assert self.nouns == {1: 4, 2: 10} and self.boxes.structure.equal(
            BOXES.structure
        )  # each subject's last token
        refined.append((len(added), real_refine(self, regions)))
        return refined[-1][1]

    monkeypatch.setattr(MaskRefiner, "refine", refine)
    monkeypatch.setattr(
        BoundedGuidance,
        "loss",
        lambda self, own, regions, *rest: read.append(regions) or real_loss(self, own, regions, *rest),
    )

    class Reader(AttentionReader):
        def __init__(self, pipe, layers, *, method, regions, cross):
            if not method.optimized:
                predicting.append(regions)
            super().__init__(pipe, layers, method=method, regions=regions, cross=cross)

    monkeypatch.setattr(bounded_attention, "AttentionReader", Reader)
    guidance = BoundedGuidance(until=0.25, iterations=1, enough=0.0, refine_every=2)
    found = call(make(), num_inference_steps=8, guidance=guidance)
    assert [id(regions) for regions in predicting[1:]] == [id(regions) for _, regions in refined] and len(
        predicting
    ) == 4
    assert [number for number, _ in refined] == [2, 4, 6]  # with the maps of all passes before
    assert all(torch.equal(regions.structure, BOXES.structure) for _, regions in added[:2]) and len(read) == 2
    assert [id(regions) for _, regions in added[2:]] == [id(refined[step // 2][1]) for step in range(6)]
    assert all(
        name.startswith("up_blocks.1") and len(layer.query) == 2
        for own, _ in added
        for name, layer in own.items()
    )
    assert found.regions is refined[-1][1] and sorted(found.regions.structure.unique().tolist())[-2:] == [
        1,
        2,
    ]
    stays = call(make(), num_inference_steps=8, guidance=dataclasses.replace(guidance, refine_every=0))
    assert not torch.equal(stays.images, found.images) and torch.equal(
        stays.regions.structure, BOXES.structure
    )


def test_sdxl_has_the_published_settings(monkeypatch):
    pipe = make("sdxl")
    assert (
        isinstance(pipe, BoundedAttentionXLPipeline)
        and pipe.default_guidance.rates == (18.0, 5.0)
        and make().default_guidance.rates == (8.0, 2.0)
    )
    found = call(pipe, num_inference_steps=2)
    assert found.losses[:, 0].tolist() == [0] * 5 and found.images.isfinite().all()
    assert (
        call(pipe, num_inference_steps=2, layers="mid", mask_layers="up_blocks.0").losses[0, 1]
        != found.losses[0, 1]
    )


def test_reader_gives_whole_output_under_the_method():
    pipe = make()
    latents, timestep, condition = (
        noise().expand(2, -1, -1, -1),
        torch.tensor(301),
        pipe.conditions(PROMPT, 32, 32)[0],
    )
    with torch.no_grad():
        with attach(find_unet(pipe), METHOD, layout=BatchLayout("output"), regions=BOXES):
            expected = pipe.predict(latents, timestep, condition)
        with AttentionReader(pipe, "mid", method=METHOD, regions=BOXES, cross=True) as read:
            output, features = read.predict(latents, timestep, condition)
            alone = read(latents, timestep, condition)
            assert torch.equal(pipe.predict(latents, timestep, condition), expected)  # between readings too
    assert torch.equal(output, expected)
    (name,) = select_layers(find_unet(pipe), "mid", METHOD)
    assert (
        set(features) == set(alone) == {name, name[:-1] + "2"}
        and features[name[:-1] + "2"].key.shape[2] == 16
    )
    assert all(torch.equal(a, b) for layer in alone for a, b in zip(alone[layer][:4], features[layer][:4]))


def test_no_guided_step_is_said(caplog):
    pipe = make()
    call(pipe, num_inference_steps=1)
    assert caplog.messages == ["guidance: it moves nothing, as until=0.3 of 1 steps leaves no guided step"]
    caplog.clear()
    call(pipe, num_inference_steps=1, guidance=BoundedGuidance(until=0.0))  # on purpose
    assert caplog.messages == []


def test_interrupted_run_returns_its_last_clean_estimate():
    class Stop:
        def __init__(self, error):
            self.error, self.steps = error, []

        def __call__(self, pipe, step, timestep, given):
            self.steps.append(given["latents"])
            if step == 1:
                if self.error:
                    raise KeyboardInterrupt
                pipe._interrupt = True

    pipe, whole = make(), call(make(), guidance=BLIND)
    assert not whole.interrupted
    before = processors(pipe)
    for error in (True, False):
        stop = Stop(error)
        found = call(pipe, guidance=BLIND, callback_on_step_end=stop)
        assert found.interrupted and len(stop.steps) == 2 and not torch.equal(found.images, stop.steps[-1])
        assert (found.images - whole.images).norm() < (stop.steps[-1] - whole.images).norm()
    assert processors(pipe) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guidance": 3}, TypeError, r"guidance: expected BoundedGuidance\(...\) or None, got 3"),
        (
            {"latents": torch.zeros(2, 4, 16, 16)},
            ValueError,
            r"latents: expected \[1, 4, 16, 16\], got \[2, 4, 16, 16\]",
        ),
        ({"height": 30}, ValueError, "height, width: expected multiples of 8, got 30 x 32"),
        (
            {"layers": "mid"},
            ValueError,
            "mask_layers: expected names if `layers` has none of the decoder, got None and layers='mid'",
        ),
        (
            {"mask_layers": "up"},
            ValueError,
            "mask_layers: expected layers of one number of tokens, got 16, 64, 256",
        ),
        ({"output_type": "gif"}, ValueError, "output_type: expected one of"),
        (
            {"num_inference_steps": 0},
            ValueError,
            "num_inference_steps: expected an integer of at least 1, got 0",
        ),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(make(), **options)
