"""AttentionDistillationPipeline: features, moving latents, and restored processors."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from qalign.context.regions import Regions
from qalign.embedded.scenes import BACKGROUNDS, held_out_pairs, render
from qalign.methods.attention_distillation import AttentionDistillation, Losses
from qalign.pipelines import AppearanceTransferPipeline, AttentionDistillationPipeline
from qalign.pipelines.distillation_run import windows
from qalign.sampling.attention_reader import AttentionReader, descend, frozen, gradient
from tests.pipelines.transfers import pictures, seeded
from tests.processors.models import embedded_pipe, make_pipe, pipe_of, quiet, self_attention

QUICK = {"num_inference_steps": 3, "output_type": "latent"}


def make(family="small"):
    return pipe_of(AttentionDistillationPipeline, family)


@pytest.fixture(scope="module")
def small():
    return make()


def embedded():
    return embedded_pipe(AttentionDistillationPipeline)


@functools.cache
def scenes():
    pair = held_out_pairs(1)[0]
    return render([pair.appearance, pair.structure])


def call(pipe, **options):
    options = {"generator": seeded(), **QUICK, **options}
    return pipe(pictures(1)[0], pictures(1, seed=1)[0], **options)


@functools.cache
def usual(mode):
    return call(make(), mode=mode)


def processors(pipe):
    return [module.processor for module in pipe.unet.modules() if hasattr(module, "processor")]


# features


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_features_equal_a_whole_pass_that_ends_early(family):
    pipe = make(family)
    latents, timestep, condition = (
        torch.randn(2, 4, 16, 16, generator=seeded()),
        torch.tensor(301),
        pipe.conditions("", 32, 32)[0],
    )
    before, kept, ended = processors(pipe), {}, []
    layers = self_attention(pipe.unet, "up_blocks")
    hooks = [
        layer.to_out[0].register_forward_pre_hook(lambda _, x, name=name: kept.__setitem__(name, x[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        pipe.predict(latents, timestep, condition)
    for hook in hooks:
        hook.remove()
    pipe.unet.conv_out.register_forward_hook(lambda *_: ended.append(True))
    with AttentionReader(pipe, layers="up") as read, torch.no_grad():
        features = read(latents, timestep, condition)
        assert not ended  # the UNet was left before its end
        pipe.predict(latents, timestep, condition)
        assert ended  # and between readings it is not
    assert list(features) == list(layers)
    for name, layer in features.items():
        assert torch.equal(layer.output.transpose(1, 2).flatten(2), kept[name])
        torch.testing.assert_close(
            layer.output,
            F.scaled_dot_product_attention(layer.query, layer.key, layer.value, scale=layer.scale),
        )
    assert processors(pipe) == before


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointed in (False, True):
        pipe = make("sd15")
        if checkpointed:
            pipe.unet.enable_gradient_checkpointing()
            pipe.unet.train()
        null_condition = {name: each.detach() for name, each in pipe.conditions("", 32, 32)[0].items()}
        latents = torch.randn(1, 4, 16, 16, generator=seeded()).requires_grad_()
        target = torch.randn(1, 4, 16, 16, generator=seeded(1))
        forwards = []
        block = pipe.unet.up_blocks[-1].attentions[0].transformer_blocks[0]
        block.attn1.to_q.register_forward_hook(lambda *_, forwards=forwards: forwards.append(True))
        with frozen(pipe.unet), AttentionReader(pipe) as read:
            with torch.no_grad():
                style = read(target, torch.tensor(301), null_condition)
            del forwards[:]
            (grad,) = torch.autograd.grad(
                AttentionDistillation().loss(read(latents, torch.tensor(301), null_condition), style).total,
                latents,
            )
            assert len(forwards) == 1 + checkpointed
            saved = (
                torch.ones(3, requires_grad=True) * 2
            )  # checkpointing leaves no hook for saved tensors behind
            assert (
                torch._C._autograd._top_saved_tensors_default_hooks(True) is None
                and saved.sum().backward() is None
            )
        found.append(grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-9)
    assert found[0].abs().max() > 0


def test_layers_out_of_order_are_all_read():
    pipe = make("sd15")
    with AttentionReader(pipe, layers=["mid", "down"]) as read, torch.no_grad():
        features = read(
            torch.randn(1, 4, 16, 16, generator=seeded()), torch.tensor(1), pipe.conditions("", 32, 32)[0]
        )
    assert sorted(features) == sorted(
        [*self_attention(pipe.unet, "down_blocks"), *self_attention(pipe.unet, "mid_block")]
    )


# moving latents


class Literal:
    """The published loops written down, on a stock UNet with hooks."""

    @torch.no_grad()
    def __init__(self, pipe, weight=0.2):
        self.pipe, self.weight, self.losses = pipe, weight, []
        self.layers = list(self_attention(pipe.unet, "up_blocks").values())[-6:]
        self.null_condition, self.unconditional = pipe.conditions("", 32, 32)  # of SDXL the latter is zeros
        self.alphas = pipe.scheduler.alphas_cumprod.double()

    def features(self, latents, timestep):
        kept, hooks = {}, []
        for layer in self.layers:
            for name in ("to_q", "to_k", "to_v"):
                hook = lambda _, __, out, key=(layer, name): kept.__setitem__(key, out)  # noqa: E731
                hooks.append(getattr(layer, name).register_forward_hook(hook))
            hooks.append(
                layer.to_out[0].register_forward_pre_hook(
                    lambda _, x, key=(layer, "out"): kept.__setitem__(key, x[0])
                )
            )
        self.pipe.unet(latents, timestep, **self.null_condition)
        for hook in hooks:
            hook.remove()
        names = ("to_q", "to_k", "to_v", "out")
        return [
            [kept[layer, name].unflatten(-1, (layer.heads, -1)).transpose(1, 2) for name in names]
            for layer in self.layers
        ]

    def descend(self, latents, adam, style, content, timestep):
        with torch.no_grad():
            style, content = self.features(style, timestep), self.features(content, timestep)
        total = 0
        for (q, _, _, out), (_, k, v, _), (q_content, _, _, _) in zip(
            self.features(latents, timestep), style, content
        ):
            ideal = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
            total = total + (out - ideal.detach()).abs().mean() + self.weight * (q - q_content).abs().mean()
        adam.zero_grad()
        total.backward()
        adam.step()
        self.losses.append(total.item())

    def optimise(self, style, content, steps):
        self.pipe.scheduler.set_timesteps(steps)
        latents = content.clone().requires_grad_()
        adam = torch.optim.Adam([latents], lr=0.05)
        for timestep in self.pipe.scheduler.timesteps:
            self.descend(latents, adam, style, content, timestep)
        return latents.detach()

    def sample(self, style, content, steps, generator):
        def noised(clean, timestep):
            noise = torch.randn(clean.shape, generator=generator)
            return (
                self.alphas[timestep].sqrt().float() * clean
                + (1 - self.alphas[timestep]).sqrt().float() * noise
            )

        self.pipe.scheduler.set_timesteps(steps)
        latents = torch.randn(content.shape, generator=generator)
        for timestep in self.pipe.scheduler.timesteps:
            with torch.no_grad():
                base, epsilon = (
                    self.pipe.unet(latents, timestep, **each).sample
                    for each in (self.unconditional, self.null_condition)
                )
                epsilon = base + 7.5 * (epsilon - base)
            before, after = self.alphas[timestep], int(timestep) - 1000 // steps
            level = self.alphas[after] if after >= 0 else torch.ones(())
            clean = (latents - (1 - before).sqrt().float() * epsilon) / before.sqrt().float()
            latents, after = (
                level.sqrt().float() * clean + (1 - level).sqrt().float() * epsilon,
                max(after, 0),
            )
            target = noised(style, after)
            (mean, deviation), (to, spread) = (
                (x.mean((2, 3), True), x.std((2, 3), keepdim=True)) for x in (latents, target)
            )
            latents = ((latents - mean) / (deviation + 1e-6) * spread + to).requires_grad_()
            targets = noised(content, after), noised(style, after)  # with other noise than AdaIN's
            adam = torch.optim.Adam([latents], lr=0.015)
            for _ in range(2):
                self.descend(latents, adam, targets[1], targets[0], torch.tensor(after))
            latents = latents.detach()
        return latents


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("mode", ["optimise", "sample"])
def test_both_modes_are_the_published_loops(mode, family):
    pipe = make(family)
    style, content = pipe.encode(torch.cat([pictures(1), pictures(1, seed=1)])).detach().split(1)
    result, literal = call(pipe, mode=mode, num_inference_steps=4), Literal(pipe)
    latents = (
        literal.optimise(style, content, 4)
        if mode == "optimise"
        else literal.sample(style, content, 4, seeded())
    )
    assert result.losses[:, 0].tolist() == pytest.approx(literal.losses, rel=2e-5)
    # a sign of the L1 gradient may flip by rounding: Adam then moves that latent by up to its rate
    assert (result.images - latents).abs().mean() < 1e-3 * (latents - content).abs().mean()


def test_annealed_rate_falls_linearly_to_zero(small, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self, *given: rates.append(self.param_groups[0]["lr"]) or step(self, *given),
    )
    call(small, anneal=True, iterations=2, learning_rate=0.6)
    assert rates == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("mode", ["optimise", "sample"])
@pytest.mark.parametrize(
    "other",
    [
        {"method": AttentionDistillation(content_weight=5.0)},
        {"method": AttentionDistillation(logit_scale=3.0)},
        {"regions": Regions(appearance=torch.eye(16).long(), structure=torch.eye(16).flip(0).long())},
        {"iterations": 3},
        {"learning_rate": 0.2},
        {"layers": "up_blocks.0.attentions.0"},
        {"height": 48},
    ],
    ids=lambda other: "".join(other),
)
def test_every_setting_is_heard(small, mode, other):
    plain, changed = usual(mode), call(small, mode=mode, **other)
    assert plain.images.dtype == changed.images.dtype == torch.float32
    assert plain.images.shape != changed.images.shape or (plain.images - changed.images).abs().max() > 1e-3
    assert changed.losses.shape == (3 * other.get("iterations", {"optimise": 1, "sample": 2}[mode]), 3)


def test_settings_of_one_mode(small):
    assert not torch.equal(call(small, initial="noise").images, usual("optimise").images)
    assert not torch.equal(call(small, anneal=True).images, usual("optimise").images)
    plain = usual("sample")
    for other in (
        {"adain": False},
        {"guidance_scale": 1.0, "prompt": "a horse"},
        {"prompt": "a horse"},
        {"generator": seeded(1)},
    ):
        assert not torch.equal(call(small, mode="sample", **other).images, plain.images), other
    assert torch.equal(call(small, mode="sample").images, plain.images)


def test_adain_gives_the_styles_their_joint_statistics(small, monkeypatch):
    styles, drawn = pictures(2), []
    noised = small.scheduler.__class__.add_noise
    monkeypatch.setattr(
        small.scheduler.__class__, "add_noise", lambda *a: drawn.append(noised(*a)) or drawn[-1]
    )
    result = small(
        styles,
        None,
        mode="sample",
        iterations=0,
        num_inference_steps=2,
        output_type="latent",
        generator=seeded(),
    )
    deviation, mean = torch.std_mean(drawn[-2], dim=(0, 2, 3))
    torch.testing.assert_close(result.images.mean((0, 2, 3)), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.images.std((0, 2, 3)), deviation, rtol=1e-5, atol=1e-5)
    assert not torch.equal(drawn[-1], drawn[-2])  # the features of the style have other noise
    assert result.losses.shape == (0, 3)


def test_several_contents_are_as_many_calls(small):
    contents = pictures(2, seed=1)
    together = small(pictures(1)[0], contents, **QUICK)
    for content, image in zip(contents, together.images):
        alone = small(pictures(1)[0], content, **QUICK).images[0]
        assert (alone - image).abs().mean() < 1e-3 * image.abs().mean()


@pytest.mark.slow
def test_the_loss_of_a_scene_falls():
    pipe, image = embedded(), scenes().image
    with torch.no_grad():
        clean, null_condition = pipe.encode(image), pipe.conditions("", 128, 128)[0]
    latents = clean[1:].clone().requires_grad_()
    adam, method = torch.optim.Adam([latents], lr=0.05), AttentionDistillation(content_weight=0.0)
    with frozen(pipe.unet), AttentionReader(pipe) as read:
        timestep = torch.tensor(301)
        with torch.no_grad():
            style = read(clean[:1], timestep, null_condition)
        losses = [
            descend(
                latents, adam, lambda moved: method.loss(read(moved, timestep, null_condition), style)
            ).total.item()
            for _ in range(20)
        ]
    assert losses[-1] < losses[0] / 2


def test_gradients_that_float16_would_round_to_zero_arrive():
    latents = torch.zeros(1, 4, 4, 4, requires_grad=True)
    losses = lambda moved: Losses(*[(moved.half().float() * 2.0**-30).sum()] * 3)  # noqa: E731
    torch.testing.assert_close(
        gradient(losses(latents).total, latents), torch.full_like(latents, 2.0**-30), rtol=0, atol=0
    )
    descend(latents, torch.optim.SGD([latents], lr=2.0**30), losses)
    assert torch.equal(latents.detach(), -torch.ones(1, 4, 4, 4)) and latents.grad is None


@pytest.mark.slow
def test_masks_of_a_scene_draw_object_from_object():
    pipe, (style, content), labels = embedded(), scenes().image, (scenes().labels >= len(BACKGROUNDS)).long()
    regions, method = (
        Regions(appearance=labels[0], structure=labels[1]),
        AttentionDistillation(content_weight=0.0),
    )
    options = {"method": method, "num_inference_steps": 1, "iterations": 8, "output_type": "latent"}
    plain, masked = (
        pipe(style, content, **options).images,
        pipe(style, content, regions=regions, **options).images,
    )
    timestep, null_condition = torch.tensor(301), pipe.conditions("", 128, 128)[0]
    with torch.no_grad(), AttentionReader(pipe) as read:
        target = read(pipe.encode(style[None]), timestep, null_condition)
        of_plain, of_masked = (
            method.loss(read(each, timestep, null_condition), target, regions=regions).total
            for each in (plain, masked)
        )
    assert of_masked < of_plain


# restored state


@pytest.mark.parametrize("mode", ["optimise", "sample"])
def test_everything_is_restored_after_an_error_too(small, mode):
    before, wanted = processors(small), [parameter.requires_grad for parameter in small.unet.parameters()]
    assert any(wanted)
    seen = []

    def fail(pipe, step, timestep, given):
        seen.append([parameter.requires_grad for parameter in pipe.unet.parameters()])
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        call(small, mode=mode, callback_on_step_end=fail)
    assert not any(seen[0])
    assert (
        processors(small) == before
        and [parameter.requires_grad for parameter in small.unet.parameters()] == wanted
    )
    assert all(parameter.grad is None for parameter in small.unet.parameters())


def test_callbacks_see_and_replace_the_latents(small):
    steps = []

    def double(pipe, step, timestep, given):
        steps.append((step, int(timestep)))
        return {"latents": given["latents"] * 2}

    plain, doubled = (
        call(small, num_inference_steps=1),
        call(small, num_inference_steps=1, callback_on_step_end=double),
    )
    torch.testing.assert_close(doubled.images, plain.images * 2)
    assert [step for step, _ in steps] == [0]
    assert not torch.equal(
        call(small, mode="sample", callback_on_step_end=double).images, call(small, mode="sample").images
    )


@pytest.mark.parametrize("mode", ["optimise", "sample"])
@pytest.mark.parametrize("how", ["keyboard", "flag"])
def test_an_interrupt_keeps_what_there_was(small, mode, how):
    kept = []

    def stop(pipe, step, timestep, given):
        kept.append(given["latents"])
        if step == 1:
            pipe._interrupt = True
            if how == "keyboard":
                raise KeyboardInterrupt

    result = call(small, mode=mode, num_inference_steps=6, callback_on_step_end=stop)
    assert result.interrupted and len(kept) == 2 and result.images.isfinite().all()
    if mode == "optimise":  # the latents before the iteration of lowest loss
        latents = [small.encode(pictures(1, seed=1)), *kept]
        assert torch.equal(result.images, latents[int(result.losses[:, 0].argmin())])
    else:  # the clean latents of the last prediction
        assert (result.images - kept[-1]).abs().max() > 1e-3
    assert not call(small, mode=mode).interrupted


def runs(pipe):
    """One short run of each kind."""
    yield call(pipe, num_inference_steps=2)
    yield call(pipe, mode="sample", num_inference_steps=2)
    yield pipe.expand(
        pictures(1)[0], 32, 48, generator=seeded(), iterations=1, **{**QUICK, "num_inference_steps": 2}
    )


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_gradient_checkpointing_changes_no_kind_of_run(family):
    pipe, again = make(family), make(family)
    again.unet.enable_gradient_checkpointing()
    again.unet.train()
    forwards, layers = {}, {}
    for name, each in (("plain", pipe), ("checkpointed", again)):
        forwards[name], layers[name] = [], list(self_attention(each.unet, "up_blocks").values())[-2]
        layers[name].to_q.register_forward_hook(lambda *_, name=name: forwards[name].append(True))
    for one, other in zip(runs(pipe), runs(again)):
        assert one.losses.flatten().tolist() == pytest.approx(other.losses.flatten().tolist(), rel=2e-5)
    assert len(forwards["checkpointed"]) > len(forwards["plain"])  # in the backward pass the blocks ran again
    assert {type(each) for each in processors(again)} == {type(each) for each in processors(pipe)}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_half_precision_keeps_latents_and_loss_in_float32(family):
    stock = make_pipe(family)
    shared = {
        name: copy.deepcopy(part)
        for name, part in stock.components.items()
        if name.startswith(("vae", "text_encoder"))
    }  # by all tests
    stock.register_modules(**shared)
    pipe = quiet(AttentionDistillationPipeline.from_pipe(stock.to(torch.bfloat16)))
    pipe.unet.enable_gradient_checkpointing()
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    for result in runs(pipe):
        assert result.images.dtype == result.losses.dtype == torch.float32 and result.images.isfinite().all()
        assert not torch.equal(result.images, result.images.to(torch.bfloat16).float())
        assert not torch.equal(result.losses, result.losses.to(torch.bfloat16).float())
    assert set(seen) == {torch.bfloat16} and {each.dtype for each in pipe.unet.parameters()} == {
        torch.bfloat16
    }


def test_pipelines_are_made_of_their_family():
    assert type(make("sdxl")).__name__ == "AttentionDistillationXLPipeline"
    assert type(AppearanceTransferPipeline.from_pipe(make("sdxl"))).__name__ == "AppearanceTransferXLPipeline"
    assert call(make("sdxl"), mode="sample").images.shape == (1, 4, 16, 16)
    assert not {"invert", "noise_free", "self_regions"} & set(
        dir(AttentionDistillationPipeline)
    )  # those are of appearance transfer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode: expected one of optimise, sample, got 'both'"),
        ({"initial": "style"}, "initial: expected one of content, noise, got 'style'"),
        ({"iterations": -1}, "iterations: expected an integer of at least 0, got -1"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected an integer of at least 1, got 0"),
        ({"tune_decoder": -1}, "tune_decoder: expected an integer of at least 0, got -1"),
        ({"tune_decoder": 7.5}, "tune_decoder: expected an integer of at least 0, got 7.5"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0, got 0.0"),
        ({"method": "qalign"}, "method: expected AttentionDistillation"),
        ({"output_type": "png"}, "output_type: expected one of"),
        ({"layers": "top"}, "layers: expected names or patterns"),
    ],
)
def test_bad_arguments_are_one_line(small, options, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call(small, **options)


# textures


@pytest.mark.parametrize(
    ("space", "window", "stride"),
    [((16, 16), 16, 8), ((16, 41), 16, 16), ((7, 30), 16, 5), ((33, 20), 16, 1)],
)
def test_windows_cover_the_space_and_stay_inside(space, window, stride):
    covered = torch.zeros(space)
    places = windows(space, window, stride)
    for rows, columns in places:
        view = covered[rows, columns]
        assert view.shape == tuple(min(window, side) for side in space)
        view += 1
    assert covered.min() >= 1 and len(set(map(str, places))) == len(places)


def test_windows_without_overlap_or_covering_are_refused():
    for stride in (0, 17):
        with pytest.raises(
            ValueError, match=f"^stride: expected 1 to the window's 16 latents, got {stride}$"
        ):
            windows((32, 32), 16, stride)


def test_a_texture_of_one_window_is_a_sample(small):
    options = {"generator": seeded(), "iterations": 2, "learning_rate": 0.03, **QUICK}
    one = small.expand(pictures(1)[0], 32, 32, window=16, **options)
    options["generator"] = seeded()
    sampled = small(pictures(1)[0], mode="sample", adain=False, guidance_scale=1.0, **options)
    # the noise is drawn in the same order
    torch.testing.assert_close(one.images, sampled.images)
    assert torch.equal(one.losses, sampled.losses)


def test_a_texture_is_the_mean_of_its_windows(small):
    options = {"window": 16, "stride": 8, "iterations": 1, "num_inference_steps": 1, "output_type": "latent"}
    wide = small.expand(pictures(1)[0], 32, 64, generator=seeded(), **options).images
    assert wide.shape == (1, 4, 16, 32)
    batched = small.expand(pictures(1)[0], 32, 64, generator=seeded(), batch_size=1, **options).images
    assert (wide - batched).abs().mean() < 1e-3
    assert not torch.equal(
        wide, small.expand(pictures(1, seed=2)[0], 32, 64, generator=seeded(), **options).images
    )


HALVES = (torch.arange(16) >= 8).long().expand(16, 16)  # of a style of 16 x 16 latents


@pytest.mark.parametrize("scale", [1, 2])
def test_windows_have_the_labels_of_their_place(small, scale):
    labels = (
        (torch.arange(24 * 40).view(24, 40) // 7 % 2).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    )  # of latents, of pixels
    batches = []

    class Watching(AttentionDistillation):
        def loss(self, *features, regions):
            batches.append([each.structure for each in regions])
            return super().loss(*features, regions=regions)

    regions = Regions(appearance=HALVES, structure=labels)
    small.expand(
        pictures(1)[0],
        48,
        80,
        regions=regions,
        method=Watching(),
        window=16,
        stride=8,
        batch_size=3,
        iterations=1,
        **QUICK,
    )
    places = windows((24, 40), 16, 8)
    expected = [
        labels[rows.start * scale : rows.stop * scale, columns.start * scale : columns.stop * scale]
        for rows, columns in places
    ]
    assert [len(batch) for batch in batches] == [3, 3, 2] * 3
    assert all(torch.equal(one, other) for one, other in zip(sum(batches, []), expected * 3))


def test_one_window_masked_texture_is_a_masked_sample(small):
    options = {
        "iterations": 2,
        "learning_rate": 0.03,
        "regions": Regions(appearance=HALVES, structure=HALVES.T),
        **QUICK,
    }
    one = small.expand(pictures(1)[0], 32, 32, window=16, generator=seeded(), **options)
    sampled = small(
        pictures(1)[0], mode="sample", adain=False, guidance_scale=1.0, generator=seeded(), **options
    )
    torch.testing.assert_close(one.images, sampled.images)
    assert torch.equal(one.losses, sampled.losses)


def test_windows_with_missing_labels_see_everything(small):
    labels = torch.zeros(16, 48, dtype=torch.long)
    labels[:, 24:] = 9
    options = {
        "window": 16,
        "stride": 16,
        "iterations": 1,
        "batch_size": 1,
        **QUICK,
        "num_inference_steps": 1,
    }
    plain, masked = (
        small.expand(pictures(1)[0], 32, 96, generator=seeded(), regions=regions, **options)
        for regions in (None, Regions(appearance=HALVES, structure=labels))
    )
    same = (plain.losses[:, 0] == masked.losses[:, 0]).tolist()
    assert same == [False, False, True]  # the middle one shows both
    torch.testing.assert_close(masked.images[..., 32:], plain.images[..., 32:])
    assert masked.images.isfinite().all() and not torch.equal(masked.images[..., :24], plain.images[..., :24])


@pytest.mark.parametrize("mode", ["optimise", "sample"])
def test_masked_texture_has_the_size_of_labels(small, mode):
    labels = (torch.arange(12 * 20).view(12, 20) // 3 % 2).long()
    found = []
    for scale in (1, 2):  # latents and pixels
        maps = [each.repeat_interleave(scale, 0).repeat_interleave(scale, 1) for each in (HALVES, labels)]
        for given in ({}, {"height": 24, "width": 40}):
            regions = Regions(appearance=maps[0], structure=maps[1])
            found.append(
                small(pictures(1)[0], mode=mode, regions=regions, generator=seeded(), **given, **QUICK).images
            )
    assert found[0].shape == (1, 4, 12, 20) and all(torch.equal(each, found[0]) for each in found)
    plain = small(pictures(1)[0], mode=mode, height=24, width=40, generator=seeded(), **QUICK).images
    assert not torch.equal(plain, found[0])


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (
            {"appearance": HALVES[:8], "structure": HALVES},
            "a label map of the style of 16 x 16 latents, or of its pixels, got 8 x 16",
        ),
        (
            {"appearance": HALVES, "structure": HALVES},
            "a label map of the output of 24 x 32 latents, or of its pixels, got 16 x 16",
        ),
        ({"appearance": HALVES}, "a label map of the output of 24 x 32 latents, or of its pixels, got None"),
        (
            {"appearance": [HALVES, HALVES], "structure": HALVES},
            "a label map of the style of 16 x 16 latents, or of its pixels, got 2 of them",
        ),
    ],
)
def test_labels_of_another_size_are_one_line(small, regions, message):
    for make_picture in (small, functools.partial(small, mode="sample"), small.expand):
        with pytest.raises(ValueError, match=f"^regions: expected {message}$"):
            make_picture(pictures(1)[0], height=48, width=64, regions=Regions(**regions), **QUICK)
    with pytest.raises(ValueError, match="^regions: expected one style with them, got 2$"):
        small.expand(pictures(2), 32, 32, regions=Regions(appearance=HALVES, structure=HALVES), **QUICK)
