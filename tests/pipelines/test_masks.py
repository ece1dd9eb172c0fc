"""Masks: maps against materialised ones, clusters and both rules against their text, a restored UNet."""

import logging
import string

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTokenizer

pytest.importorskip("sklearn")

from qalign import QAlign, attach  # noqa: E402
from qalign.embedded import scenes  # noqa: E402
from qalign.sampling import object_masks as masks  # noqa: E402
from qalign.sampling.attention_maps import AttentionMaps, MapCollector  # noqa: E402
from qalign.sampling.object_masks import (
    default_noun,
    noun_map,
    noun_tokens,
    object_clusters,
    object_masks,
    segment,
)  # noqa: E402
from qalign_kernels.testing import judge_formula  # noqa: E402
from tests.processors.models import make_pipe, make_unet, unet_inputs  # noqa: E402
from tests.processors.test_unet_contract import ip_adapter_weights  # noqa: E402


class Recorder(AttnProcessor):
    """Classic attention that keeps queries and keys [B, H, N, D] by layer, in the order of the calls."""

    def __init__(self, unet) -> None:
        self.names = {module: name for name, module in unet.named_modules()}
        self.calls = []
        unet.set_attn_processor(self)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = (
            attn.head_to_batch_dim(x, out_dim=4) if x.ndim == 3 else x
            for x in (attn.to_q(hidden_states.detach()), attn.to_k(context.detach()))
        )
        self.calls.append((self.names[attn], query, key))
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def features(self, kind, tokens):
        return [
            (query, key)
            for name, query, key in self.calls
            if name.endswith(kind) and query.shape[2] == tokens and name[:4] in ("down", "up_b")
        ]


def formula(query, key):
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)


def run(unet, batch=3, size=None, dtype=torch.float32, **changed):
    inputs = unet_inputs(unet, batch, dtype) | changed
    if size is not None:
        inputs["sample"] = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        return unet(**inputs).sample


def planted(sizes=(30, 50, 20, 40, 60), noise=0.2, seed=0):
    """A self-attention map whose tokens attend their own group, and the groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=generator)]
    logits = 4.0 * (groups[:, None] == groups) + noise * torch.randn(
        len(groups), len(groups), generator=generator
    )
    return logits.softmax(-1), groups


def partition(labels):
    return labels[:, None] == labels


def quadrants(grid=(8, 12)):
    """Maps of two pictures of 4 regions.

    Text token 2 is about region 1 in the first picture and region 2 in the second, token 3 about region 3.
    """
    height, width = grid
    row, column = torch.meshgrid(
        torch.arange(height) >= height // 2, torch.arange(width) >= width // 2, indexing="ij"
    )
    regions = (2 * row + column).flatten()
    half = regions.view(height, width)[::2, ::2].flatten()
    self_map = (5.0 * partition(regions)).softmax(-1)
    cross_map = torch.full((2, len(half), 5), 0.1)
    for picture, region in enumerate((1, 2)):
        cross_map[picture, half == region, 2] = 0.9
        cross_map[picture, half == 3, 3] = 0.8
    maps = AttentionMaps(
        self_map.expand(2, -1, -1), grid, cross_map, (height // 2, width // 2), (2 * height, 2 * width)
    )
    return maps, regions.view(height, width)


@pytest.mark.parametrize(("family", "size"), [("sd15", (16, 16)), ("sd21", (16, 24)), ("sdxl", (16, 16))])
@pytest.mark.parametrize("average", [False, True])
def test_maps_are_those_of_materialised_attention(family, size, average) -> None:
    unet = make_unet(family)
    recorder = Recorder(unet)
    with MapCollector(unet, average=average) as collector:
        run(unet, size=size)
        run(unet, size=size, timestep=torch.tensor(300))
    maps = collector.maps()
    grid = size if family != "sdxl" else (size[0] // 2, size[1] // 2)
    assert (maps.grid, maps.cross_grid, maps.size) == (grid, (grid[0] // 2, grid[1] // 2), size)
    for actual, kind, shape in (
        (maps.self_map, "attn1", maps.grid),
        (maps.cross_map, "attn2", maps.cross_grid),
    ):
        layers = recorder.features(kind, shape[0] * shape[1])
        assert len(layers) == (6 if family != "sdxl" or kind == "attn1" else 12)
        query, key = (torch.cat(parts, dim=1) for parts in zip(*(layers if average else layers[-1:])))
        assert actual.dtype == torch.float32
        verdict = judge_formula(actual, formula, query, key, reduction=query.shape[2])
        assert verdict.passed, verdict
        other = formula(*layers[-2])
        assert not torch.allclose(actual, other, atol=1e-5)


def test_averaging_continues_over_calls_without_changing_results() -> None:
    unet = make_unet("small")
    with MapCollector(unet, average=True, self_tokens=256, cross_tokens=256) as collector:
        run(unet)
        first = collector.maps().self_map
        before = first.clone()
        run(unet, timestep=torch.tensor(10))
    with MapCollector(unet, average=True, self_tokens=256, cross_tokens=256) as alone:
        run(unet, timestep=torch.tensor(10))
    assert torch.equal(first, before)
    torch.testing.assert_close(collector.maps().self_map, (first + alone.maps().self_map) / 2)


def test_rows_are_those_asked_for() -> None:
    unet = make_unet("sd15")
    with MapCollector(unet) as all_rows, MapCollector(unet, rows=(2, 0)) as some:
        run(unet)
    for name in ("self_map", "cross_map"):
        torch.testing.assert_close(getattr(some.maps(), name), getattr(all_rows.maps(), name)[[2, 0]])


def test_chosen_tokens_and_other_sizes_of_latents() -> None:
    unet = make_unet("sd15")
    with MapCollector(unet, self_tokens=64, cross_tokens=64) as collector:
        run(unet)
        assert (collector.maps().grid, collector.maps().cross_grid) == ((8, 8), (8, 8))
        run(unet, size=(16, 24))
        with pytest.raises(
            RuntimeError, match="self_tokens: expected layers with 64 tokens to have run, got none"
        ):
            collector.maps()
    with MapCollector(unet) as collector:
        run(unet, size=(17, 11))
    assert (collector.maps().grid, collector.maps().cross_grid) == ((17, 11), (9, 6))


def test_fine_grids_are_left_out_unless_asked_for() -> None:
    unet = make_unet("sd15")
    with MapCollector(unet) as few, MapCollector(unet, self_tokens=1536) as many:
        run(unet, batch=1, size=(32, 48))
    assert (few.maps().grid, few.maps().cross_grid) == ((16, 24), (8, 12))
    assert (many.maps().grid, many.maps().cross_grid) == ((32, 48), (16, 24))


def test_cross_attention_falls_back_to_the_same_grid() -> None:
    unet = make_unet("small")
    with MapCollector(unet) as collector:
        run(unet)
    assert collector.maps().cross_grid == collector.maps().grid == (16, 16)


@pytest.mark.parametrize("edited", [False, True])
def test_collecting_leaves_results_bit_for_bit(edited) -> None:
    unet = make_unet("sd15")
    with MapCollector(unet, rows=(1, 2)) as plain:
        stock = run(unet)
    if edited:
        with attach(unet, QAlign()):
            without = run(unet)
        with attach(unet, QAlign()), MapCollector(unet, rows=(1, 2)) as collector:
            assert torch.equal(run(unet), without)
        assert not torch.equal(without[0], stock[0])
        assert torch.equal(collector.maps().self_map, plain.maps().self_map)
    else:
        assert torch.equal(stock, run(unet))


def test_block_and_exception_leave_nothing_behind() -> None:
    unet = make_unet("sd15")
    processors = dict(unet.attn_processors)

    def hooks():
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in unet.modules())

    collector = MapCollector(unet)
    assert hooks() == 0
    with pytest.raises(RuntimeError), collector:
        assert hooks() > 0
        run(unet, encoder_hidden_states=torch.zeros(3, 7, 5))
    assert hooks() == 0
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    with collector:
        run(unet)
    maps = collector.maps()
    run(unet, timestep=torch.tensor(1))
    assert torch.equal(collector.maps().self_map, maps.self_map)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_maps(dtype) -> None:
    unet = make_unet("sd15")
    with MapCollector(unet) as exact:
        run(unet)
    unet.to(dtype)
    with MapCollector(unet) as collector:
        run(unet, dtype=dtype)
    maps = collector.maps()
    assert maps.self_map.dtype == maps.cross_map.dtype == torch.float32
    torch.testing.assert_close(maps.self_map.sum(-1), torch.ones(maps.self_map.shape[:2]))
    assert (maps.self_map - exact.maps().self_map).abs().max() < 0.1 * exact.maps().self_map.max()


def test_an_ip_adapter_leaves_the_text_maps() -> None:
    unet = make_pipe("sd15").unet
    with MapCollector(unet) as plain:
        run(unet)
    unet._load_ip_adapter_weights([ip_adapter_weights(unet)])
    for name, processor in unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            processor.scale = [0.0]
    with MapCollector(unet) as adapted:
        run(unet, added_cond_kwargs={"image_embeds": [torch.ones(3, 1, 8)]})
    torch.testing.assert_close(adapted.maps().cross_map, plain.maps().cross_map)


def test_collector_refuses() -> None:
    unet = make_unet("sd15")
    for tokens in (0, 4097):
        with pytest.raises(
            ValueError, match=f"self_tokens: expected None or an integer of 1 to 4096, got {tokens}"
        ):
            MapCollector(unet, self_tokens=tokens)
    with pytest.raises(ValueError, match="cross_tokens: expected"):
        MapCollector(unet, cross_tokens=-1)
    with pytest.raises(TypeError, match="pipe_or_model: expected"):
        MapCollector(unet.conv_in)
    with MapCollector(unet) as collector:
        pass
    with pytest.raises(
        RuntimeError, match="self_tokens: expected layers with at most 1024 tokens to have run, got none"
    ):
        collector.maps()
    with MapCollector(unet, cross_tokens=100) as collector:
        run(unet)
    with pytest.raises(
        RuntimeError, match="cross_tokens: expected layers with 100 tokens to have run, got none"
    ):
        collector.maps()


def test_segment_finds_planted_groups_again_and_again() -> None:
    self_map, groups = planted()
    labels = segment(self_map)
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(5))
    assert torch.equal(partition(labels), partition(groups))
    torch.rand(3)
    assert torch.equal(segment(self_map), labels)
    assert torch.equal(partition(segment(self_map, seed=2)), partition(groups))


def test_clusters_begin_at_the_centres_that_are_given(monkeypatch) -> None:
    self_map, groups = planted()
    centres = torch.stack([self_map[groups == group].mean(0) for group in (3, 1, 0, 4, 2)])
    assert torch.equal(
        segment(self_map, centres=centres), torch.tensor([2, 1, 4, 0, 3])[groups]
    )  # numbered as they are
    given: list[dict] = []
    cluster = pytest.importorskip("sklearn.cluster")
    monkeypatch.setattr(
        cluster,
        "KMeans",
        lambda k, real=cluster.KMeans, **options: given.append(options) or real(k, **options),
    )
    segment(self_map, starts=3, seed=7)
    assert given == [{"random_state": 7, "n_init": 3}]


def test_segment_follows_a_permutation_of_tokens() -> None:
    self_map, _ = planted(noise=1.0, seed=1)
    order = torch.randperm(len(self_map), generator=torch.Generator().manual_seed(3))
    labels, permuted = segment(self_map), segment(self_map[order][:, order])
    assert torch.equal(partition(labels)[order][:, order], partition(permuted))


def test_segment_refuses_more_clusters_than_tokens() -> None:
    with pytest.raises(ValueError, match="clusters: expected an integer of 1 to N=4, got 5"):
        segment(torch.eye(4))


def literal_object(labels, noun_maps, rule):
    """ALGORITHMS.md 2.5 and 8, cluster by cluster."""
    scores = {}
    for cluster in sorted(set(labels.tolist())):
        inside = [token for token in range(len(labels)) if labels[token] == cluster]
        scores[cluster] = [
            sum(float(values[token]) for token in inside) / len(inside) for values in noun_maps
        ]
    best = [max(score) for score in scores.values()]
    best.remove(max(best))
    bar = 1.4 * sum(best) / len(best) if rule == "relative" else 0.35
    found = [
        cluster for cluster, score in scores.items() if max(score) > bar and score.index(max(score)) == 0
    ]
    return torch.tensor([label in found for label in labels.tolist()])


@pytest.mark.parametrize("rule", ["relative", "absolute"])
@pytest.mark.parametrize("nouns", [1, 3])
def test_object_clusters_are_those_of_the_text(rule, nouns) -> None:
    generator = torch.Generator().manual_seed(4)
    sizes = []
    for highest, power in 15 * ((1.0, 2), (1.0, 0), (0.3, 1)):
        labels = torch.randint(0, 5, (60,), generator=generator)
        levels = highest * torch.rand(nouns, 5, generator=generator) ** power
        noun_maps = levels[:, labels] * (0.8 + 0.2 * torch.rand(nouns, 60, generator=generator))
        found = object_clusters(labels, noun_maps, rule=rule)
        assert torch.equal(found, literal_object(labels, noun_maps, rule))
        sizes.append(found.double().mean().item())
    assert any(size == 0 for size in sizes) and any(0 < size < 1 for size in sizes)


def test_object_clusters_need_not_use_every_label() -> None:
    labels = torch.tensor([0, 0, 3, 3, 7, 7])
    noun_maps = torch.tensor([[0.1, 0.1, 0.9, 0.9, 0.2, 0.2]])
    assert object_clusters(labels, noun_maps).tolist() == [False, False, True, True, False, False]
    assert not object_clusters(torch.zeros(6, dtype=torch.int64), noun_maps).any()
    assert object_clusters(labels, noun_maps, rule="absolute", threshold=0.15).tolist() == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]
    with pytest.raises(ValueError, match="rule: expected one of relative, absolute, got 'best'"):
        object_clusters(labels, noun_maps, rule="best")


def test_noun_map_is_normalised_and_repeated() -> None:
    cross_map = torch.rand(6, 4, generator=torch.Generator().manual_seed(6))
    pair = (cross_map[:, 1] + cross_map[:, 3]) / 2
    expected = (
        ((pair - pair.min().abs()) / pair.max()).view(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    torch.testing.assert_close(noun_map(cross_map, (1, 3), (2, 3), (4, 6)), expected.flatten())


def word_tokenizer(*words):
    """Whole words are single tokens; others fall into letters."""
    symbols = [
        "<|startoftext|>",
        "<|endoftext|>",
        *string.ascii_lowercase,
        ",",
        ",</w>",
        *(f"{letter}</w>" for letter in string.ascii_lowercase),
    ]
    merges = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            symbols.append(parts[0])
    symbols = list(dict.fromkeys(symbols))
    return CLIPTokenizer(
        vocab={symbol: number for number, symbol in enumerate(symbols)},
        merges=list(dict.fromkeys(merges)),
        model_max_length=16,
    )


@pytest.mark.parametrize(
    ("prompt", "noun", "places"),
    [
        ("a photo of a zebra", "zebra", (5,)),  # word index 4, and one for the start
        ("A Photo of a ZEBRA", "zebra", (5,)),
        ("zebra, photo of zebra", "zebra", (1, 5)),
        ("a photo of a cow", "cow", (5, 6, 7)),
        ("a cow of a zebra", "zebra", (7,)),
        ("a photo of a zebra", "a zebra", (4, 5)),
        ("a photo of zebras zebra", "zebra", (7,)),
    ],
)
def test_noun_tokens_are_the_places_of_the_word(prompt, noun, places) -> None:
    tokenizer = word_tokenizer("photo", "of", "zebra")
    assert noun_tokens(tokenizer, prompt, noun) == places
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    assert set("".join(tokens[place] for place in places).split("</w>")) == {*noun.split(), ""}


def test_noun_tokens_refuse() -> None:
    tokenizer = word_tokenizer("photo", "of", "zebra")
    for noun in ("horse", "zebr", ""):
        with pytest.raises(
            ValueError, match=f"noun: expected a word of the prompt 'a photo of zebras', got '{noun}'"
        ):
            noun_tokens(tokenizer, "a photo of zebras", noun)
    with pytest.raises(ValueError, match="noun: expected a word among the first 16 tokens, got 'zebra'"):
        noun_tokens(tokenizer, "b " * 14 + "zebra", "zebra")
    assert noun_tokens(tokenizer, "b " * 13 + "zebra", "zebra") == (14,)


@pytest.mark.parametrize(
    ("prompt", "noun"),
    [
        ("a photo of a zebra", "zebra"),
        ("A photo of a striped zebra on grass", "zebra"),
        ("a red fish, seen from above", "fish"),
        ("zebra", "zebra"),
        ("a photo", None),
        ("", None),
    ],
)
def test_default_noun(prompt, noun) -> None:
    assert default_noun(prompt) == noun


def test_default_noun_of_the_scenes_is_their_creature() -> None:
    drawn = scenes.render([scenes.held_out_seed(number) for number in range(24)], size=16)
    assert len(set(drawn.captions)) > 12
    for plan, caption in zip(drawn.plans, drawn.captions):
        assert default_noun(caption).removesuffix("s") == plan, caption


@pytest.mark.parametrize("rule", ["relative", "absolute"])
def test_object_masks_are_the_planted_regions(rule) -> None:
    maps, regions = quadrants()
    found = object_masks(maps, (2,), clusters=4, rule=rule)
    assert found.dtype == torch.bool
    assert torch.equal(
        found, torch.stack([regions == 1, regions == 2]).repeat_interleave(2, 1).repeat_interleave(2, 2)
    )
    assert torch.equal(
        object_masks(maps, (2,), clusters=4, rule=rule, size=(8, 12)),
        torch.stack([regions == 1, regions == 2]),
    )
    both = object_masks(maps, (2, 3), clusters=4, size=(8, 12), rule=rule)
    assert torch.equal(both, torch.stack([(regions == 1) | (regions == 3), (regions == 2) | (regions == 3)]))
    assert torch.equal(
        object_masks(maps, (2,), [(3,)], clusters=4, size=(8, 12), rule=rule),
        torch.stack([regions == 1, regions == 2]),
    )


def test_whole_picture_where_no_cluster_passes_said_once(caplog) -> None:
    maps, _ = quadrants()
    masks._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "qalign"):
        for _ in range(2):
            assert object_masks(maps, (2,), clusters=4, rule="absolute", threshold=1.1).all()
            assert object_masks(maps, ()).all()
    assert [record.message.split("(")[1].split(")")[0] for record in caplog.records] == [
        "no cluster of tokens attends enough to it",
        "the prompt has no word for it",
    ]
    assert object_masks(maps, (), size=(3, 5)).shape == (2, 3, 5)
