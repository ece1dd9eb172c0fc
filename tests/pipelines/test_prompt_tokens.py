"""Places of words are those of what stock's `encode_prompt` encodes, with textual inversions of any size."""

import pytest
import torch

from qalign.pipelines import AppearanceTransferPipeline, bounded_attention
from qalign.sampling.object_masks import default_noun, end_place, noun_tokens, word_places
from tests.processors.models import make_pipe, quiet

VECTORS = {"<toy>": 3, "<cat-toy>": 2, "<one>": 1, "my_hat": 2}


@pytest.fixture(scope="module")
def pipe():
    pipe = quiet(AppearanceTransferPipeline.embedded())
    for token, vectors in VECTORS.items():
        pipe.load_textual_inversion(
            {token: torch.randn(vectors, pipe.text_encoder.config.hidden_size)}, token=token
        )
    return pipe


def encoded(pipe, prompt: str) -> list[str]:
    """The tokens that reach the text encoder."""
    seen = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pipe.encode_prompt(prompt, "cpu", 1, False)
    hook.remove()
    return pipe.tokenizer.convert_ids_to_tokens(seen[0][0])


@pytest.mark.parametrize(
    ("prompt", "word", "tokens"),
    [
        ("a <toy> and a bird", "bird", ["bird"]),
        ("a <toy> and a bird", "<toy>", ["<toy>", "<toy>_1", "<toy>_2"]),
        ("a BIRD, a <toy>, a bird", "bird", ["bird", "bird"]),
        ("a <one> <cat-toy> by a <toy> bird", "<cat-toy>", ["<cat-toy>", "<cat-toy>_1"]),
        ("a <one> <cat-toy> by a <toy> bird", "<toy> bird", ["<toy>", "<toy>_1", "<toy>_2", "bird"]),
        ("a my_hat and a bird", "my_hat", ["my_hat", "my_hat_1"]),
    ],
)
def test_places_are_those_of_what_is_encoded(pipe, prompt: str, word: str, tokens: list[str]) -> None:
    found = encoded(pipe, prompt)
    assert [found[place] for place in noun_tokens(pipe.tokenizer, prompt, word)] == tokens
    assert found[end_place(pipe.tokenizer, prompt)] == "<|endoftext|>"
    assert "<|endoftext|>" not in found[: end_place(pipe.tokenizer, prompt)]


def test_a_word_inside_a_token_is_none(pipe) -> None:
    for word in ("toy", "cat"):
        assert word_places(pipe.tokenizer, "a <cat-toy> and a <toy>", word) == ()
        with pytest.raises(ValueError, match=f"^noun: expected a word of the prompt .*, got '{word}'"):
            noun_tokens(pipe.tokenizer, "a <cat-toy> and a <toy>", word)
    assert word_places(pipe.tokenizer, "it's", "s") == ()  # 's is one token


def test_cut_off_words_have_no_places(pipe) -> None:
    prompt = "<toy> " * 5 + "a bird on a branch"
    assert word_places(pipe.tokenizer, prompt, "branch") == ()
    assert end_place(pipe.tokenizer, prompt) == pipe.tokenizer.model_max_length - 1
    method = bounded_attention._method(pipe.tokenizer, prompt, ["bird"], ["on", "branch", "toy"])
    assert [encoded(pipe, prompt)[place] for place in method.filter_tokens] == ["on"]


def test_bounded_attention_finds_inversions(pipe) -> None:
    prompt = "a <toy> and a bird"
    found = encoded(pipe, prompt)
    method = bounded_attention._method(
        pipe.tokenizer, prompt, ["<toy>", "bird"], bounded_attention.FILTER_WORDS
    )
    assert [[found[place] for place in places] for places in method.subject_tokens.values()] == [
        ["<toy>", "<toy>_1", "<toy>_2"],
        ["bird"],
    ]
    assert "".join(found[place] for place in method.filter_tokens) == "aand</w>a"


def test_the_guessed_noun_may_be_an_inversion(pipe) -> None:
    for prompt, noun in (("a red <toy> on grass", "<toy>"), ("a my_hat", "my_hat"), ("<toy> bird", "bird")):
        assert default_noun(prompt, pipe.tokenizer) == noun
        assert pipe._noun_tokens(prompt, None) == noun_tokens(pipe.tokenizer, prompt, noun)


def test_both_tokenizers_need_the_inversion() -> None:
    pipe = quiet(AppearanceTransferPipeline.from_pipe(make_pipe("sdxl")))
    assert pipe._noun_tokens("a zebra", "zebra") == noun_tokens(pipe.tokenizer, "a zebra", "zebra")
    pipe.tokenizer_2 = type(pipe.tokenizer)(pipe.tokenizer.get_vocab(), [], model_max_length=16)
    pipe.tokenizer_2.add_tokens(["<toy>", "<toy>_1"])
    with pytest.raises(ValueError, match="^prompt: expected the same tokens from both tokenizers"):
        pipe._noun_tokens("toy<toy> zebra", "zebra")
