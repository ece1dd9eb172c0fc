"""The guidance loss of bounded attention against its formula over maps, its schedule, and a loop that lowers it."""

import pytest
import torch

from qalign.bounded_guidance import BoundedGuidance, guided_sample
from qalign.methods.attention_distillation import LayerFeatures
from qalign.pipelines import AppearanceTransferPipeline
from qalign.regions import Regions
from qalign_kernels.testing import random_features
from tests.pipelines.transfers import seeded
from tests.processors.models import make_pipe

BOXES = torch.zeros(16, 16, dtype=torch.long)
BOXES[2:10, 2:8], BOXES[5:14, 10:15] = 3, 7
REGIONS = Regions(structure=BOXES, background=0)


def features():
    shapes = {"mid_block": (1, 3, 64, 40), "up_blocks.1": (1, 2, 256, 32)}
    layers = {name: [random_features(*shape, seed=10 * number + part) for part in range(4)] for number, (name, shape) in enumerate(shapes.items())}
    return {name: LayerFeatures(*layer, None) for name, layer in layers.items()}


def literal(found, labels, background=0):
    subjects = [label for label in labels.unique().tolist() if label != background]
    foreground, leaked = dict.fromkeys(subjects, 0.0), dict.fromkeys(subjects, 0.0)
    for layer in found.values():
        side = int(layer.query.shape[2] ** 0.5)
        tokens = labels[16 // side // 2 :: 16 // side, 16 // side // 2 :: 16 // side].flatten()  # in the middle of each cell
        seen = (tokens[:, None] == background) | (tokens[None] == background) | (tokens[:, None] == tokens[None])
        logits = layer.query.double() @ layer.key.double().mT / layer.query.shape[-1] ** 0.5
        maps = logits.masked_fill(~seen, -torch.inf).softmax(-1)[0]
        for s in subjects:
            foreground[s] = foreground[s] + maps[:, tokens == s][:, :, tokens == s].sum() / len(found)
            leaked[s] = leaked[s] + maps[:, tokens == background][:, :, tokens == s].sum() / len(found)
    overlaps = [foreground[s] / (foreground[s] + len(subjects) * leaked[s]) for s in subjects]
    return 0.5 * sum((1 - overlap) ** 2 for overlap in overlaps) / len(subjects)


def test_the_loss_is_its_formula_and_so_is_its_gradient():
    found = {name: LayerFeatures(*(x.requires_grad_() for x in layer[:4]), None) for name, layer in features().items()}
    loss, truth = BoundedGuidance().loss(found, REGIONS), literal(found, BOXES)
    assert loss.item() == pytest.approx(truth.item(), rel=2e-6)
    wanted = [x for layer in found.values() for x in layer[:2]]
    for gradient, expected in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(truth, wanted)):
        assert (gradient - expected).norm() <= 2e-6 * expected.norm()


def test_the_loss_is_of_the_labels():
    loss = BoundedGuidance().loss
    assert abs(loss(features(), REGIONS) - loss(features(), Regions(structure=BOXES.T.contiguous(), background=0))) > 1e-4
    renamed = torch.where(BOXES == 7, 1, torch.where(BOXES == 3, 2, 5))
    assert loss(features(), Regions(structure=renamed, background=5)).item() == pytest.approx(loss(features(), REGIONS).item(), rel=1e-6)


@pytest.mark.parametrize("regions", [Regions(structure=BOXES), Regions(appearance=BOXES, background=0), Regions(structure=BOXES * 0, background=0)])
def test_regions_without_subjects_or_background_are_refused(regions):
    with pytest.raises(ValueError, match="^regions: expected"):
        BoundedGuidance().loss(features(), regions)


def test_the_schedule_is_as_published():
    rates = [BoundedGuidance(rates=(18.0, 5.0)).rate(step, 50) for step in range(50)]
    assert rates[:15] == pytest.approx(torch.linspace(18, 5, 15).tolist()) and rates[15:] == [None] * 35
    assert BoundedGuidance(until=0.5).rate(0, 2) == 8.0 and BoundedGuidance(until=0.0).rate(0, 50) is None


def test_default_layers_are_the_published_ones():
    attentions = "mid_block.attentions.0.transformer_blocks.0.attn1"
    small = [attentions, *(f"up_blocks.{block}.attentions.{layer}.transformer_blocks.0.attn1" for block in (1, 2, 3) for layer in range(3))]
    assert BoundedGuidance().default_layers(small) == small[:4]
    large = [f"up_blocks.{block}.attentions.{layer}.transformer_blocks.{n}.attn1" for block in (0, 1) for layer in range(3) for n in range(10)]
    assert BoundedGuidance().default_layers([attentions, *large]) == large[1:7]


def test_guidance_lowers_the_loss_and_ends_with_its_steps():
    pipe = AppearanceTransferPipeline.from_pipe(make_pipe("sd15"))
    before, heard = [module.processor for module in pipe.unet.modules() if hasattr(module, "processor")], []
    noise = torch.randn(1, 4, 16, 16, generator=seeded())
    options = {"num_inference_steps": 4, "told": lambda step, loss: heard.append((step, loss))}
    guidance = BoundedGuidance(rates=(400.0, 400.0), until=0.5, iterations=6, enough=0.0)
    guided = guided_sample(pipe, noise, "a zebra", REGIONS, guidance=guidance, **options)
    assert [step for step, _ in heard] == [0] * 6 + [1] * 6
    losses = [loss for _, loss in heard]
    assert losses[5] < losses[0] and losses[11] < losses[6]
    del heard[:]
    assert not torch.equal(guided, guided_sample(pipe, noise, "a zebra", REGIONS, guidance=BoundedGuidance(enough=1.0), **options))
    assert [step for step, _ in heard] == [0]  # it is enough at once
    assert [module.processor for module in pipe.unet.modules() if hasattr(module, "processor")] == before
    with pytest.raises(ValueError, match=r"^latents: expected \[1, C, h, w\], got \[2, 4, 16, 16\]$"):
        guided_sample(pipe, noise.repeat(2, 1, 1, 1), "", REGIONS)
