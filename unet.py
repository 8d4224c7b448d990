"""The UNet of Stable Diffusion 1.5, cut where the paper cuts it.

The paper leaves this network frozen. It is the teacher, and with a guide's residuals added it is
the student. A guide adds to the decoder only (Fig. 4), so the network is two halves: `encode` runs
the input blocks and the middle, `decode` runs the output blocks on the skips. Teacher and student
see the same latent, time and prompt in the encoder, so one `encode` serves both.

Modules carry the names of the official single-file checkpoint less its prefix: its keys *are* the
state dict. Names of the diffusers folder layout go through one table, `folder_names`.

Shapes: B batch, C channels, H and W sides of the latent (an eighth of the image's), N = H · W
positions, L tokens of the prompt, D width of a token, E = 4 · model_channels, A attention heads.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEY_PREFIX = "model.diffusion_model."       # of the UNet's keys in an official single file


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; the defaults are Stable Diffusion 1.5.

    `channel_mult` and `attention` have one entry a level, from full resolution down; each level
    halves the sides of the one before. Channels are multiples of `norm_groups` and `num_heads`.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)
    num_heads: int = 8
    context_dim: int = 768
    norm_groups: int = 32

    def __post_init__(self):
        if self.model_channels % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}: it must divide {self.model_channels}")
        if len(self.attention) != len(self.channel_mult):
            raise ValueError(f"attention {self.attention} needs one entry a level")


# ------------------------------------------------------------------------------- the layers


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added in between, beside a shortcut."""

    def __init__(self, config: UNetConfig, c_in: int, c_out: int):
        super().__init__()
        groups, emb_dim = config.norm_groups, 4 * config.model_channels
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, c_out),
            nn.SiLU(),
            nn.Identity(),      # the official model has a dropout here: the convolution is key 3
            _zero(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def project_time(self, emb: Tensor) -> Tensor:
        """What the block adds for the time (B, E): the same at every position."""
        return self.emb_layers(emb)[:, :, None, None]                         # (B, C, 1, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.project_time(emb)                        # (B, C, H, W)
        return self.skip_connection(x) + self.out_layers(h)                   # (B, C, H, W)


class Attention(nn.Module):
    """Multi-head attention of image positions to a context: themselves or the prompt."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def project_kv(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context (B, L, D). Those of the prompt are the same at every step,
        which support/fast.py makes use of."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.project_kv(context)                                       # (B, A, L, C/A)
        q = self._split(self.to_q(x))                                         # (B, A, N, C/A)
        h = F.scaled_dot_product_attention(q, k, v)                           # (B, A, N, C/A)
        return self.to_out(h.transpose(1, 2).flatten(2))                      # (B, N, C)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)              # (B, A, N, C/A)


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    """The position-wise network of a transformer block, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        # The identity stands where the official model has a dropout, and keeps its key numbers.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the prompt, feed-forward; each on a normalised residual."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)                                              # (B, N, C)
        x = x + self.attn2(self.norm2(x), c)                                  # (B, N, C)
        return x + self.ff(self.norm3(x))                                     # (B, N, C)


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, as a residual."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        # 1e-6 here and PyTorch's 1e-5 in ResBlock: so the official weights were trained.
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, config.context_dim, config.num_heads)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x))                                        # (B, C, H, W)
        h = h.flatten(2).transpose(1, 2)                                      # (B, N, C)
        for block in self.transformer_blocks:
            h = block(h, c)                                                   # (B, N, C)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])                       # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves the sides with a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles the sides by repeating every position, then convolves."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Sequential):
    """Layers in a row, each given what it asks for beside the features: time, prompt or neither."""

    def forward(self, h: Tensor, emb: Tensor, c: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, c)
            else:
                h = layer(h)
        return h


# ------------------------------------------------------------------------------- the network


class Encoder(nn.Module):
    """Time embedding, input blocks and middle block: what a UNet and a full guide have in common.
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        width = 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.input_blocks = nn.ModuleList(_input_blocks(config))
        middle = config.model_channels * config.channel_mult[-1]
        self.middle_block = Block(
            ResBlock(config, middle, middle),
            SpatialTransformer(config, middle),
            ResBlock(config, middle, middle))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, to which latents are cast: samplers and losses keep those in float32."""
        return self.time_embed[0].weight.dtype

    def embed_time(self, t: Tensor) -> Tensor:
        """Timesteps (B,), 0 to 999, whole or not, to their embedding (B, E)."""
        return self.time_embed(self.fourier(t))                               # (B, E)

    def fourier(self, x: Tensor) -> Tensor:
        """Numbers (B,) to their cosines and sines at `half` frequencies from 1 to 1 / 10,000."""
        half = self.config.model_channels // 2
        index = torch.arange(half, device=x.device, dtype=torch.float32)
        # In float32 whatever the weights are: in half precision t = 998 and 999 would be the same.
        angle = x.float()[:, None] * torch.exp(-math.log(10_000) / half * index)  # (B, half)
        return torch.cat([angle.cos(), angle.sin()], dim=1).to(self.dtype)    # (B, 2 · half)


class UNet(Encoder):
    """The noise predictor ε_φ(z_t, t, c): 12 input blocks, a middle, 12 output blocks in SD 1.5.

    ```
    side   channels   input blocks               output blocks                     attention
    64     320        0 conv   1   2   3 down    9   10   11                       yes
    32     640                 4   5   6 down    6   7    8 up                     yes
    16     1280                7   8   9 down    3   4    5 up                     yes
    8      1280                10  11            0   1    2 up                     middle only
    ```
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__(config)
        self.output_blocks = nn.ModuleList(_output_blocks(config))
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, config.model_channels),
            nn.SiLU(),
            _zero(nn.Conv2d(config.model_channels, config.out_channels, 3, padding=1)))

    def encode(self, z: Tensor, emb: Tensor, c: Tensor) -> list[Tensor]:
        """Latent z (B, 4, H, W), time embedding (B, E), prompt c (B, L, D) to features.

        These are the outputs of the input blocks, in order, which the decoder takes as skips, and
        last that of the middle block; `injection_channels` has their channels. H and W must be
        multiples of 2 ** (levels − 1): 8 in Stable Diffusion.
        """
        h, features = z.to(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb, c)
            features.append(h)
        return [*features, self.middle_block(h, emb, c)]

    def decode(self, features: list[Tensor], emb: Tensor, c: Tensor,
               residuals: list[Tensor] | None = None) -> Tensor:
        """What `encode` returned, and a guide's residuals (Eq. 4), to predicted noise (B, 4, H, W).

        There is one residual a feature, of its shape or (B, C, 1, 1). Raises ValueError where their
        number is another. The list of features is not changed, so it may be decoded again.
        """
        if residuals is not None:
            features = [x + r.to(x.dtype) for x, r in zip(features, residuals, strict=True)]
        *skips, h = features
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb, c)
        return self.out(h)

    def forward(self, z: Tensor, t: Tensor, c: Tensor,
                residuals: list[Tensor] | None = None) -> Tensor:
        """Predicted noise (B, 4, H, W) in latent z at timesteps t (B,) under prompt c (B, L, D)."""
        emb = self.embed_time(t)
        return self.decode(self.encode(z, emb, c), emb, c, residuals)


def injection_channels(config: UNetConfig) -> list[int]:
    """Channels of each point a guide adds to: the skips in encoder order, then the middle.

    Thirteen in SD 1.5, the points of a ControlNet.
    """
    channels, last = [config.model_channels], len(config.channel_mult) - 1
    for level, mult in enumerate(config.channel_mult):
        blocks = config.num_res_blocks + (level < last)  # all but the last level end in Downsample
        channels += [config.model_channels * mult] * blocks
    return [*channels, channels[-1]]


def _input_blocks(config: UNetConfig) -> Iterator[Block]:
    channels = config.model_channels
    yield Block(nn.Conv2d(config.in_channels, channels, 3, padding=1))
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            c_in, channels = channels, config.model_channels * mult
            yield Block(*_res_and_attention(config, level, c_in, channels))
        if level < len(config.channel_mult) - 1:
            yield Block(Downsample(channels))


def _output_blocks(config: UNetConfig) -> Iterator[Block]:
    *skips, channels = injection_channels(config)
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for i in range(config.num_res_blocks + 1):      # one more than going down: for Downsample
            c_in = channels + skips.pop()
            channels = config.model_channels * mult
            layers = _res_and_attention(config, level, c_in, channels)
            if level > 0 and i == config.num_res_blocks:
                layers.append(Upsample(channels))
            yield Block(*layers)


def _res_and_attention(config: UNetConfig, level: int, c_in: int, c_out: int) -> list[nn.Module]:
    attention = [SpatialTransformer(config, c_out)] if config.attention[level] else []
    return [ResBlock(config, c_in, c_out), *attention]


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Zeroes the last layer of a branch, so that a fresh network starts from its shortcuts."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ------------------------------------------------------------------------------- its other names


def folder_names(config: UNetConfig) -> dict[str, str]:
    """Names of the diffusers folder layout to those of the single file, which are ours.

    diffusers numbers blocks by level and kind; the single file has all of them in one row.
    """
    last, depth = len(config.channel_mult) - 1, config.num_res_blocks
    places = {f"mid_block.resnets.{i}.": f"middle_block.{2 * i}." for i in range(2)}
    places["mid_block.attentions.0."] = "middle_block.1."
    for level in range(last + 1):
        up = last - level                               # its decoder counts levels from the middle
        first_in, first_out = 1 + level * (depth + 1), up * (depth + 1)
        for i in range(depth + 1):
            for kind, place in (("resnets", 0), ("attentions", 1)):
                places[f"down_blocks.{level}.{kind}.{i}."] = f"input_blocks.{first_in + i}.{place}."
                places[f"up_blocks.{up}.{kind}.{i}."] = f"output_blocks.{first_out + i}.{place}."
        places[f"down_blocks.{level}.downsamplers.0.conv."] = (
            f"input_blocks.{first_in + depth}.0.op.")
        places[f"up_blocks.{up}.upsamplers.0."] = (
            f"output_blocks.{first_out + depth}.{1 + config.attention[level]}.")
    layers = {
        "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.",
        "norm2.": "out_layers.0.", "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection."}
    names = {}
    for theirs, ours in places.items():
        inner = layers if ".resnets." in theirs else {"": ""}
        names |= {theirs + k: ours + v for k, v in inner.items()}
    return names | {
        "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
        "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."}
