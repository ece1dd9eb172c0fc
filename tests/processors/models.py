"""Small real pipelines of SD 1.5, SD 2.1 and SDXL with seeded weights and a tokenizer of single letters."""

import functools
import string

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

FAMILIES = ("sd15", "sd21", "sdxl")
SIZE = 16  # of the latents
STEPS = 2
PROMPTS = ["a zebra", "a horse", "a field"]

_FOUR_BLOCKS = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_UNETS = {
    "sd15": {
        **_FOUR_BLOCKS,
        "attention_head_dim": 2,
    },  # one number of heads everywhere, convolutional projections
    "sd21": {
        **_FOUR_BLOCKS,
        "attention_head_dim": (2, 4, 4, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "small": {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "attention_head_dim": 2,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
}


def make_unet(family: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    cross = 64 if family == "sdxl" else 32
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=cross,
        **_UNETS[family],
    ).eval()


def make_pipe(family: str) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A pipeline with its own UNet and scheduler; the parts that no test changes are shared."""
    unet, scheduler = (
        make_unet(family),
        DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        ),
    )
    shared = {
        "unet": unet,
        "scheduler": scheduler,
        "vae": _vae(),
        "tokenizer": _tokenizer(),
        "text_encoder": _text_encoder(CLIPTextModel),
    }
    if family == "sdxl":
        second = {"tokenizer_2": _tokenizer(), "text_encoder_2": _text_encoder(CLIPTextModelWithProjection)}
        pipe = StableDiffusionXLPipeline(**shared, **second, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return quiet(pipe)


def quiet(pipe):
    """The same pipeline, without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipe_of(kind: type, family: str = "small"):
    """A pipeline of this library, made from that of `make_pipe`."""
    return quiet(kind.from_pipe(make_pipe(family)))


@functools.cache
def embedded_pipe(kind: type):
    """A pipeline of this library on the embedded model; tests leave it as it was."""
    return quiet(kind.embedded())


def generate(pipe, guidance_scale: float = 5.0, images: int = 1, steps: int = STEPS, **options) -> Tensor:
    """Final latents [prompts x images, 4, SIZE, SIZE] of PROMPTS from seeded noise."""
    noise = torch.randn(len(PROMPTS) * images, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return pipe(
        PROMPTS,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        num_images_per_prompt=images,
        output_type="latent",
        **options,
    ).images


def unet_inputs(unet: UNet2DConditionModel, batch: int = 3, dtype: torch.dtype = torch.float32) -> dict:
    """Keyword arguments of one forward pass."""
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "sample": torch.randn(batch, 4, SIZE, SIZE, generator=generator).to(dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(
            batch, 7, unet.config.cross_attention_dim, generator=generator
        ).to(dtype),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 32, generator=generator).to(dtype),
            "time_ids": torch.zeros(batch, 6).to(dtype),
        }
    return inputs


def self_attention(unet: UNet2DConditionModel, prefix: str = "") -> dict:
    return {
        name: module
        for name, module in unet.named_modules()
        if name.startswith(prefix) and name.endswith("attn1")
    }


@functools.cache
def _vae() -> AutoencoderKL:
    torch.manual_seed(3)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
    }
    return AutoencoderKL(latent_channels=4, norm_num_groups=8, **blocks).eval()


@functools.cache
def _text_encoder(kind: type) -> CLIPTextModel | CLIPTextModelWithProjection:
    torch.manual_seed(4)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 32,
    }
    return kind(
        CLIPTextConfig(
            vocab_size=64, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes
        )
    ).eval()


@functools.cache
def _tokenizer() -> CLIPTokenizer:
    symbols = [
        "<|startoftext|>",
        "<|endoftext|>",
        *string.ascii_lowercase,
        *(f"{letter}</w>" for letter in string.ascii_lowercase),
    ]
    return CLIPTokenizer(
        vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[], model_max_length=16
    )
