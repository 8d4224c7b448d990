"""The autoencoder of Stable Diffusion 1.5: images to latents an eighth of the side, and back.

The paper's method lives in the latents and leaves this network alone. Training encodes images once
and keeps the moments of their latents; sampling decodes the last latent.

Modules carry the names of the official single-file checkpoint less its prefix: its keys *are* the
state dict. Names of the diffusers folder layout go through one table, `folder_names`.

Shapes: B batch, C channels, H and W sides of the image, h and w of the latent (H / 8, W / 8),
Z latent channels, N = h · w positions.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEY_PREFIXES = ("first_stage_model.", "vae.")   # of the VAE's keys in single files: one of these


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder; the defaults are Stable Diffusion 1.5.

    `ch_mult` has one entry a level, from full resolution down; each halves the sides of the one
    before. `scale_factor` brings the latents of natural images to about unit variance.
    """

    in_channels: int = 3
    out_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    norm_groups: int = 32
    scale_factor: float = 0.18215


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, config: VAEConfig, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = _norm(config, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(config, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                                 # (B, C, H, W)
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Attention of every position to every other with a single head, as a residual."""

    def __init__(self, config: VAEConfig, channels: int):
        super().__init__()
        self.norm = _norm(config, channels)
        # 1×1 convolutions where linear layers would do: so the official file stores them.
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)                                                      # (B, C, h, w)
        q, k, v = (conv(h).flatten(2).mT[:, None] for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)                           # (B, 1, N, C)
        h = h[:, 0].mT.unflatten(2, x.shape[2:])                              # (B, C, h, w)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves the sides with a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Pads only at the right and below: so the official encoder was trained.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides by repeating every pixel, then convolves."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VAE(nn.Module):
    """Encoder to the moments of a Gaussian over latents, and decoder of one latent."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        z = config.z_channels
        self.encoder = _encoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder = _decoder(config)

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] to moments (B, 2 Z, h, w): mean, then log-variance.

        H and W must be multiples of 2 ** (levels − 1), 8 in Stable Diffusion. The moments are not
        scaled yet: `sample` does that.
        """
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)       # (B, Z, h, w)
        # The official clamp: exp(logvar / 2) must stay finite.
        return torch.cat([mean, logvar.clamp(-30, 20)], dim=1)                # (B, 2 Z, h, w)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """The latent (B, Z, h, w), scaled for the UNet, that standard normal noise picks."""
        mean, logvar = moments.chunk(2, dim=1)                                # (B, Z, h, w)
        return self.config.scale_factor * (mean + torch.exp(logvar / 2) * noise)

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, Z, h, w) to images (B, 3, H, W), in [−1, 1] but for some overshoot.

        float16 can overflow on the way, which gives a black image: decode in bfloat16 or float32.
        """
        return self.decoder(self.post_quant_conv(z / self.config.scale_factor))


def _encoder(config: VAEConfig) -> nn.Sequential:
    levels, ch = [], config.ch
    for level, mult in enumerate(config.ch_mult):
        c_in, ch = ch, config.ch * mult
        last = level == len(config.ch_mult) - 1
        resize = {} if last else {"downsample": Downsample(ch)}
        levels.append((str(level), _level(config, config.num_res_blocks, c_in, ch, resize)))
    return _row(
        conv_in=nn.Conv2d(config.in_channels, config.ch, 3, padding=1),
        down=nn.Sequential(OrderedDict(levels)),
        mid=_middle(config, ch),
        norm_out=_norm(config, ch),
        act=nn.SiLU(),
        conv_out=nn.Conv2d(ch, 2 * config.z_channels, 3, padding=1),
    )


def _decoder(config: VAEConfig) -> nn.Sequential:
    levels, middle = [], config.ch * config.ch_mult[-1]
    ch = middle
    for level, mult in reversed(list(enumerate(config.ch_mult))):
        c_in, ch = ch, config.ch * mult
        resize = {"upsample": Upsample(ch)} if level > 0 else {}
        levels.append((str(level), _level(config, config.num_res_blocks + 1, c_in, ch, resize)))
    return _row(
        conv_in=nn.Conv2d(config.z_channels, middle, 3, padding=1),
        mid=_middle(config, middle),
        up=nn.Sequential(OrderedDict(levels)),  # named 3, 2, 1, 0: run in this order
        norm_out=_norm(config, ch),
        act=nn.SiLU(),
        conv_out=nn.Conv2d(ch, config.out_channels, 3, padding=1),
    )


def _level(config: VAEConfig, depth: int, c_in: int, c_out: int,
           resize: dict[str, nn.Module]) -> nn.Sequential:
    blocks = [ResBlock(config, c_in if i == 0 else c_out, c_out) for i in range(depth)]
    return _row(block=nn.Sequential(*blocks), **resize)


def _middle(config: VAEConfig, ch: int) -> nn.Sequential:
    return _row(
        block_1=ResBlock(config, ch, ch),
        attn_1=Attention(config, ch),
        block_2=ResBlock(config, ch, ch),
    )


def _row(**layers: nn.Module) -> nn.Sequential:
    """Layers run one after the other, each under its name in the checkpoint."""
    return nn.Sequential(OrderedDict(layers))


def _norm(config: VAEConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)     # as the official one


# ------------------------------------------------------------------------------- its other names


def folder_names(config: VAEConfig) -> dict[str, str]:
    """Names of the diffusers folder layout to those of the single file, which are ours.

    Its decoder numbers levels from the latent outwards, in reverse of the single file. The
    attention's layers have two spellings, of older and of newer folders.
    """
    top = len(config.ch_mult) - 1
    return {f"up_blocks.{top - level}.": f"up.{level}." for level in range(top + 1)} | {
        "down_blocks.": "down.",
        "mid_block.resnets.0.": "mid.block_1.",
        "mid_block.resnets.1.": "mid.block_2.",
        "resnets.": "block.",
        "downsamplers.0.": "downsample.",
        "upsamplers.0.": "upsample.",
        "conv_shortcut.": "nin_shortcut.",
        "conv_norm_out.": "norm_out.",
        "mid_block.attentions.0.": "mid.attn_1.",
        "attn_1.group_norm.": "attn_1.norm.",
        "attn_1.query.": "attn_1.q.", "attn_1.to_q.": "attn_1.q.",
        "attn_1.key.": "attn_1.k.", "attn_1.to_k.": "attn_1.k.",
        "attn_1.value.": "attn_1.v.", "attn_1.to_v.": "attn_1.v.",
        "attn_1.proj_attn.": "attn_1.proj_out.", "attn_1.to_out.0.": "attn_1.proj_out.",
    }
