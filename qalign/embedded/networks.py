"""The untrained networks of the embedded model, and the tokenizer of its captions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes import BACKGROUNDS, COLOURS, COUNTS, OBJECT_PARTS, PARTS, PLANS, TEXTURES

LATENT = 32  # tokens along a side of the latents
PICTURE = 4 * LATENT  # pixels along a side of a picture
WORDS = tuple(
    "a photo of on the by in above among ground water forest branch weeds sky quadrupeds birds".split()
)
MAX_TOKENS = 20
LOG_VARIANCE = -8.0  # of the autoencoder's posterior
# The features [B, tokens, channels] that carry a part label in training: the input of each self-attention
# layer of the decoder, by the name of the norm before it, with its number of channels.
LABELLED = {
    f"up_blocks.{block}.attentions.{layer}.transformer_blocks.0.norm1": (128, 96, 32)[block]
    for block in range(3)
    for layer in range(2)
}
PART_SCALE = 16.0  # factor on the cosines that predict a part, and on those that weigh neighbours


def build_tokenizer() -> Any:
    """CLIP's tokenizer with one token for each word of the captions. Other words are spelled in letters."""
    from tokenizers import AddedToken
    from transformers import CLIPTokenizer

    letters = [*map(chr, range(ord("a"), ord("z") + 1)), *"0123456789.,-'"]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: place for place, token in enumerate(vocab)}, merges=[], model_max_length=MAX_TOKENS
    )
    words = sorted({*WORDS, *PLANS, *TEXTURES, *COLOURS, *COUNTS, *BACKGROUNDS, *OBJECT_PARTS})
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words])
    return tokenizer


def build_autoencoder() -> Any:
    """A small AutoencoderKL with 4 x 4 pixels to a latent and a small, fixed posterior variance."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=PICTURE,
    )
    with torch.no_grad():
        model.quant_conv.weight[4:].zero_()
        model.quant_conv.bias[4:].fill_(LOG_VARIANCE)
    return model


def build_text_encoder(tokenizer: Any) -> Any:
    """A small CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_denoiser() -> Any:
    """A small UNet2DConditionModel with transformer blocks at 32², 16² and 8² tokens of the decoder."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(32, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=(1, 3, 4),  # of this class: the number of heads
        cross_attention_dim=64,
        norm_num_groups=16,
    )


def build_scheduler() -> Any:
    """DDIM over Stable Diffusion's noise levels, for a model that predicts v."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


class CosineReader(nn.Module):
    """Predict the part from the direction of a feature: [..., channels] to logits [..., parts].

    The length of the feature has no influence, as in cosine similarity between queries.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.randn(len(PARTS), channels))

    def forward(self, features: Tensor) -> Tensor:
        return PART_SCALE * F.linear(F.normalize(features, dim=-1), F.normalize(self.directions, dim=-1))
