"""The benchmark's baseline: diffusers' Stable Diffusion with the base's own weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from support.base import Base
from support.cli import BadInput

BASELINE = "diffusers: "        # in the names of what it does as well


def build_baseline(base: Base):
    """diffusers' StableDiffusionPipeline over the base's tensors; nothing is copied.

    Raises BadInput where diffusers is not installed.
    """
    try:
        from diffusers import DDIMScheduler, StableDiffusionPipeline
        from diffusers.loaders.single_file_utils import (
            convert_ldm_unet_checkpoint,
            convert_ldm_vae_checkpoint,
        )
        unet, vae, text = _networks(base)
    except ImportError as error:
        raise BadInput("--baseline needs a package that is missing: pip install diffusers "
                       f"transformers ({error})") from None
    for theirs, ours, prefix, convert in (
            (unet, base.unet, "model.diffusion_model.", convert_ldm_unet_checkpoint),
            (vae, base.vae, "first_stage_model.", convert_ldm_vae_checkpoint)):
        tensors = {prefix + name: p for name, p in ours.state_dict().items()}
        theirs.load_state_dict(convert(tensors, dict(theirs.config)), assign=True)
    # transformers 5 dropped the prefix that transformers 4 has
    prefix = "text_model." if next(iter(text.state_dict())).startswith("text_model.") else ""
    text.load_state_dict({prefix + name: p for name, p in base.text.state_dict().items()},
                         assign=True)
    text.to(base.device)                # its position ids are no part of the state
    for module in (unet, vae, text):
        module.eval().requires_grad_(False)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=1)
    pipe = StableDiffusionPipeline(vae, text, None, unet, scheduler, None, None,
                                   requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def baseline_functions(pipe) -> tuple[Callable, Callable, Callable]:
    """diffusers' UNet, decoder and text encoder, called as ours are."""
    scale = pipe.vae.config.scaling_factor
    return (lambda z, t, c: pipe.unet(z, t, c, return_dict=False)[0],
            lambda z: pipe.vae.decode(z / scale, return_dict=False)[0],
            lambda ids: pipe.text_encoder(ids)[0])


def _networks(base: Base) -> tuple[nn.Module, nn.Module, nn.Module]:
    """diffusers' UNet and VAE and transformers' text encoder, in the base's sizes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    u, v, t = base.unet.config, base.vae.config, base.text.config
    levels = len(v.ch_mult)
    kinds = ["CrossAttn" if attention else "" for attention in u.attention]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            in_channels=u.in_channels, out_channels=u.out_channels,
            block_out_channels=[u.model_channels * m for m in u.channel_mult],
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
            layers_per_block=u.num_res_blocks, cross_attention_dim=u.context_dim,
            attention_head_dim=u.num_heads, norm_num_groups=u.norm_groups)
        vae = AutoencoderKL(
            in_channels=v.in_channels, out_channels=v.out_channels, latent_channels=v.z_channels,
            block_out_channels=[v.ch * m for m in v.ch_mult], layers_per_block=v.num_res_blocks,
            down_block_types=["DownEncoderBlock2D"] * levels, norm_num_groups=v.norm_groups,
            up_block_types=["UpDecoderBlock2D"] * levels, scaling_factor=v.scale_factor)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=t.vocab_size, hidden_size=t.width, intermediate_size=4 * t.width,
        num_hidden_layers=t.layers, num_attention_heads=t.heads, hidden_act="quick_gelu",
        max_position_embeddings=t.positions, bos_token_id=49406, eos_token_id=49407))
    return unet, vae, text
