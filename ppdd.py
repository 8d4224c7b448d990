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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unet import Encoder, UNet, UNetConfig, injection_channels

TIMESTEPS = 1000
# Guides are given g / 10. It is the same function up to the scale of the next layer's weights, and
# a number of order one, as that layer's initialisation expects.
G_SCALE = 10.0


# ------------------------------------------------------------------------------- noise and steps


def _alphas_bar() -> Tensor:
    """ᾱ_t of SD 1.5 for t = −1 … 999: β from 0.00085 to 0.012, linear in √β."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


# Entry t + 1 is timestep t, so that t = −1, the clean end, is entry 0: α = 1, σ = 0.
ALPHA = _alphas_bar().sqrt()
SIGMA = (1 - _alphas_bar()).sqrt()


def alpha_sigma(t: int | Tensor) -> tuple:
    """(α_t, σ_t): two numbers for an int t, two (B, 1, 1, 1) float32 tensors for timesteps (B,)."""
    if isinstance(t, int):
        return ALPHA[t + 1].item(), SIGMA[t + 1].item()
    alpha, sigma = _schedule_on(t.device)
    return alpha[t + 1].view(-1, 1, 1, 1), sigma[t + 1].view(-1, 1, 1, 1)


@functools.cache
def _schedule_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """Both tables on a device, kept there, so that no update waits for a copy."""
    return ALPHA.to(device, torch.float32), SIGMA.to(device, torch.float32)


def step_grid(steps: int) -> list[int]:
    """The N + 1 timesteps t_i = round(1000 i / N) − 1 for i = N … 0, from 999 down to −1.

    The paper does not give its grid. This spacing, called "trailing", starts at full noise, and the
    grid of N / 2 steps is every second entry of this one, which halving needs (Section 4.4).
    """
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"steps is {steps}: it must be from 1 to {TIMESTEPS}")
    return [round(TIMESTEPS * i / steps) - 1 for i in range(steps, -1, -1)]


def add_noise(x: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
    """z_t = α_t x + σ_t ε, all (B, Z, H, W), t (B,) or a number."""
    alpha, sigma = alpha_sigma(t)
    return alpha * x + sigma * noise


def ddim_step(z: Tensor, eps: Tensor, t: int | Tensor, s: int | Tensor) -> Tensor:
    """Eq. 2: x̂ = (z_t − σ_t ε̂) / α_t, then z_s = α_s x̂ + σ_s ε̂.

    The paper prints ε_φ where the second formula must have x̂.
    """
    alpha_t, sigma_t = alpha_sigma(t)
    alpha_s, sigma_s = alpha_sigma(s)
    x = (z - sigma_t * eps) / alpha_t
    return alpha_s * x + sigma_s * eps


def ddim(predict: Callable[[Tensor, int], Tensor], z: Tensor, grid: list[int]) -> Tensor:
    """DDIM along a grid of N + 1 timesteps; predict(z, t) is ε̂. N predictions."""
    for t, s in pairwise(grid):
        z = ddim_step(z, predict(z, t), t, s)
    return z


# Adams-Bashforth weights of the newest prediction, the one before it, and so on.
_PLMS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12),
         4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def plms(predict: Callable[[Tensor, int], Tensor], z: Tensor, grid: list[int]) -> Tensor:
    """PLMS (Liu et al., 2022, without Runge-Kutta steps): DDIM along a mean of the last four ε̂.

    The first step is taken twice, the second time with the mean of the predictions at its two
    ends. N + 1 predictions.
    """
    past: list[Tensor] = []                                                   # newest first
    for i, (t, s) in enumerate(pairwise(grid)):
        past = [predict(z, t), *past[:3]]
        eps = sum(w * e for w, e in zip(_PLMS[len(past)], past))
        if i == 0 and s >= 0:
            eps = (eps + predict(ddim_step(z, eps, t, s), s)) / 2
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
#
# A guide is called as guide(g, emb, c, z, t, features) and returns residuals, one for each of the
# UNet's injection points. What it reads of this:
#     tiny            g, the base's time embedding, c
#     tiny, seeing    the same, and the features of the frozen encoder
#     full            g, t (which it embeds itself), c, z_t


@dataclass(frozen=True)
class GuideConfig:
    """What a guide is; with the base's `UNetConfig` it fixes every shape.

    kind      "tiny" (Fig. 4b) or "full" (Fig. 4a)
    width     C of the tiny guide; 0 is 2 · model_channels: 640 for SD 1.5, which gives Eq. 5 the
              paper's 8.27 M parameters; or model_channels in the seeing form: 7.63 M
    queries   the tiny guide's queries, which turn L tokens into one vector; the paper leaves open
              how. Each makes its own share of the C channels
    form      "sum" is Eq. 5; in "gated" the text scales what g and the timestep say, so that all
              three interact; in "seeing" so do the encoder's features
    hint      channels of the full guide's first hint convolutions; 0 is model_channels / 20:
              ControlNet's 16 for SD 1.5
    """

    kind: str = "tiny"
    width: int = 0
    queries: int = 16
    form: str = "sum"
    hint: int = 0


FORMS = ("sum", "gated", "seeing")


class TinyGuide(nn.Module):
    """Eq. 5: y = Z(γ + Z(c_timestep; Θ_z1) + Z(c_text; Θ_z2); Θ_z3), one Θ_z3 an injection point.

    Z is a 1×1 convolution, which on a vector is a linear layer. z_t never enters, so the residuals
    of all steps of a run can be computed before the first. γ is g / 10.
    """

    def __init__(self, base: UNetConfig, config: GuideConfig = GuideConfig()):
        super().__init__()
        self.config, self.guide_config = base, config
        width = config.width or base.model_channels * (1 if config.form == "seeing" else 2)
        if width % config.queries:
            raise ValueError(f"queries is {config.queries}: it must divide the width, {width}")
        if config.form not in FORMS:
            raise ValueError(f"form is {config.form!r}: use {', '.join(FORMS)}")
        self.theta_z1 = nn.Linear(4 * base.model_channels, width, bias=False)
        self.theta_z2 = nn.Linear(base.context_dim, width, bias=False)
        self.theta_z3 = nn.ModuleList(
            nn.Linear(width, channels, bias=False) for channels in injection_channels(base))
        # The paper starts every Z at 0. If Θ_z1 and Θ_z2 did, all channels of a query's share would
        # be the same number with the same gradient for ever: a guide only as wide as it has
        # queries. One zero layer is enough to make a fresh guide change nothing.
        for layer in self.theta_z3:
            nn.init.zeros_(layer.weight)
        self.query = nn.Parameter(torch.empty(config.queries, base.context_dim))
        nn.init.normal_(self.query, std=0.1)      # small: the first pooling is nearly the mean

    def start_from(self, unet: UNet) -> None:
        """A fresh tiny guide takes nothing from the base."""

    def read_text(self, c: Tensor) -> Tensor:
        """Z(c_text; Θ_z2): states (B, L, D) to (B, C)."""
        attention = torch.softmax(c @ self.query.T, dim=1)                    # (B, L, Q)
        pooled = attention.mT @ c                                             # (B, Q, D)
        shares = self.theta_z2.weight.view(len(self.query), -1, c.shape[-1])  # (Q, C/Q, D)
        return torch.einsum("bqd,qkd->bqk", pooled, shares).flatten(1)        # (B, C)

    def mix(self, g: Tensor, emb: Tensor, c: Tensor) -> Tensor:
        """What Θ_z3 is given, (B, C), of guidance g (B,), the base's time embedding (B, E) and
        prompt c (B, L, D). Embeddings (N, 1, E) of a whole run give (N, B, C)."""
        time = self.theta_z1(emb)                                             # (…, B, C)
        text = self.read_text(c)                                              # (B, C)
        gamma = (g / G_SCALE)[:, None].to(time)                               # (B, 1)
        if self.guide_config.form == "sum":
            return gamma + (time + text)                                      # Eq. 5
        return (gamma + time) * (1 + text)

    def forward(self, g: Tensor, emb: Tensor, c: Tensor, *_: Tensor) -> list[Tensor]:
        """g (B,), emb (B, E) and c (B, L, D) to residuals; nothing else is read.

        They are vectors, (B, C_i, 1, 1): the same at every position. Embeddings (N, 1, E) of a
        whole run give (N, B, C_i, 1, 1).
        """
        h = self.mix(g, emb, c)
        return [theta(h)[..., None, None] for theta in self.theta_z3]


class SeeingGuide(TinyGuide):
    """Not in the paper: a tiny guide that also reads the features that it adds to.

    v = (γ + Z(c_timestep)) ⊙ (1 + Z(c_text)), the gated form's vector, is the same at every
    position, whatever the image shows. Here the frozen encoder's feature s_i, which the UNet has
    computed anyway, decides where it acts: y_i = Z(v ⊙ (1 + Z(norm(s_i); Θ_look,i)); Θ_z3,i).
    """

    def __init__(self, base: UNetConfig, config: GuideConfig = GuideConfig(form="seeing")):
        super().__init__(base, config)
        self.look = nn.ModuleList(nn.Linear(channels, self.theta_z1.out_features, bias=False)
                                  for channels in injection_channels(base))

    def add_sight(self, v: Tensor, features: list[Tensor]) -> list[Tensor]:
        """v (B, C), `mix`'s, and features (B, C_i, H, W) to residuals of their shapes."""
        v, residuals = v[:, None, None], []                                   # (B, 1, 1, C)
        for s, look, theta in zip(features, self.look, self.theta_z3, strict=True):
            norm = F.group_norm(s, self.config.norm_groups).movedim(1, -1)    # (B, H, W, C_i)
            h = v * (1 + look(norm))                                          # (B, H, W, C)
            residuals.append(theta(h).movedim(-1, 1))                         # (B, C_i, H, W)
        return residuals

    def forward(self, g: Tensor, emb: Tensor, c: Tensor, z: Tensor, t: Tensor,
                features: list[Tensor]) -> list[Tensor]:
        """g (B,), emb (B, E), c (B, L, D) and `UNet.encode`'s features to residuals of their
        shapes. z and t are not read."""
        return self.add_sight(self.mix(g, emb, c), features)


class FullGuide(Encoder):
    """Fig. 4a, a ControlNet: the base's encoder once more, a hint encoder, zero convolutions.

    Names are ControlNet's own, so that the guide can be saved as one.
    """

    def __init__(self, base: UNetConfig, config: GuideConfig = GuideConfig(kind="full")):
        super().__init__(base)
        self.guide_config = config
        *skips, middle = injection_channels(base)
        hint = config.hint or round(base.model_channels / 20)
        self.input_hint_block = _hint_encoder(hint, base.model_channels)
        self.zero_convs = nn.ModuleList(nn.Sequential(_zero_conv(ch, ch, 1)) for ch in skips)
        self.middle_block_out = nn.Sequential(_zero_conv(middle, middle, 1))

    def start_from(self, unet: UNet) -> None:
        """Copies the base's encoder. The zero convolutions still make every residual 0."""
        encoder = {k: v for k, v in unet.state_dict().items()
                   if k.startswith(("time_embed.", "input_blocks.", "middle_block."))}
        self.load_state_dict(encoder, strict=False)

    def encode_hint(self, g: Tensor, z: Tensor) -> Tensor:
        """Guidance g (B,) to features (B, model_channels, H, W) for latents of the shape of z.

        The hint is an image of eight times the latent's sides, every pixel of it g / 10.
        """
        pixel = (g / G_SCALE).to(z.device, self.dtype).view(-1, 1, 1, 1)
        return self.input_hint_block(pixel.expand(-1, 3, 8 * z.shape[2], 8 * z.shape[3]))

    def control(self, z: Tensor, emb: Tensor, c: Tensor, hint: Tensor) -> list[Tensor]:
        """Latents, the guide's own time embedding (B, E), prompt and encoded hint to residuals."""
        h, features = z.to(self.dtype), []
        for i, block in enumerate(self.input_blocks):
            h = block(h, emb, c)
            if i == 0:
                h = h + hint
            features.append(h)
        features.append(self.middle_block(h, emb, c))
        zero_convs = [*self.zero_convs, self.middle_block_out]
        return [conv(f) for conv, f in zip(zero_convs, features)]

    def forward(self, g: Tensor, emb: Tensor, c: Tensor, z: Tensor, t: Tensor,
                *_: object) -> list[Tensor]:
        """Guidance g (B,), prompt c (B, L, D), latents z (B, Z, H, W), timesteps t (B,) to
        residuals of the features' shapes. The base's own embedding and features are not read."""
        return self.control(z, self.embed_time(t), c, self.encode_hint(g, z))


def _zero_conv(c_in: int, c_out: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def _hint_encoder(width: int, channels: int) -> nn.Sequential:
    """Eight 3×3 convolutions from 3 channels at image size to `channels` at latent size.

    With width 16 these are ControlNet's 16, 32, 96 and 256 channels.
    """
    layers, c_in = [], 3
    for multiple, stride in ((1, 1), (1, 1), (2, 2), (2, 1), (6, 2), (6, 1), (16, 2)):
        layers += [nn.Conv2d(c_in, multiple * width, 3, stride, padding=1), nn.SiLU()]
        c_in = multiple * width
    return nn.Sequential(*layers, _zero_conv(c_in, channels, 3))


def build_guide(base: UNetConfig, config: GuideConfig) -> nn.Module:
    """A fresh guide of the kind configured, for a base of this shape."""
    if config.kind not in ("tiny", "full"):
        raise ValueError(f"guide kind {config.kind!r} is unknown: use tiny or full")
    if config.kind == "full":
        return FullGuide(base, config)
    return (SeeingGuide if config.form == "seeing" else TinyGuide)(base, config)


# ------------------------------------------------------------------------------- the losses


@dataclass
class Distilled:
    """What one distillation step yields: the loss, and the share of the correction unexplained."""

    loss: Tensor           # mean over the batch, with gradients
    error: Tensor          # (B,) ‖e − e_teacher‖²
    correction: Tensor     # (B,) ‖ε_c − e_teacher‖², the error without a guide
    target: Tensor         # (B, Z, H, W) e_teacher: a DDIM step along it is the teacher's own

    @property
    def unexplained(self) -> Tensor:
        """‖e − e_teacher‖² / ‖ε_c − e_teacher‖²: 1 for a fresh guide, 0 for a perfect one."""
        return self.error.sum() / self.correction.sum()


def compare(e: Tensor, e_teacher: Tensor, eps_c: Tensor, weight: Tensor | float) -> Distilled:
    """The student's ε̂ with its teacher's and with that of the base alone, all (B, Z, H, W)."""
    # Squares are taken in float32: in half precision small errors would vanish.
    error = (e.float() - e_teacher).square().mean((1, 2, 3))                  # (B,)
    correction = (eps_c - e_teacher).square().mean((1, 2, 3))                 # (B,)
    return Distilled((weight * error).mean(), error.detach(), correction, e_teacher)


def cfg_distillation(unet: UNet, guide: nn.Module, z: Tensor, t: Tensor, c: Tensor, empty: Tensor,
                     g: Tensor, weight: Callable | None = None) -> Distilled:
    """Algorithm 1: L = ‖e_teacher − e‖², with a t and a g of its own for every sample.

    z (B, Z, H, W), t (B,), c and empty (B, L, D), g (B,). weight(t) (B,) weighs each sample's
    squared error; the paper has none.
    """
    with torch.no_grad():
        emb = unet.embed_time(t)
        # The teacher's two passes, with c and with ∅, are one batch of 2 B.
        emb_twice, both = torch.cat([emb, emb]), torch.cat([c, empty])
        features = unet.encode(torch.cat([z, z]), emb_twice, both)
        eps_c, eps_empty = unet.decode(features, emb_twice, both).float().chunk(2)
        e_teacher = cfg(eps_c, eps_empty, g)                                  # Eq. 3
        # The guide touches only the decoder, so the student's encoder pass is that batch's first
        # half, and nothing before the decoder needs a gradient.
        features = [feature[:len(z)] for feature in features]
    e = unet.decode(features, emb, c, guide(g, emb, c, z, t, features))       # Eq. 4
    return compare(e, e_teacher, eps_c, weight(t) if weight else 1.0)


def halving_target(z: Tensor, z_end: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
    """Section 4.4: the one ε̂* whose single DDIM step from z_t lands on the teacher's z″ at t″.

    x̂* = (z″ − (σ_t″ / σ_t) z_t) / (α_t″ − (σ_t″ / σ_t) α_t) and ε̂* = (z_t − α_t x̂*) / σ_t.
    """
    alpha, sigma = alpha_sigma(t)
    alpha_end, sigma_end = alpha_sigma(t_end)
    x = (z_end - sigma_end / sigma * z) / (alpha_end - sigma_end / sigma * alpha)
    return (z - alpha * x) / sigma


def root_snr(t: Tensor) -> Tensor:
    """(B,) max(σ_t / α_t, 1): a weight of the ε error that looks more to the noisy end.

    It is the root of the weight with which the ε error becomes Salimans & Ho's truncated SNR,
    max(α²/σ², 1), on the x̂ error; that one itself did worse here.
    """
    alpha, sigma = alpha_sigma(t)
    return (sigma / alpha).clamp(min=1).flatten()


def halving(unet: UNet, guide: nn.Module, teacher: nn.Module, z: Tensor, t: Tensor, t_mid: Tensor,
            t_end: Tensor, c: Tensor, g: Tensor, weight: Callable | None = None) -> Distilled:
    """Section 4.4: one step of the guide learns what two DDIM steps t → t′ → t″ of the teacher do.

    The teacher is the guide of the stage before. Shapes and weight as in `cfg_distillation`.
    """
    with torch.no_grad():
        emb, emb_mid = unet.embed_time(t), unet.embed_time(t_mid)
        features = unet.encode(z, emb, c)       # at t teacher and student share this pass
        eps_c = unet.decode(features, emb, c).float()
        eps = unet.decode(features, emb, c, teacher(g, emb, c, z, t, features)).float()
        z_mid = ddim_step(z, eps, t, t_mid)
        features_mid = unet.encode(z_mid, emb_mid, c)
        residuals = teacher(g, emb_mid, c, z_mid, t_mid, features_mid)
        eps_mid = unet.decode(features_mid, emb_mid, c, residuals).float()
        target = halving_target(z, ddim_step(z_mid, eps_mid, t_mid, t_end), t, t_end)
    e = unet.decode(features, emb, c, guide(g, emb, c, z, t, features))
    return compare(e, target, eps_c, weight(t) if weight else 1.0)


# ------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(unet: UNet, z: Tensor, c: Tensor, g: float, steps: int, guide: nn.Module | None = None,
           empty: Tensor | None = None, sampler: str | Callable = "ddim",
           progress: Callable[[], object] = lambda: None) -> Tensor:
    """Latents (B, Z, H, W) from standard normal noise z, float32, under prompts c (B, L, D).

    With a guide one pass a step (Eq. 4); with `empty` (B, L, D) CFG, two passes a step (Eq. 3);
    with neither no guidance. sampler is one of SAMPLERS or any function of (predict, z, grid).
    progress() is called once a prediction. support/fast.py has the same
    with everything that no step changes computed beforehand; this one is to be read.
    """
    guidance = torch.full((len(z),), g, device=z.device)

    def predict(z: Tensor, t: int) -> Tensor:
        progress()
        t = torch.full((len(z),), t, device=z.device)
        if guide is not None:
            emb = unet.embed_time(t)
            features = unet.encode(z, emb, c)
            residuals = guide(guidance, emb, c, z, t, features)
            return unet.decode(features, emb, c, residuals).float()           # Eq. 4
        eps_c = unet(z, t, c).float()
        return eps_c if empty is None else cfg(eps_c, unet(z, t, empty).float(), g)   # Eq. 3

    return SAMPLERS.get(sampler, sampler)(predict, z, step_grid(steps))       # Eq. 2


def noise(seeds: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (B, *shape), float32, with one CPU generator a seed, one seed an image.

    So neither batch nor device changes an image, and the noise is diffusers' for the same seed.
    """
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])
