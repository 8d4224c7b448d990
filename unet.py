"""The UNet of Stable Diffusion 1.5, and the reading of its checkpoints.

The paper leaves this network frozen: it is the teacher, and with a guide's features added it is the
student.  It is therefore cut where the method cuts it.  `encode` runs the input blocks and the
middle; `decode` runs the output blocks on the skips, to which a guide's `y` may be added.  Teacher
and student see the same latent, time and prompt in the encoder, so one `encode` serves both.

Modules carry the names of the official single-file checkpoint less `model.diffusion_model.`: its
keys are the state dict.  Names of the diffusers folder layout go through one table, `renames`.

Shapes: B batch, C channels, H and W rows and columns of the latent (an eighth of the image),
N = H * W positions, L tokens of the prompt, D width of a token, E = 4 * model_channels, A heads.
"""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# ------------------------------------------------------------------------------------ the network


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; the defaults are Stable Diffusion 1.5.

    `channel_mult` and `attention` have one entry a level, from full resolution down; each level
    halves the sides of the one before.  Channels are multiples of `norm_groups` and `num_heads`.
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
        if self.model_channels % self.num_heads or len(self.attention) != len(self.channel_mult):
            raise ValueError(f"num_heads {self.num_heads} or attention {self.attention} don't fit")


class ResBlock(nn.Module):
    """Two convolutions around a shift by the time embedding, beside a shortcut."""

    def __init__(self, config: UNetConfig, c_in: int, c_out: int):
        super().__init__()
        groups, emb_dim = config.norm_groups, 4 * config.model_channels
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, c_out),
            nn.SiLU(),
            nn.Identity(),  # the official model has a dropout here; it keeps the conv at index 3
            _zero(nn.Conv2d(c_out, c_out, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def shift(self, emb: Tensor) -> Tensor:
        return self.emb_layers(emb)[:, :, None, None]                             # (B, C, 1, 1)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        h = self.in_layers(x) + shift                                             # (B, C, H, W)
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention of image positions to what was read: themselves or the prompt."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context (B, L, D): two (B, A, L, C/A)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self._split(self.to_q(x))
        h = F.scaled_dot_product_attention(q, keys, values)                       # (B, A, N, C/A)
        return self.to_out(h.transpose(1, 2).flatten(2))                          # (B, N, C)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                  # (B, A, N, C/A)


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
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, *self.attn1.read(h))
        x = x + self.attn2(self.norm2(x), keys, values)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, as a residual."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, config.context_dim, config.num_heads)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = _zero(nn.Conv2d(channels, channels, 1))

    def read(self, c: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [block.attn2.read(c) for block in self.transformer_blocks]

    def forward(self, x: Tensor, read: list[tuple[Tensor, Tensor]]) -> Tensor:
        h = self.proj_in(self.norm(x))                                            # (B, C, H, W)
        h = h.flatten(2).transpose(1, 2)                                          # (B, N, C)
        for block, keys_values in zip(self.transformer_blocks, read):
            h = block(h, *keys_values)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])                           # (B, C, H, W)
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


class Stage(nn.Sequential):
    """Layers in a row, each given what it asks for beside the features: time, prompt or neither.

    Both are projected here, or looked up where `Encoder.prepare` has done that already.
    """

    def forward(self, h: Tensor, emb: Tensor | dict, c: Tensor | dict) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, layer.shift(emb) if isinstance(emb, Tensor) else emb[layer])
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, layer.read(c) if isinstance(c, Tensor) else c[layer])
            else:
                h = layer(h)
        return h


class Encoder(nn.Module):
    """Time embedding, input blocks and middle block: the half a UNet and a full guide share."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        width = 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.input_blocks = nn.ModuleList(_input_blocks(config))
        middle = config.model_channels * config.channel_mult[-1]
        self.middle_block = Stage(
            ResBlock(config, middle, middle),
            SpatialTransformer(config, middle),
            ResBlock(config, middle, middle),
        )

    def embed_time(self, t: Tensor) -> Tensor:
        """Timesteps (B,), 0 to 999, whole or not, to their embedding (B, E).

        The sinusoid is computed in float32, where neighbouring timesteps stay apart, and only then
        cast to the dtype of the weights.
        """
        half = self.config.model_channels // 2
        index = torch.arange(half, device=t.device, dtype=torch.float32)
        angle = t.float()[:, None] * torch.exp(-math.log(10_000) / half * index)  # (B, half)
        wave = torch.cat([angle.cos(), angle.sin()], dim=1)                       # (B, 2 * half)
        return self.time_embed(wave.to(self.time_embed[0].weight.dtype))          # (B, E)

    def prepare(self, embs: Tensor, c: Tensor) -> tuple[list[dict], dict]:
        """Embeddings (S, E) of S steps and prompt c (B, L, D), projected once for every layer.

        Returns S dictionaries to be given in place of emb, one a step, and one in place of c; by
        layer, they hold what it adds for the time, and its keys and values of the prompt.
        """
        shifts = {m: m.shift(embs).split(1) for m in self.modules() if isinstance(m, ResBlock)}
        read = {m: m.read(c) for m in self.modules() if isinstance(m, SpatialTransformer)}
        return [{m: shift[i] for m, shift in shifts.items()} for i in range(len(embs))], read

    def encode(
        self, z: Tensor, emb: Tensor | dict, c: Tensor | dict
    ) -> tuple[list[Tensor], Tensor]:
        """Latent z (B, 4, H, W), embedding emb (B, E), prompt c (B, L, D) to skips and middle.

        The skips are the outputs of the input blocks, in order: channels and count are those of
        `injection_channels`, whose last entry is the middle's.  H and W must be multiples of
        2 ** (levels - 1): 8 in Stable Diffusion, which is 64 pixels.  In place of emb and c this,
        and `decode`, takes what `prepare` made of them.
        """
        h, skips = z, []
        for block in self.input_blocks:
            h = block(h, emb, c)
            skips.append(h)
        return skips, self.middle_block(h, emb, c)


class UNet(Encoder):
    """The noise predictor eps(z_t, t, c): 12 input blocks, a middle and 12 output blocks in SD 1.5.

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
            _zero(nn.Conv2d(config.model_channels, config.out_channels, 3, padding=1)),
        )

    def decode(
        self, skips: list[Tensor], h: Tensor, emb: Tensor | dict, c: Tensor | dict,
        y: list[Tensor] | None = None,
    ) -> Tensor:
        """What `encode` returned, and a guide's features y, to the predicted noise (B, 4, H, W).

        y has one tensor a skip and, last, one for the middle, each of the shape it is added to or
        (B, C, 1, 1).  Neither `skips` nor `y` is changed, so both may be used again.  Raises
        ValueError where y has another length.
        """
        if y is not None:
            *skips, h = (x + g.to(x.dtype) for x, g in zip([*skips, h], y, strict=True))
        skips = list(skips)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, c)
        return self.out(h)

    def forward(self, z: Tensor, t: Tensor, c: Tensor, y: list[Tensor] | None = None) -> Tensor:
        """Predicted noise (B, 4, H, W) in latent z at timesteps t (B,) under prompt c (B, L, D)."""
        emb = self.embed_time(t)
        skips, h = self.encode(z, emb, c)
        return self.decode(skips, h, emb, c, y)


def injection_channels(config: UNetConfig) -> list[int]:
    """Channels of each point a guide may add to: the skips in encoder order, then the middle."""
    channels, last = [config.model_channels], len(config.channel_mult) - 1
    for level, mult in enumerate(config.channel_mult):
        blocks = config.num_res_blocks + (level < last)  # all but the last level end in Downsample
        channels += [config.model_channels * mult] * blocks
    return [*channels, channels[-1]]


def _input_blocks(config: UNetConfig) -> Iterable[Stage]:
    ch = config.model_channels
    yield Stage(nn.Conv2d(config.in_channels, ch, 3, padding=1))
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            c_in, ch = ch, config.model_channels * mult
            yield Stage(*_res_and_attention(config, level, c_in, ch))
        if level < len(config.channel_mult) - 1:
            yield Stage(Downsample(ch))


def _output_blocks(config: UNetConfig) -> Iterable[Stage]:
    *skips, ch = injection_channels(config)
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for i in range(config.num_res_blocks + 1):
            c_in, ch = ch + skips.pop(), config.model_channels * mult
            layers = _res_and_attention(config, level, c_in, ch)
            if level > 0 and i == config.num_res_blocks:
                layers.append(Upsample(ch))
            yield Stage(*layers)


def _res_and_attention(config: UNetConfig, level: int, c_in: int, c_out: int) -> list[nn.Module]:
    attention = [SpatialTransformer(config, c_out)] if config.attention[level] else []
    return [ResBlock(config, c_in, c_out), *attention]


def normal(*shape: int, std: float = 1.0) -> Tensor:
    """Normal random numbers; none on the meta device, where PyTorch imports SymPy to draw them."""
    numbers = torch.empty(shape)
    return numbers if numbers.is_meta else numbers.normal_(std=std)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Zeroes the last layer of a branch, so that a fresh network starts from its shortcuts."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# -------------------------------------------------------------------------------- its checkpoints


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message says what it is and what to pass instead."""


class Misfit(CheckpointError):
    """Tensors that are not those of the network that is to take them."""


@dataclass(frozen=True)
class Part:
    """Where one model lies: its keys in a single file, its folder and file in the other layout."""

    name: str
    prefixes: tuple[str, ...]
    folder: str
    stem: str
    config: str  # metadata key under which a single file may carry the model's sizes as JSON


PART = Part(
    "UNet", ("model.diffusion_model.",), "unet", "diffusion_pytorch_model", "unet_config"
)

_PICKLE = (  # the command runs no code of the pickle's
    "a pickle, which can run code when opened: pass a .safetensors file, or make one with "
    "python -c \"import torch, safetensors.torch as s; "
    "d = torch.load('FILE', 'cpu', weights_only=True); d = d.get('state_dict', d); "
    "s.save_file({k: v.clone() for k, v in d.items() if hasattr(v, 'dtype')}, "
    "'FILE.safetensors')\""
)
# What the first bytes of a file that is not a safetensors file say that it is.
_NOT_WEIGHTS = {
    b"PK\x03\x04": _PICKLE,
    b"\x80": _PICKLE,
    b"<": "a web page saved under a model's name: download the file itself",
    b"version https://git-lfs": "a Git LFS pointer, not the weights: run `git lfs pull` there",
}
_OTHER_BASES = {
    "conditioner.": "Stable Diffusion XL", "cond_stage_model.model.": "Stable Diffusion 2",
}
_ADD_ONS = {"lora": "a LoRA", "control": "a ControlNet"}
_OTHER_WIDTHS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}  # of the prompt's tokens


def load_unet(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: UNetConfig | None = None,
) -> UNet:
    """The frozen UNet of the checkpoint at `path`, a single file or a folder, in eval mode.

    Its sizes are `config`, else those stored in the file, else Stable Diffusion 1.5's.
    Raises CheckpointError where the checkpoint is not what it should be.
    """
    tensors, stored = read_checkpoint(path, PART)
    config = config or read_config(UNetConfig, stored, path)
    _refuse_other_unets(tensors, config, path)
    unet = build(lambda: UNet(config), path).to(dtype)
    load_strict(unet, rename(tensors, renames(config)), path, device)
    return unet.eval().requires_grad_(False)


def read_checkpoint(path: str | Path, part: Part) -> tuple[dict[str, Tensor], str]:
    """The tensors of one part of a checkpoint, less their prefix, and its stored configuration.

    `path` is a single .safetensors file, a folder with one subfolder a part, or that subfolder.
    Only the tensors asked for are read, memory mapped, in the dtype they have; no pickle is ever
    opened.  The configuration, for `read_config`, is "{}" unless a single file carries one.
    Raises CheckpointError.
    """
    path = Path(os.path.expanduser(path))
    if os.path.isdir(path):
        files, prefixes = _files_in_folder(path, part), ("",)
    else:
        files, prefixes = [path], part.prefixes
    tensors, config = {}, "{}"
    for file in files:
        found, metadata = read_file(
            file, lambda names, file=file: _select(file, names, part, prefixes))
        tensors |= found
        config = metadata.get(part.config, config)
    return tensors, config


def read_file(
    path: str | Path, choose: Callable[[list[str]], dict[str, str]] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, memory mapped; no pickle is ever opened.

    `choose` is given the names of all tensors, and returns those to read, each under the name to
    return it by; None reads all.  Raises CheckpointError, with the sentence that says what the file
    is.
    """
    path = Path(path)
    try:
        str(path).encode()
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise CheckpointError(f"{path} is not a file: pass a .safetensors file")
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            names = choose(names) if choose else dict(zip(names, names))
            tensors = {short: opened.get_tensor(name) for short, name in names.items()}
            return tensors, opened.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist: pass a .safetensors file or a model's folder"
        ) from error
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path!a} has a name that is not UTF-8: rename it") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror or error})") from error
    except SafetensorError as error:  # not sooner: a good file may begin with these bytes as well
        raise CheckpointError(f"{path} is {_what_it_is(path, error)}") from error


def read_config(kind: type, stored: str, source: str | Path):
    """The configuration of class `kind` that a file carries as JSON; "{}" is the default one.

    Raises CheckpointError where it is damaged, or speaks of settings that `kind` does not have.
    """
    try:
        default, values = kind(), json.loads(stored)
        for name, value in values.items():
            values[name] = value = tuple(value) if isinstance(value, list) else value
            usual = getattr(default, name)
            if not (_alike(value, usual) and _in_bounds(name, value)):
                raise ValueError(f"{name} is {value!r}")
        return kind(**values)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"{source} carries settings of a {kind.__name__} that can't be read ({error}): "
            "save it again, or pass a Stable Diffusion 1.5 checkpoint"
        ) from error


def _alike(value, usual) -> bool:
    """Whether a setting is of the type of its default, and finite where it is a fraction."""
    if isinstance(usual, tuple):
        return isinstance(value, tuple) and value != () and all(_alike(v, usual[0]) for v in value)
    if isinstance(usual, float):
        return isinstance(value, int | float) and math.isfinite(value) and value > 0
    return type(value) is type(usual)


def _in_bounds(name: str, value) -> bool:
    """Whether a size is one that could be meant, so that no time or memory goes into another."""
    if isinstance(value, tuple):
        return len(value) <= 8 and all(_in_bounds(name, v) for v in value)
    most = 64 if name in ("layers", "num_res_blocks") else 1 << 16
    return not isinstance(value, int) or 0 <= value <= most


def build(make: Callable[[], nn.Module], source: str | Path) -> nn.Module:
    """The network that `make` makes, on the meta device, for weights to be loaded into.

    That takes no memory and no random numbers.  Raises CheckpointError where it can't be made, with
    sizes that were read from a damaged file.
    """
    try:
        with torch.device("meta"):
            return make()
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except (ValueError, TypeError, RuntimeError, IndexError, ArithmeticError) as error:
        raise CheckpointError(
            f"{source} carries sizes that make no network ({error}): download it again, or pass "
            "another"
        ) from error


def load_strict(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path,
    device: torch.device | str | None = None,
) -> None:
    """Gives every parameter of `module` its tensor, cast to the parameter's dtype.

    A module on the meta device adopts the tensors: copied one at a time where dtype or `device`
    differ, otherwise not at all.  Any other module is filled in place.  1x1 convolutions accept the
    weight of a linear layer.  Raises Misfit, naming what is missing, unexpected or of another
    shape, and CheckpointError for numbers that are not finite, in the parameter's dtype; `source`
    is what the message calls the checkpoint.
    """
    wanted = module.state_dict()
    ready = {name: _fit(tensor, wanted.get(name), device) for name, tensor in tensors.items()}
    faults = {
        "missing": [n for n in wanted if n not in ready],
        "unexpected": [n for n in ready if n not in wanted],
        "not of numbers": [n for n in wanted if n in ready and not tensors[n].is_floating_point()],
        "of another shape": [
            f"{n} {tuple(ready[n].shape)} for {tuple(wanted[n].shape)}"
            for n in wanted if n in ready and ready[n].shape != wanted[n].shape
        ],
    }
    if any(faults.values()):
        found = "; ".join(_count(what, names) for what, names in faults.items() if names)
        raise Misfit(
            f"{source} does not fit {type(module).__name__} ({found}): "
            "pass a Stable Diffusion 1.5 checkpoint, or one of the sizes configured"
        )
    if broken := [name for name, tensor in ready.items() if not _is_finite(tensor)]:
        raise CheckpointError(
            f"{source} is damaged ({_count('with numbers that are not finite', broken)}): "
            "download it again, or pass another"
        )
    assign = all(p.is_meta for p in wanted.values())
    module.load_state_dict(ready, assign=assign)


def rename(tensors: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """The same tensors; in each name every left side of `table` gives way to its right side."""

    def new(name: str) -> str:
        for old, replacement in table.items():
            name = name.replace(old, replacement)
        return name

    return {new(name): tensor for name, tensor in tensors.items()}


def renames(config: UNetConfig) -> dict[str, str]:
    """Folder names to single-file names: numbered by level and kind there, in one row here."""
    levels, depth = range(len(config.channel_mult)), config.num_res_blocks
    places = {f"mid_block.resnets.{i}.": f"middle_block.{2 * i}." for i in range(2)}
    places["mid_block.attentions.0."] = "middle_block.1."
    for level in levels:
        up, attention = levels[-1] - level, config.attention[level]
        k, n = 1 + level * (depth + 1), up * (depth + 1)  # first input and output block here
        for i in range(depth + 1):
            for kind, place in (("resnets", 0), ("attentions", 1)):
                places[f"down_blocks.{level}.{kind}.{i}."] = f"input_blocks.{k + i}.{place}."
                places[f"up_blocks.{up}.{kind}.{i}."] = f"output_blocks.{n + i}.{place}."
        places[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{k + depth}.0.op."
        places[f"up_blocks.{up}.upsamplers.0."] = f"output_blocks.{n + depth}.{1 + attention}."
    layers = {
        "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.",
        "norm2.": "out_layers.0.", "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
    }
    table = {}
    for old, new in places.items():
        inner = layers if ".resnets." in old else {"": ""}
        table |= {old + theirs: new + ours for theirs, ours in inner.items()}
    return table | {
        "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
        "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
    }


def folder_name(name: str, table: Mapping[str, str]) -> str:
    """The folder layout's name of a single-file name: the table of `renames`, read backwards."""
    matches = (old + name[len(new):] for old, new in table.items() if name.startswith(new))
    return next(reversed([name, *matches]))  # where two match, the later is the narrower


def _select(path: Path, names: Iterable[str], part: Part, prefixes: tuple[str, ...]) -> dict:
    """The names that belong to `part`, by what is left of them without their prefix."""
    plain = {name.removeprefix("state_dict."): name for name in names}
    for mark, base in _OTHER_BASES.items():
        if any(name.startswith(mark) for name in plain):
            raise CheckpointError(f"{path} is {base}: pass a Stable Diffusion 1.5 checkpoint")
    chosen = {
        name[len(prefix):]: full
        for name, full in plain.items() for prefix in prefixes if name.startswith(prefix)
    }
    for mark, what in _ADD_ONS.items():
        if any(mark in name for name in chosen or plain):
            raise CheckpointError(
                f"{path} is {what}, an addition without the model it adds to: "
                "pass the Stable Diffusion 1.5 checkpoint itself"
            )
    if not chosen:
        raise CheckpointError(
            f"{path} holds no {part.name} (no tensor is named {' or '.join(prefixes)}…): "
            "pass a whole Stable Diffusion 1.5 checkpoint or its folder"
        )
    left_over = ("model_ema.", "loss.")  # of a part's own training, in some merges
    return {short: full for short, full in chosen.items() if not short.startswith(left_over)}


def _what_it_is(path: Path, error: Exception) -> str:
    """What a file that is not safetensors is, from its first bytes, and what to do about it."""
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    known = (what for start, what in _NOT_WEIGHTS.items() if head.startswith(start))
    unknown = f"cut short or not a safetensors file ({error}): download it again"
    return next(known, unknown).replace("FILE", str(path)) if head else "empty: download it again"


def _files_in_folder(path: Path, part: Part) -> list[Path]:
    """The part's files in a folder of the diffusers layout, full precision before fp16."""
    for folder in (path / part.folder, path):
        for variant in ("", ".fp16"):
            whole = folder / f"{part.stem}{variant}.safetensors"
            if whole.is_file():
                return [whole]
            index = folder / f"{part.stem}.safetensors.index{variant}.json"
            if index.is_file():
                return [folder / shard for shard in _shards(index)]
    raise CheckpointError(
        f"{path} has no {part.folder}/{part.stem}.safetensors: "
        "pass the folder of a whole model, saved as safetensors"
    )


def _shards(index: Path) -> list[str]:
    """The names of the files that an index speaks of, all in its own folder."""
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise ValueError("names of files are missing, or lead elsewhere")
        return shards
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} can't be read ({error}): download it again") from error


def _refuse_other_unets(
    tensors: Mapping[str, Tensor], config: UNetConfig, source: str | Path
) -> None:
    """Inpainting and other bases use the same names; the widths of two layers give them away."""
    for name, tensor in tensors.items():
        width = tensor.shape[1] if tensor.ndim > 1 else 0
        first = name in ("input_blocks.0.0.weight", "conv_in.weight")
        if first and width == 9 != config.in_channels:
            raise CheckpointError(
                f"{source} is an inpainting model, with 9 input channels: "
                "pass the Stable Diffusion 1.5 checkpoint for text to image"
            )
        prompt = name.endswith("attn2.to_k.weight")
        if prompt and width in _OTHER_WIDTHS and width != config.context_dim:
            base = _OTHER_WIDTHS[width]
            raise CheckpointError(f"{source} is {base}: pass a Stable Diffusion 1.5 checkpoint")


def _fit(tensor: Tensor, like: Tensor | None, device: torch.device | str | None) -> Tensor:
    """The tensor in the dtype of `like`; a linear weight (O, I) for a 1x1 one as (O, I, 1, 1)."""
    if like is None:
        return tensor
    if tensor.ndim == 2 and like.shape == (*tensor.shape, 1, 1):
        tensor = tensor[:, :, None, None]
    return tensor.to(device, like.dtype)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are: a sum shows it at the price of reading them once."""
    return tensor.is_meta or bool(tensor.sum(dtype=torch.float32).isfinite())


def _count(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"


# -------------------------------------------------------------------------------------- LoRA files

_LORA = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight")


def lora_scale(given: str) -> tuple[Path, float]:
    """The file and the scale of "FILE:scale", where "FILE" alone is 1."""
    file, _, scale = given.rpartition(":")
    try:
        file, factor = file, float(scale)
    except ValueError:
        file, factor = given, 1.0
    if not file or not abs(factor) <= 100:
        raise CheckpointError(f"LoRA {given!r}: FILE or FILE:scale, with a scale up to 100")
    return Path(os.path.expanduser(file)), factor


def merge_lora(unet: UNet, text: nn.Module, path: Path, scale: float = 1.0) -> list[str]:
    """Adds a LoRA file to a base's weights: W += scale · (alpha / rank) · up @ down.

    Linear layers and convolutions of `unet` and of the text encoder, in the names of kohya, of
    diffusers and peft, and of old diffusers. Returns the names of the tensors that no layer here
    has a place for. Raises CheckpointError, and changes nothing, where the file does not fit.
    """
    tensors, metadata = read_file(path)
    _refuse_other_loras(tensors, path)
    pairs, places = _lora_pairs(tensors), _places(unet, text)
    changes = {name: pair for name, pair in pairs.items() if name in places and len(pair) == 2}
    if not changes:
        raise CheckpointError(f"{path} holds no LoRA for a base of this kind: pass one for Stable "
                              "Diffusion 1.5")
    alphas = _lora_alphas(tensors, metadata, path)
    for layer, pair in changes.items():
        down, up, weight = tensors[pair["down"]], tensors[pair["up"]], places[layer].weight
        if min(down.ndim, up.ndim) < 2 or not 0 < len(down) == up[0].numel() or (
                len(up), down[0].numel()) != (len(weight), weight[0].numel()):
            raise CheckpointError(f"{path} is a LoRA for a base of another shape (layer {layer}): "
                                  "pass one for Stable Diffusion 1.5")
        factor = scale * alphas(layer, len(down)) / len(down)
        changes[layer] = factor, down, up
        if not (factor * (up.float().sum() + down.float().sum())).isfinite():
            raise CheckpointError(f"{path} holds numbers that are not finite (layer {layer}): "
                                  "download it again")
    for layer, (factor, down, up) in changes.items():        # replaced: the old may be mapped
        weight = places[layer].weight
        down, up = (half.to(weight.device, torch.float32).flatten(1) for half in (down, up))
        change = factor * (up @ down).view_as(weight)
        places[layer].weight = nn.Parameter((weight.float() + change).to(weight.dtype), False)
    used = {name for layer in changes for name in pairs[layer].values()}
    return [name for name in tensors if name not in used and not name.endswith(".alpha")]


def _refuse_other_loras(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError for what is no plain LoRA, or one of a base that is told by names."""
    other = ("hada_", "lokr_", "oft_", "dora_scale", "lora_magnitude", "lora_mid", "lora_bias")
    if any(mark in name for name in tensors for mark in other):
        raise CheckpointError(f"{path} is not a plain LoRA (but LoHa, LoKr, DoRA or the like): "
                              "merge it into a checkpoint with the tool that made it")
    if any(name.startswith(("lora_te2_", "text_encoder_2.")) for name in tensors):
        raise CheckpointError(f"{path} is a LoRA for Stable Diffusion XL: pass one for 1.5")


def _flat(layer: str) -> str:
    """A layer's name as all three ways of writing it have it in common: "unet_" or "text_" …"""
    name = layer.replace(".", "_").replace("_processor_", "_") + "_"
    name = re.sub("^(base_model_model|lora)_", "", name)
    if name.startswith(("te_", "te1_", "text_encoder_")):
        name = "text_" + re.sub("^(te1?|text_encoder)_(text_model_)?", "", name)
        return re.sub("attn_to_(q|k|v|out)_$", r"attn_\1_proj_", name)
    return "unet_" + re.sub("to_out_$", "to_out_0_", name.removeprefix("unet_"))


def _lora_pairs(tensors: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    """Of each layer, the names of its two halves."""
    pairs, half = defaultdict(dict), {"A": "down", "B": "up", "down": "down", "up": "up"}
    for name in tensors:
        if found := _LORA.fullmatch(name):
            pairs[_flat(found[1])][half[found[2]]] = name
    return pairs


def _lora_alphas(tensors: dict[str, Tensor], metadata: dict,
                 path: Path) -> Callable[[str, int], float]:
    """alpha of a layer of this rank: its tensor's, else the one peft wrote down, else the rank.

    Times √rank where peft wrote down that it is to be divided by √rank only.
    """
    said: dict[str, float] = {}
    stabilised = set()
    try:
        written = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        for part, short in (("unet", "unet"), ("text_encoder", "text")):
            for name, alpha in written.get(f"{part}.alpha_pattern", {}).items():
                said[_flat(f"{part}.{name}")] = float(alpha)
            if f"{part}.lora_alpha" in written:
                said[short] = float(written[f"{part}.lora_alpha"])
            if written.get(f"{part}.use_rslora"):
                stabilised.add(short)
        said |= {_flat(k[:-6]): v.item() for k, v in tensors.items() if k.endswith(".alpha")}
    except (ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{path} holds an alpha that can't be read ({error}): download it "
                              "again") from error

    def alpha(layer: str, rank: int) -> float:
        part, _, name = layer.partition("_")
        ends = (v for k, v in said.items() if f"_{name}".endswith(f"_{k.partition('_')[2]}")
                and k.startswith(f"{part}_"))
        return next(ends, said.get(part, rank)) * (rank**0.5 if part in stabilised else 1)

    return alpha


def _places(unet: UNet, text: nn.Module) -> dict[str, nn.Module]:
    """A base's layers by their `_flat` names, in the folder layout's spelling and in ours."""
    names = {f"unet.{name}": layer for name, layer in unet.named_modules()}
    table = renames(unet.config)
    names |= {f"unet.{folder_name(name + '.', table)[:-1]}": layer
              for name, layer in unet.named_modules()}
    names |= {f"text_encoder.{name}": layer for name, layer in text.named_modules()}
    return {_flat(name): layer for name, layer in names.items()
            if isinstance(layer, nn.Linear | nn.Conv2d)}
