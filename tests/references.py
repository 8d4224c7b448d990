"""The well-known libraries' own networks, which ours are compared with."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

import clip_text
from clip_text import INNER_PREFIX, TextConfig
from unet import KEY_PREFIX, UNetConfig
from vae import VAEConfig


def diffusers_unet(config: UNetConfig):
    """diffusers' UNet of these sizes."""
    from diffusers import UNet2DConditionModel

    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)]
    return UNet2DConditionModel(
        in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=[config.model_channels * m for m in config.channel_mult],
        layers_per_block=config.num_res_blocks, down_block_types=down, up_block_types=up,
        cross_attention_dim=config.context_dim, attention_head_dim=config.num_heads,
        norm_num_groups=config.norm_groups)


def diffusers_vae(config: VAEConfig):
    """diffusers' VAE of these sizes."""
    from diffusers import AutoencoderKL

    levels = len(config.ch_mult)
    return AutoencoderKL(
        in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=[config.ch * m for m in config.ch_mult],
        layers_per_block=config.num_res_blocks, latent_channels=config.z_channels,
        scaling_factor=config.scale_factor,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, norm_num_groups=config.norm_groups)


def reference_tokenizer(folder: Path):
    """transformers' CLIPTokenizer over files written to the folder from the same vocabulary."""
    transformers = pytest.importorskip("transformers")
    lines = gzip.decompress(clip_text._vocabulary_file().read_bytes()).decode().split("\n")
    merges = lines[1 : 1 + 49408 - 512 - 2]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    vocabulary = symbols + [s + "</w>" for s in symbols] + [m.replace(" ", "") for m in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def with_our_weights(unet):
    """diffusers' UNet with the weights of ours, which its own converter takes for official ones."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    theirs = diffusers_unet(unet.config)
    official = {KEY_PREFIX + name: tensor for name, tensor in unet.state_dict().items()}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(official, dict(theirs.config)))
    return theirs.eval().requires_grad_(False)


def reference_text_encoder(config: TextConfig):
    """transformers' encoder with seeded weights large enough for every path to matter."""
    transformers = pytest.importorskip("transformers")
    sizes = transformers.CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=4 * config.width,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        max_position_embeddings=config.positions, hidden_act="quick_gelu",
        bos_token_id=0, eos_token_id=config.vocab_size - 1, pad_token_id=config.vocab_size - 1)
    generator = torch.Generator().manual_seed(0)
    model = transformers.CLIPTextModel(sizes).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        p.normal_(0, 0.1 if p.ndim == 1 else p.shape[1] ** -0.5, generator=generator)
        p.add_(float(is_scale))
    return model


def text_weights(model) -> dict[str, torch.Tensor]:
    """Its weights, named as in `TextEncoder`, whichever version of transformers made it."""
    return {k.removeprefix(INNER_PREFIX): v.contiguous() for k, v in model.state_dict().items()}


@pytest.fixture
def tokenizer(tmp_path):
    tokenizer = reference_tokenizer(tmp_path / "vocabulary")
    tokenizer.model_max_length = 77
    return tokenizer


def diffusers_pipeline(file: Path, folder: Path, tokenizer, configs: tuple):
    """diffusers' text-to-image pipeline of a single file, with its configurations offline."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig
    unet, vae, text = configs
    with torch.device("meta"):
        diffusers_unet(unet).save_config(folder / "unet")
        diffusers_vae(vae).save_config(folder / "vae")
    CLIPTextConfig(
        hidden_size=text.width, intermediate_size=4 * text.width, num_hidden_layers=text.layers,
        num_attention_heads=text.heads, bos_token_id=49406, eos_token_id=49407,
    ).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    parts = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "scheduler": DDIMScheduler}
    index = {name: ["diffusers", part.__name__] for name, part in parts.items()} | {
        "_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None],
        "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    return StableDiffusionPipeline.from_single_file(
        file, config=str(folder), local_files_only=True, safety_checker=None)
