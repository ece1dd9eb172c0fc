"""The losses of attention distillation against their formulas written out, and where their gradient goes."""

import pytest
import torch

from qalign.context.regions import Regions
from qalign.methods.attention_distillation import AttentionDistillation, LayerFeatures
from qalign_kernels.testing import random_features

GRID = (6, 8)
SHAPES = {"up_blocks.0": (2, 3, 48, 40), "up_blocks.1": (2, 4, 12, 32)}
LABELS = {
    name: (torch.arange(48).view(GRID) * step // 4 % 3)
    for name, step in (("appearance", 5), ("structure", 7))
}


def features(rows, seed, dtype=torch.float32, absent=()):
    found = {}
    for number, (name, (_, heads, tokens, width)) in enumerate(SHAPES.items()):
        q, k, v, o = (
            random_features(rows, heads, tokens, width, seed=seed + 10 * number + part).to(dtype)
            for part in range(4)
        )
        found[name] = LayerFeatures(q, k, v, o.requires_grad_(), None)
    return found


def distillation(own, style, a=1.0, labels=None):
    """Layer by layer, row by row, head by head, query by query."""
    total = 0.0
    for name, layer in own.items():
        q, o = layer.query.double(), layer.output.double()
        k, v = (
            torch.cat(list(each.double()), dim=1) for each in (style[name].key, style[name].value)
        )  # styles side by side: [H, S·N, D]
        differences = []
        for row in range(len(q)):
            for head in range(q.shape[1]):
                logits = a * q[row, head] @ k[head].T / q.shape[-1] ** 0.5
                for i, scores in enumerate(logits):
                    seen = (
                        torch.ones_like(scores, dtype=torch.bool)
                        if labels is None
                        else labels[name][1] == labels[name][0][i]
                    )
                    p = scores[seen].exp() / scores[seen].exp().sum()
                    differences.append((o[row, head, i] - p @ v[head][seen]).abs())
        total += torch.stack(differences).mean().item()
    return total


def content_loss(own, content):
    return sum(
        (layer.query.double() - content[name].query.double()).abs().mean().item()
        for name, layer in own.items()
    )


@pytest.mark.parametrize("styles", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_losses_are_their_formulas(styles, scale):
    own, style, content = features(2, 0), features(styles, 100), features(2, 200)
    losses = AttentionDistillation(content_weight=0.3, logit_scale=scale).loss(own, style, content)
    distilled, kept = distillation(own, style, scale), content_loss(own, content)
    assert losses.distillation.item() == pytest.approx(distilled, rel=2e-6)
    assert losses.content.item() == pytest.approx(kept, rel=2e-6)
    assert losses.total.item() == pytest.approx(distilled + 0.3 * kept, rel=2e-6)


def test_mask_rows_are_output_and_columns_style():
    own, style = features(2, 0), features(1, 100)
    small = {
        name: labels[::2, ::2].flatten() for name, labels in LABELS.items()
    }  # torch's "nearest", as published
    tokens = {
        "up_blocks.0": {name: labels.flatten() for name, labels in LABELS.items()},
        "up_blocks.1": small,
    }
    labels = {name: (each["structure"], each["appearance"]) for name, each in tokens.items()}
    found = AttentionDistillation().loss(own, style, regions=Regions(**LABELS)).distillation.item()
    assert found == pytest.approx(distillation(own, style, labels=labels), rel=2e-6)
    swapped = Regions(appearance=LABELS["structure"], structure=LABELS["appearance"])
    for other in (
        AttentionDistillation().loss(own, style),
        AttentionDistillation().loss(own, style, regions=swapped),
    ):
        assert abs(other.distillation.item() - found) > 1e-3 * found


def test_each_row_may_have_labels_of_its_own():
    own, style = features(2, 0), features(1, 100)
    parts = [
        Regions(**LABELS),
        Regions(appearance=LABELS["appearance"], structure=torch.full(GRID, 7)),
    ]  # which the style lacks
    rows = [
        {name: LayerFeatures(*(x[row : row + 1] for x in layer[:4]), None) for name, layer in own.items()}
        for row in range(2)
    ]
    apart = [
        AttentionDistillation().loss(row, style, regions=each).total.item() for row, each in zip(rows, parts)
    ]
    assert AttentionDistillation().loss(own, style, regions=parts).total.item() == pytest.approx(
        sum(apart) / 2, rel=2e-6
    )
    assert abs(apart[1] - apart[0]) > 1e-3 * apart[0]


def test_label_missing_in_the_style_sees_everything():
    own, style = features(2, 0), features(1, 100)
    regions = Regions(
        appearance=torch.zeros(GRID, dtype=torch.long), structure=torch.ones(GRID, dtype=torch.long)
    )
    method = AttentionDistillation()
    assert method.loss(own, style, regions=regions).total.item() == pytest.approx(
        method.loss(own, style).total.item(), rel=2e-6
    )


def test_the_ideal_output_and_the_references_are_detached():
    own, style, content = (
        {
            name: LayerFeatures(*(x.detach().requires_grad_() for x in layer[:4]), None)
            for name, layer in some.items()
        }
        for some in (features(2, 0), features(1, 100), features(2, 200))
    )
    AttentionDistillation(content_weight=2.0).loss(own, style, content).total.backward()
    for name, layer in own.items():
        k, v = style[name].key, style[name].value
        ideal = torch.softmax(layer.query @ k.mT / layer.query.shape[-1] ** 0.5, -1) @ v
        torch.testing.assert_close(layer.output.grad, (layer.output - ideal).sign() / layer.output.numel())
        torch.testing.assert_close(
            layer.query.grad, 2 * (layer.query - content[name].query).sign() / layer.query.numel()
        )
        assert layer.key.grad is None and layer.value.grad is None
        assert all(x.grad is None for target in (style, content) for x in target[name][:4])


def test_losses_are_float32_whatever_the_features_are():
    own, style, content = (features(2, seed, torch.bfloat16) for seed in (0, 100, 200))
    losses = AttentionDistillation().loss(
        own,
        {name: LayerFeatures(*(x[:1] for x in layer[:4]), None) for name, layer in style.items()},
        content,
    )
    assert {each.dtype for each in losses} == {torch.float32}


def test_bad_features_are_one_line():
    own, style = features(2, 0), features(2, 100)
    with pytest.raises(
        ValueError,
        match="^style: expected the layers up_blocks.0, up_blocks.1 in style and content, got up_blocks.0$",
    ):
        AttentionDistillation().loss(own, {"up_blocks.0": style["up_blocks.0"]})
    with pytest.raises(ValueError, match="^regions: expected one style with them, got 2$"):
        AttentionDistillation().loss(own, style, regions=Regions(**LABELS))
