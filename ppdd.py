"""Plug-and-Play Diffusion Distillation (Hsiao et al., CVPR 2024): one function an equation.

Classifier-free guidance runs the UNet twice a step. PPDD leaves the UNet frozen and trains a small
*guide* that adds feature maps to the UNet's decoder, so that one pass gives the guided prediction;
then it halves the number of sampling steps again and again, training the guide only.

Symbols, as in the paper:

    z_t, x, ε    noisy latent, clean latent, standard normal noise; z_t = α_t x + σ_t ε
    c, ∅         states of the prompt, and of the empty (or a negative) prompt
    ε_φ, G_θ     the frozen UNet, the guide
    g            guidance number of Eq. 3: g = 0 is no guidance; elsewhere "guidance scale" is 1 + g

Shapes: B batch, Z latent channels, H and W sides of the latent, L tokens, D width of a token,
E width of a time embedding, C width of the tiny guide, N sampling steps.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clip_text import PART as TEXT_PART
from clip_text import TextEncoder, Tokenizer, embed, load_text_encoder
from unet import PART as UNET_PART
from unet import (
    CheckpointError,
    Encoder,
    Misfit,
    UNet,
    UNetConfig,
    build,
    injection_channels,
    load_strict,
    load_unet,
    lora_scale,
    merge_lora,
    normal,
    read_config,
    read_file,
)
from vae import PART as VAE_PART
from vae import VAE, load_vae

TIMESTEPS = 1000
G_SCALE = 10.0   # guides are told g / G_SCALE, a number of order one


# ------------------------------------------------------------------------------- noise and steps

def _alphas_bar() -> Tensor:
    """ᾱ_t of SD 1.5, t = −1 … 999 (so entry t + 1): β from 0.00085 to 0.012, linear in √β."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


ALPHA, SIGMA = _alphas_bar().sqrt(), (1 - _alphas_bar()).sqrt()


def alpha_sigma(t: int | Tensor) -> tuple:
    """(α_t, σ_t): two numbers for an int t, two (B, 1, 1, 1) float32 tensors for timesteps (B,).

    t = −1 is the clean end: α = 1, σ = 0.
    """
    if isinstance(t, int):
        return ALPHA[t + 1].item(), SIGMA[t + 1].item()
    return tuple(v[t + 1].view(-1, 1, 1, 1) for v in _schedule(t.device))


@functools.cache
def _schedule(device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables on a device, kept there: no update waits for a copy."""
    return ALPHA.to(device, torch.float32), SIGMA.to(device, torch.float32)


def step_grid(steps: int) -> list[int]:
    """The N + 1 timesteps t_i = round(1000 i / N) − 1 for i = N … 0, from 999 down to −1.

    "Trailing" spacing: it starts at full noise, and the grid of N / 2 steps is every second entry
    of this one, which halving needs (Section 4.4).
    """
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"steps is {steps}: it must be from 1 to {TIMESTEPS}")
    return [round(TIMESTEPS * i / steps) - 1 for i in range(steps, -1, -1)]


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = α_t x + σ_t ε, all (B, Z, H, W), t (B,)."""
    alpha, sigma = alpha_sigma(t)
    return alpha * x + sigma * noise


def ddim_step(z: Tensor, eps: Tensor, t: int | Tensor, s: int | Tensor) -> Tensor:
    """Eq. 2: x̂ = (z_t − σ_t ε̂) / α_t, then z_s = α_s x̂ + σ_s ε̂."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    x = (z - sigma_t * eps) / alpha_t
    return alpha_s * x + sigma_s * eps


def ddim(predict: Callable[[Tensor, int], Tensor], z: Tensor, grid: list[int]) -> Tensor:
    """DDIM along the grid; predict(z, i) is ε̂ at the grid's i-th timestep. N passes."""
    for i, (t, s) in enumerate(pairwise(grid)):
        z = ddim_step(z, predict(z, i), t, s)
    return z


# Adams-Bashforth weights of the newest prediction, the one before it, …
_PLMS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12),
         4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def plms(predict: Callable[[Tensor, int], Tensor], z: Tensor, grid: list[int]) -> Tensor:
    """PLMS (Liu et al., 2022, without Runge-Kutta steps): DDIM along a mean of the last four ε̂.

    The first step is taken twice, the second time with the mean of both its ends. N + 1 passes.
    """
    past: list[Tensor] = []                                                # newest first
    for i, (t, s) in enumerate(pairwise(grid)):
        past = [predict(z, i), *past[:3]]
        eps = sum(w * e for w, e in zip(_PLMS[len(past)], past))
        if i == 0 and s >= 0:
            eps = (eps + predict(ddim_step(z, eps, t, s), 1)) / 2
        z = ddim_step(z, eps, t, s)
    return z


SAMPLERS = {"ddim": ddim, "plms": plms}


# ------------------------------------------------------------------------------- guidance, Eq. 3

def cfg(eps_c: Tensor, eps_empty: Tensor, g: float | Tensor) -> Tensor:
    """Eq. 3: ε̃ = (1 + g) ε_φ(z_t, c) − g ε_φ(z_t, ∅), on every channel; g a number or (B,)."""
    if isinstance(g, Tensor):
        g = g.view(-1, 1, 1, 1)
    return (1 + g) * eps_c - g * eps_empty


# ------------------------------------------------------------------------------- the guides

@dataclass(frozen=True)
class GuideConfig:
    """What a guide is; with the base's `UNetConfig` it fixes every shape.

    width   C of the tiny guide; 0 takes 2 · model_channels: 640 for SD 1.5, 8,273,920 parameters
    pool    how the tiny guide turns L tokens into one vector, which Eq. 5 leaves open: "mean",
            "end" (the end-of-text token) or "attention" (`queries` learned queries, each with
            its own share of the C channels)
    form    "sum" is Eq. 5; in "product" g multiplies what the timestep and the text say; in
            "gated" the text scales what g and the timestep say, so that all three interact
    hint    channels of the full guide's first hint convolutions; 0 takes model_channels / 20:
            ControlNet's 16 for SD 1.5
    """

    kind: str = "tiny"
    width: int = 0
    pool: str = "attention"
    queries: int = 16
    form: str = "sum"
    hint: int = 0


class TinyGuide(nn.Module):
    """Eq. 5: y = Z(γ + Z(c_timestep; Θ_z1) + Z(c_text; Θ_z2); Θ_z3), one Θ_z3 an injection point.

    Z is a 1×1 convolution; on a vector that is a linear layer. z_t never enters, so the y of all
    steps of a run can be had in one call, before the first. γ is g / 10.
    """

    def __init__(self, base: UNetConfig, config: GuideConfig = GuideConfig()):
        super().__init__()
        self.config, self.guide_config = base, config
        width = config.width or 2 * base.model_channels
        self.theta_z1 = nn.Linear(4 * base.model_channels, width, bias=False)
        self.theta_z2 = nn.Linear(base.context_dim, width, bias=False)
        self.theta_z3 = nn.ModuleList(
            nn.Linear(width, channels, bias=False) for channels in injection_channels(base))
        # Only Θ_z3 starts at 0. Were Θ_z1 and Θ_z2 to start there too, every channel of the sum
        # would be the same number with the same gradient, for ever: a guide of width 1.
        for layer in self.theta_z3:
            nn.init.zeros_(layer.weight)
        if config.pool == "attention":
            if width % config.queries:
                raise CheckpointError(f"queries is {config.queries}: it must divide {width}")
            self.query = nn.Parameter(normal(config.queries, base.context_dim, std=0.1))
        elif config.pool not in ("mean", "end"):
            raise CheckpointError(f"pool is {config.pool!r}: use attention, mean or end")
        if config.form not in ("sum", "product", "gated"):
            raise CheckpointError(f"form is {config.form!r}: use sum, product or gated")

    def start_from(self, unet: UNet) -> None:
        """A fresh tiny guide takes nothing from the base."""

    def read_text(self, c: Tensor) -> Tensor:
        """Z(c_text; Θ_z2): states (B, L, D) to (B, C)."""
        if self.guide_config.pool == "mean":
            return self.theta_z2(c.mean(1))
        if self.guide_config.pool == "end":
            return self.theta_z2(c[:, -1])        # padded with it, the last is an end-of-text token
        share = torch.softmax(c @ self.query.T, dim=1)                          # (B, L, Q)
        pooled = share.mT @ c                                                   # (B, Q, D)
        weight = self.theta_z2.weight.view(len(self.query), -1, c.shape[-1])    # (Q, C/Q, D)
        return torch.einsum("bqd,qkd->bqk", pooled, weight).flatten(1)          # (B, C)

    def forward(self, g: Tensor, emb: Tensor, c: Tensor, z: Tensor | None = None,
                t: Tensor | None = None) -> list[Tensor]:
        """Guidance g (B,), base's time embedding (B, E), prompt c (B, L, D) to 13 (B, C_i, 1, 1).

        Times of a whole run, (N, 1, E), give 13 (N, B, C_i, 1, 1). z and t are not read: they are
        there for the sake of one interface.
        """
        time, text = self.theta_z1(emb), self.read_text(c)                     # (…, B, C), (B, C)
        gamma = (g / G_SCALE)[:, None].to(time)                                # (B, 1)
        h = gamma + (time + text)                                              # (…, B, C), Eq. 5
        if self.guide_config.form == "product":
            h = gamma * (1 + (time + text))
        if self.guide_config.form == "gated":
            h = (gamma + time) * (1 + text)
        return [theta(h)[..., None, None] for theta in self.theta_z3]

    def cues(self, g: Tensor, embs: Tensor, times: Tensor, c: Tensor, z: Tensor) -> list[tuple]:
        """What is known of a run's N steps before the first of them: here, all features.

        g (B,) or (1,), embs (N, E) of the base, times (N,), c (B, L, D), z like those to come.
        """
        return list(zip(*self(g, embs[:, None], c)))

    def features(self, cue: tuple, z: Tensor) -> tuple[Tensor, ...]:
        """y at latents z (B, Z, H, W) of the step whose cue this is."""
        return cue


class FullGuide(Encoder):
    """Fig. 4a, a ControlNet: the base's encoder once more, a hint encoder, zero convolutions.

    Names are ControlNet's own. The hint is g / 10 broadcast to a picture of eight times the
    latent's sides; what becomes of it depends on g alone, so it too is computed once a run.
    """

    def __init__(self, base: UNetConfig, config: GuideConfig = GuideConfig(kind="full")):
        super().__init__(base)
        self.guide_config, channels = config, injection_channels(base)
        hint = config.hint or round(base.model_channels / 20)
        self.input_hint_block = _hint_encoder(hint, base.model_channels)
        self.zero_convs = nn.ModuleList(nn.Sequential(_zero_conv(ch)) for ch in channels[:-1])
        self.middle_block_out = nn.Sequential(_zero_conv(channels[-1]))

    def start_from(self, unet: UNet) -> None:
        """Copies the base's encoder: the zero convolutions still make every output 0."""
        encoder = {k: v for k, v in unet.state_dict().items()
                   if k.startswith(("time_embed.", "input_blocks.", "middle_block."))}
        self.load_state_dict(encoder, strict=False)

    def hint(self, g: Tensor, z: Tensor) -> Tensor:
        """Guidance g (B,) to the hint's features (B, model_channels, H, W) for latents like z."""
        plain = (g / G_SCALE).to(z).view(-1, 1, 1, 1)
        return self.input_hint_block(plain.expand(-1, 3, 8 * z.shape[2], 8 * z.shape[3]))

    def forward(self, g: Tensor | None, emb: Tensor, c: Tensor, z: Tensor,
                t: Tensor | None = None, hint: Tensor | None = None) -> list[Tensor]:
        """As `TinyGuide.forward`, and latents z (B, Z, H, W); y has the shapes of the skips.

        t (B,) are the timesteps, from which it makes its own time embedding (emb is the base's);
        hint is what `hint` returned, where that is known already.
        """
        emb = emb if t is None else self.embed_time(t)
        h, features = z, []
        for i, block in enumerate(self.input_blocks):
            h = block(h, emb, c)
            if i == 0:
                h = h + (self.hint(g, z) if hint is None else hint)
            features.append(h)
        features.append(self.middle_block(h, emb, c))
        return [conv(f) for conv, f in zip([*self.zero_convs, self.middle_block_out], features)]

    def cues(self, g: Tensor, embs: Tensor, times: Tensor, c: Tensor, z: Tensor) -> list[tuple]:
        """As `TinyGuide.cues`: its own projections of time and prompt, and the hint."""
        own, prompt = self.prepare(self.embed_time(times), c)
        hint = self.hint(g, z)
        return [(emb, prompt, hint) for emb in own]

    def features(self, cue: tuple, z: Tensor) -> list[Tensor]:
        """y at latents z (B, Z, H, W) of the step whose cue this is."""
        emb, c, hint = cue
        return self(None, emb, c, z, hint=hint)


def _zero_conv(channels: int, c_in: int | None = None) -> nn.Conv2d:
    conv = nn.Conv2d(c_in or channels, channels, 3 if c_in else 1, padding=1 if c_in else 0)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def _hint_encoder(width: int, channels: int) -> nn.Sequential:
    """Eight 3×3 convolutions from 3 channels at picture size to `channels` at latent size.

    With width 16 these are ControlNet's 16, 32, 96 and 256 channels.
    """
    layers, c_in = [], 3
    for multiple, stride in ((1, 1), (1, 1), (2, 2), (2, 1), (6, 2), (6, 1), (16, 2)):
        layers += [nn.Conv2d(c_in, multiple * width, 3, stride, padding=1), nn.SiLU()]
        c_in = multiple * width
    return nn.Sequential(*layers, _zero_conv(channels, c_in))


# ------------------------------------------------------------------------------- the losses

@dataclass
class Distilled:
    """What one distillation step yields: the loss, and the share of the correction unexplained."""

    loss: Tensor           # mean over the batch, with gradients
    error: Tensor          # (B,) ‖e − e_teacher‖²
    correction: Tensor     # (B,) ‖ε_c − e_teacher‖², what no guide at all would leave
    target: Tensor         # (B, Z, H, W) e_teacher: a DDIM step with it is the teacher's own

    @property
    def unexplained(self) -> Tensor:
        """‖e − e_teacher‖² / ‖ε_c − e_teacher‖²: 1 for a fresh guide, 0 for a perfect one."""
        return self.error.sum() / self.correction.sum()


def _compare(e: Tensor, e_teacher: Tensor, eps_c: Tensor,
             weight: Tensor | float = 1.0) -> Distilled:
    error = (e.float() - e_teacher).square().mean((1, 2, 3))                   # (B,)
    correction = (eps_c - e_teacher).square().mean((1, 2, 3))
    return Distilled((weight * error).mean(), error.detach(), correction, e_teacher)


def cfg_distillation(unet: UNet, guide: nn.Module, z: Tensor, t: Tensor, c: Tensor, empty: Tensor,
                     g: Tensor, weight: Callable | None = None) -> Distilled:
    """Algorithm 1: L = ‖e_teacher − e‖², t and g one a sample.

    z (B, Z, H, W), t (B,), c and empty (B, L, D), g (B,). The teacher's two passes are one batch.
    The guide touches only the decoder, so the student's encoder pass is that batch's first half;
    nothing before the decoder holds a gradient. weight(t) weighs the squared ε error; the paper's
    does not.
    """
    with torch.no_grad():
        emb = unet.embed_time(t)
        both = torch.cat([emb, emb]), torch.cat([c, empty])
        skips, h = unet.encode(torch.cat([z, z]), *both)
        eps_c, eps_empty = unet.decode(skips, h, *both).float().chunk(2)
        e_teacher = cfg(eps_c, eps_empty, g)                                   # Eq. 3
        skips, h = [skip[:len(z)] for skip in skips], h[:len(z)]
    y = guide(g, emb, c, z, t)
    return _compare(unet.decode(skips, h, emb, c, y), e_teacher, eps_c,        # Eq. 4
                    weight(t) if weight else 1.0)


def halving_target(z: Tensor, z_end: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
    """Section 4.4: the one ε̂* whose single DDIM step from z_t lands on the teacher's z″ at t″.

    x̂* = (z″ − (σ_t″ / σ_t) z_t) / (α_t″ − (σ_t″ / σ_t) α_t) and ε̂* = (z_t − α_t x̂*) / σ_t.
    """
    (alpha, sigma), (alpha_end, sigma_end) = alpha_sigma(t), alpha_sigma(t_end)
    x = (z_end - sigma_end / sigma * z) / (alpha_end - sigma_end / sigma * alpha)
    return (z - alpha * x) / sigma


def truncated_snr(t: Tensor) -> Tensor:
    """(B,) weight of the ε error that makes it Salimans & Ho's max(α²/σ², 1) on the x̂ error."""
    alpha, sigma = alpha_sigma(t)
    return torch.maximum(sigma / alpha, torch.ones_like(alpha)).square().flatten()


def root_snr(t: Tensor) -> Tensor:
    """(B,) weight halfway, in its logarithm, from the plain ε error to truncated SNR."""
    return truncated_snr(t).sqrt()


def halving(unet: UNet, guide: nn.Module, teacher: nn.Module, z: Tensor, t: Tensor, t_mid: Tensor,
            t_end: Tensor, c: Tensor, g: Tensor, weight: Callable | None = None) -> Distilled:
    """Section 4.4: one step of the guide learns what two DDIM steps t → t′ → t″ of the teacher do.

    Teacher and student share the base's encoder pass at t. weight is `cfg_distillation`'s.
    """
    with torch.no_grad():
        emb, emb_mid = unet.embed_time(t), unet.embed_time(t_mid)
        skips, h = unet.encode(z, emb, c)
        eps_c = unet.decode(skips, h, emb, c).float()
        y = teacher(g, emb, c, z, t)
        z_mid = ddim_step(z, unet.decode(skips, h, emb, c, y).float(), t, t_mid).to(z.dtype)
        y = teacher(g, emb_mid, c, z_mid, t_mid)
        eps_mid = unet.decode(*unet.encode(z_mid, emb_mid, c), emb_mid, c, y).float()
        target = halving_target(z, ddim_step(z_mid, eps_mid, t_mid, t_end), t, t_end)
    y = guide(g, emb, c, z, t)
    return _compare(unet.decode(skips, h, emb, c, y), target, eps_c, weight(t) if weight else 1.0)


# ------------------------------------------------------------------------------- sampling

def predict(unet: UNet, z: Tensor, emb: dict, c: dict, g: Tensor, guide: nn.Module | None = None,
            cue: tuple | None = None, twice: bool = False) -> Tensor:
    """ε̂ (B, Z, H, W), float32, at one step of a run, for which emb, c and cue were prepared.

    With a guide Eq. 4; twice is Eq. 3, both passes as one batch, and c is then of 2 B prompts.
    g (1,) is a tensor and nothing here waits for the device: compiled, this serves any g, prompt
    and noise of the same shape.
    """
    y = None if guide is None else guide.features(cue, z)
    z = torch.cat([z, z]) if twice else z
    eps = unet.decode(*unet.encode(z, emb, c), emb, c, y).float()
    return cfg(*eps.chunk(2), g) if twice else eps


@torch.no_grad()
def sample(unet: UNet, z: Tensor, c: Tensor, g: float, steps: int, guide: nn.Module | None = None,
           empty: Tensor | None = None, sampler: str = "ddim",
           progress: Callable[[], object] = lambda: None,
           predict: Callable[..., Tensor] = predict) -> Tensor:
    """Latents (B, Z, H, W) from standard normal noise z, float32, under prompts c (B, L, D).

    With a guide one pass a step (Eq. 4); with `empty` (B, L, D) CFG, two passes as one batch
    (Eq. 3); with neither no guidance. g is Eq. 3's: 0 is none. progress() is called
    once a prediction; predict is the function of that name, or the same compiled.

    What no step changes, all that times, prompt and g say to the layers, is computed once, first.
    """
    dtype, grid = next(unet.parameters()).dtype, step_grid(steps)
    twice = guide is None and empty is not None
    times = torch.tensor(grid[:-1], device=z.device)
    embs = unet.embed_time(times)                                              # (N, E)
    guidance = torch.full((1,), g, dtype=torch.float32, device=z.device)
    cues = guide.cues(guidance, embs, times, c, z.to(dtype)) if guide else [None] * steps
    embs, prompt = unet.prepare(embs, torch.cat([c, empty]) if twice else c)

    def at_step(z: Tensor, i: int) -> Tensor:
        progress()
        return predict(unet, z.to(dtype), embs[i], prompt, guidance, guide, cues[i], twice)

    return SAMPLERS[sampler](at_step, z, grid)


def noise(seeds: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (B, *shape), float32: one CPU generator a seed, one seed a picture.

    So neither batch nor device changes a picture, and the noise is diffusers' for the same seed.
    """
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


# ------------------------------------------------------------------------------- the base, files

@dataclass
class Base:
    """A frozen Stable Diffusion: three networks, the tokenizer, and where they came from."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    tokenizer: Tokenizer
    path: Path
    loras: tuple[tuple[Path, float], ...] = ()                 # files merged into it, and scales

    @property
    def name(self) -> str:
        """`base_name`, and the names of LoRAs that were merged, each after a +."""
        return "+".join([base_name(self.path), *(path.stem for path, _ in self.loras)])

    def embed(self, texts: list[str]) -> Tensor:
        """Prompts to states (B, 77, D)."""
        return embed(self.text, self.tokenizer, texts)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, Z, H / 8, W / 8) to pictures (B, 3, H, W) uint8.

        As many at a time as make up one of 512 × 512, so that memory stays flat. float16 can
        overflow in the VAE: a picture that is not finite is decoded again in float32.
        """
        dtype, pictures = next(self.vae.parameters()).dtype, []
        for latents in z.split(max(1, 64 * 64 // z[0, 0].numel())):
            x = self.vae.decode(latents.to(dtype)).float()
            if dtype == torch.float16 and (bad := ~x.flatten(1).isfinite().all(1)).any():
                x[bad] = self.vae.float().decode(latents[bad].float())
                self.vae.to(dtype)
            pictures.append(((x / 2 + 0.5).clamp(0, 1) * 255).round().byte())
        return torch.cat(pictures)


def base_name(path: Path) -> str:
    """The file's or folder's name; the repository's for a snapshot in a Hugging Face cache."""
    if path.parent.name == "snapshots":
        return path.parent.parent.name.split("--")[-1]
    return path.stem if path.is_file() else path.resolve().name


MINI = Path(__file__).resolve().parent / "mini" / "mini.safetensors"
HUB_NAMES = ("models--stable-diffusion-v1-5--stable-diffusion-v1-5",
             "models--runwayml--stable-diffusion-v1-5",
             "models--Comfy-Org--stable-diffusion-v1-5-archive")
NO_WEIGHTS = ("base: the bundled miniature, as no Stable Diffusion 1.5 was found: put "
              "v1-5-pruned-emaonly.safetensors into ./weights, or pass it with --weights FILE "
              "(from huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5)")


def find_weights(given: str | Path | None = None) -> Path:
    """The base given, else one in ./weights or in the Hugging Face cache, else the miniature."""
    if given == "mini":
        return MINI
    if given:
        return Path(os.path.expanduser(given))
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    hub = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or f"{home}/hub"))
    snapshots = [s for name in HUB_NAMES for s in sorted((hub / name / "snapshots").glob("*"))]
    for folder in (Path("weights"), *snapshots):
        files = sorted(folder.glob("*.safetensors"))
        whole = [f for f in files if folder.name == "weights" or "v1-5" in f.name]
        inside = "*" if folder.name == "weights" else "*.safetensors"  # a snapshot may be partial
        for candidate in (*whole, folder, *sorted(folder.glob("*/"))):
            if candidate.is_file() or all(any((candidate / part).glob(inside))
                                          for part in ("unet", "vae")):
                return candidate
    return MINI


def say_base(path: Path, given: str | Path) -> str:
    """A line on the base that find_weights(given) found, and on how to get another."""
    return NO_WEIGHTS if path == MINI and not given else f"base: {path}"


def load_base(path: Path, dtype: torch.dtype = torch.float32,
              device: str | torch.device = "cpu") -> Base:
    """All three networks of a checkpoint, frozen. Raises CheckpointError with one sentence."""
    unet, vae = (laid_out(load(path, dtype, device)) for load in (load_unet, load_vae))
    return Base(unet, vae, load_text_encoder(path, dtype, device), Tokenizer(), Path(path))


def laid_out(module: nn.Module) -> nn.Module:
    """With channels last on a GPU, as its tensor cores take them; on a CPU that gains nothing."""
    on_gpu = next(module.parameters()).is_cuda
    return module.to(memory_format=torch.channels_last) if on_gpu else module


class PackedConv2d(nn.Conv2d):
    """A frozen convolution whose weights lie in the order in which a CPU's kernel reads them.

    Conv2d has oneDNN reorder them at every call, which weighs the more, the smaller the input is.
    The best order depends on the sides of the input, not on the batch.
    """

    sides: tuple[int, ...] = ()                                # those it is packed for

    def forward(self, x: Tensor) -> Tensor:
        how = self.padding, self.stride, self.dilation, self.groups
        if x.shape[2:] != self.sides:
            weight = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *how, [1, *x.shape[1:]])
            self.weight, self.sides = nn.Parameter(weight, requires_grad=False), x.shape[2:]
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *how, "none", [], "")


def pack(*modules: nn.Module) -> None:
    """Packs the convolutions of modules, for inference: they compute the same but for rounding.

    Only on a CPU, in float32 or bfloat16, where this PyTorch can; else they are left as they are.
    What is packed can't be trained, cast, merged with a LoRA, compiled or saved any more.
    """
    ops = torch.ops.mkldnn
    able = torch.backends.mkldnn.is_available() and hasattr(ops, "_convolution_pointwise")
    kinds = {torch.float32, *[torch.bfloat16] * (able and ops._is_mkldnn_bf16_supported())}
    for conv in (layer for module in modules for layer in module.modules()):
        if able and type(conv) is nn.Conv2d and conv.weight.is_cpu and conv.weight.dtype in kinds:
            conv.__class__ = PackedConv2d


def merge_loras(base: Base, given: Iterable[str]) -> list[str]:
    """Merges each "FILE" or "FILE:scale" into the base; returns a sentence on each, to print."""
    said = []
    for path, scale in map(lora_scale, given):
        unused = merge_lora(base.unet, base.text, path, scale)
        base.loras += ((path, scale),)
        names = ", ".join(unused[:3]) + ", …" * (len(unused) > 3)
        left = f"; {len(unused)} of its tensors have no place here: {names}" if unused else ""
        said.append(f"LoRA: {path}, merged at {scale:g}{left}")
    return said


def fingerprint(path: Path, loras: Iterable[tuple[Path, float]] = ()) -> str:
    """SHA-256 of a checkpoint file, hex, or of its networks' files where it is a folder.

    With a base's `loras`, of those too.
    """
    parts = ("unet", "vae", "text_encoder")
    files = [path] if path.is_file() else [
        file for part in parts for file in sorted(path.glob(f"{part}/*.safetensors"))]
    digest = hashlib.sha256(b"".join(b"%.9g" % scale for _, scale in loras))
    for file in [*files, *(file for file, _ in loras)]:
        with file.open("rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def build_guide(base: UNetConfig, config: GuideConfig) -> nn.Module:
    kinds = {"tiny": TinyGuide, "full": FullGuide}
    if config.kind not in kinds:
        raise CheckpointError(f"guide kind {config.kind!r} is unknown: use tiny or full")
    return kinds[config.kind](base, config)


def save_base(path: str | Path, unet: UNet, vae: VAE, text: TextEncoder, **metadata: str) -> None:
    """One fp16 file in the official single-file layout, the networks' sizes in its metadata."""
    tensors: dict[str, Tensor] = {}
    for net, part, inner in (
            (unet, UNET_PART, ""), (vae, VAE_PART, ""), (text, TEXT_PART, "text_model.")):
        prefix = part.prefixes[0] + inner
        tensors |= {prefix + k: v.half() for k, v in net.state_dict().items()}
        metadata[part.config] = json.dumps(asdict(net.config))
    save_tensors(path, tensors, metadata)


def save_guide(path: Path, guide: nn.Module, config: GuideConfig, about: dict) -> None:
    """fp16 safetensors; metadata `guide` (its configuration), `about` (base, stage, …) and
    `unet_config` (the base's shape)."""
    tensors = {k: v.half() for k, v in guide.state_dict().items()}
    metadata = {"guide": asdict(config), "about": about, "unet_config": asdict(guide.config)}
    save_tensors(path, tensors, {key: json.dumps(value) for key, value in metadata.items()})


def read_about(path: Path) -> tuple[GuideConfig, dict]:
    """A guide file's configuration and what it says of itself, without its weights."""
    config, about, _ = _read_metadata(path)
    return config, about


def read_shape(path: Path) -> UNetConfig | None:
    """The shape of the base a guide was trained for; files of before it was noted say None."""
    return _read_metadata(path)[2]


def _read_metadata(path: str | Path) -> tuple[GuideConfig, dict, UNetConfig | None]:
    _, metadata = read_file(path, lambda names: {})
    try:
        config = read_config(GuideConfig, metadata["guide"], path)
        about = json.loads(metadata["about"])
        low, high = about.get("g_range") or (0, 1)
        if not (0 <= (about.get("steps") or 0) <= TIMESTEPS and math.isfinite(high - low)
                and isinstance(about.get("updates", 0), int)):
            raise ValueError("steps, g_range or updates")
        shape = metadata.get("unet_config")
        return config, about, None if shape is None else read_config(UNetConfig, shape, path)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a guide: pass a .safetensors that train.py saved"
                              ) from error


def load_guide(path: Path, base: UNetConfig, dtype: torch.dtype = torch.float32,
               device: str | torch.device = "cpu") -> nn.Module:
    """The guide in a file, for a base of the shape it was made for; eval mode, no gradients.

    Raises CheckpointError, with both shapes where the file notes its own.
    """
    config, _, shape = _read_metadata(path)
    if shape not in (None, base):
        there, here = asdict(shape), asdict(base)
        said = ", ".join(f"{k} {there[k]} and not {here[k]}" for k in here if there[k] != here[k])
        raise CheckpointError(f"{path} was trained for a base of another size ({said}): use it "
                              "with a checkpoint of that size, or train one for this")
    tensors, _ = read_file(path)
    guide = build(lambda: build_guide(base, config), path).to(dtype)
    try:
        load_strict(guide, tensors, path, device)
    except Misfit as error:
        raise CheckpointError(f"{path} was trained for a base of another size: use it with a "
                              f"checkpoint of that size, or train one for this") from error
    return laid_out(guide).eval().requires_grad_(False)


# ------------------------------------------------------------------------------- guides elsewhere

def residuals(guide: TinyGuide, unet: nn.Module, g: float, t: Tensor, c: Tensor) -> dict:
    """What a tiny guide adds, as the keyword arguments of diffusers' UNet2DConditionModel.

    unet is that model; t a timestep or (B,); c the prompt's states (B, L, D): unet(z, t,
    encoder_hidden_states=c, **residuals(guide, unet, g, t, c)).
    """
    t, gs = t.to(c.device).expand(len(c)), torch.full((len(c),), float(g), device=c.device)
    emb = unet.time_embedding(unet.time_proj(t).to(c.dtype))
    *down, middle = guide(gs, emb, c)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


# ------------------------------------------------------------------------------- keeping a run

def rank() -> int:
    """Which of torchrun's processes this is; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def quick_attention(device: torch.device | str) -> AbstractContextManager:
    """On a CPU, attention in plain matrix products: the fused kernel's backward is slow there."""
    if torch.device(device).type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def commit() -> str:
    """The commit of this checkout, "-dirty" where it has changes; "unknown" outside of git."""
    try:
        asked = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"],
                               cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def print_any_name() -> None:
    """Has stdout and stderr escape what their encoding lacks: names of files may hold that."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def auto_dtype(device: torch.device | str) -> str:
    """What suits a device: bf16 on a GPU with units for it, fp16 on an older one, else fp32."""
    if torch.device(device).type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"    # from Ampere


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or on a CPU."""
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return full or "can't allocate memory" in str(error)


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """A temporary name beside path, renamed to it at the end: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: str | Path, tensors: dict[str, Tensor],
                 metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that others may read: never half of it."""
    with written(path) as temporary:
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(tensors, temporary, metadata)
        temporary.chmod(0o644)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as named tensors, so that a checkpoint is plain safetensors."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{k}": v for i, entry in state.items() for k, v in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; other names are passed over."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, k = name.split(".", 2)
            state.setdefault(int(i), {})[k] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for p, entry in optimizer.state.items():     # laid out as p is, or the updates are slower
        entry |= {k: torch.empty_like(p).copy_(v) for k, v in entry.items() if v.shape == p.shape}
