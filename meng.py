"""On Distillation of Guided Diffusion Models (Meng et al., CVPR 2023): one function an equation.

PPDD's predecessor has the same two stages, but trains a copy of the whole UNet, the *student*, in
place of a guide beside a frozen one. The few-step model is then sampled with noise, and used to
edit images. The samplers and applications below take any predictor of ε̂: a student, a UNet with a
guide, or CFG.

Symbols and shapes are those of ppdd.py; its g is this paper's w, and λ_t = log(α_t² / σ_t²).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ppdd import (
    G_SCALE,
    SAMPLERS,
    TIMESTEPS,
    Distilled,
    add_noise,
    alpha_sigma,
    cfg,
    compare,
    ddim,
    ddim_step,
    halving_target,
    step_grid,
)
from unet import UNet, UNetConfig

# ------------------------------------------------------------------------------- the student


@dataclass(frozen=True)
class StudentConfig:
    """What a student is; it takes the place of `GuideConfig` in a file's metadata.

    prediction    "eps", or "v": the network's output is then v = α ε − σ x
    """

    kind: str = "whole"
    prediction: str = "eps"


class Student(UNet):
    """Section 3.1: the teacher's UNet with g as one more input, embedded as the time is.

    It predicts in one pass what CFG predicts in two. It stands in place of the base's UNet, which
    it does not need, and so can't be plugged into another one: see `transplant`.
    """

    def __init__(self, base: UNetConfig, config: StudentConfig = StudentConfig()):
        super().__init__(base)
        if config.prediction not in ("eps", "v"):
            raise ValueError(f"prediction is {config.prediction!r}: use eps or v")
        self.guide_config = config
        width = 4 * base.model_channels
        self.g_embed = nn.Sequential(
            nn.Linear(base.model_channels, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.g_embed[2].weight)          # a fresh student does not see g
        nn.init.zeros_(self.g_embed[2].bias)

    def start_from(self, unet: UNet) -> None:
        """Copies the teacher. A fresh student of ε is equal to it, bit for bit.

        One of v is not, as its output means something else, and first learns that. The paper
        fine-tunes the teacher to v beforehand.
        """
        self.load_state_dict(unet.state_dict(), strict=False)

    def embed(self, t: Tensor, g: Tensor) -> Tensor:
        """Timesteps (B,) and guidance numbers (B,) to the embedding of both (B, E).

        The sinusoid was made for numbers from 0 to 1000, so g from 0 to 10 is spread over these.
        """
        wave = self.fourier(g * (TIMESTEPS / G_SCALE))                        # (B, 2 · half)
        return self.embed_time(t) + self.g_embed(wave)                        # (B, E)

    def eps_of(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """ε̂ of what the network returned for z, both (B, Z, H, W): ε̂ = σ z + α v, or itself.

        A UNet for inpainting has the mask's channels behind those of z: they are left out.
        """
        if self.guide_config.prediction == "eps":
            return output
        return sigma * z[:, :output.shape[1]] + alpha * output

    def forward(self, z: Tensor, t: Tensor, c: Tensor, g: Tensor) -> Tensor:
        """ε̂ (B, Z, H, W), float32, in z at timesteps t (B,), under prompt c (B, L, D) and guidance
        g (B,)."""
        emb = self.embed(t, g)                                                # (B, E)
        output = self.decode(self.encode(z, emb, c), emb, c).float()          # (B, Z, H, W)
        return self.eps_of(output, z, *alpha_sigma(t))


@torch.no_grad()
def transplant(student: Student, base: UNet, fine_tune: UNet) -> Student:
    """The student, changed in place into one for a fine-tune: fine_tune + (student − base).

    Tensor by tensor and without training; what embeds g stays. The fine-tune may be packed
    (support/fast.py). Raises ValueError where shapes differ.
    """
    if not student.config == base.config == fine_tune.config:
        raise ValueError("student, base and fine-tune must have the same shapes")
    before, after = base.state_dict(), fine_tune.state_dict()
    for name, weight in student.state_dict().items():
        if name in before:
            weight.copy_(after[name].to_dense().float() + (weight.float() - before[name].float()))
    return student


@torch.no_grad()
def sample(student: Student, z: Tensor, c: Tensor, g: float, steps: int,
           sampler: str | Callable = "ddim",
           progress: Callable[[], object] = lambda: None) -> Tensor:
    """As `ppdd.sample`, with a student: one pass a step. support/fast.py has the faster one."""
    guidance = torch.full((len(z),), g, device=z.device)

    def predict(z: Tensor, t: int) -> Tensor:
        progress()
        return student(z, torch.full((len(z),), t, device=z.device), c, guidance)

    return SAMPLERS.get(sampler, sampler)(predict, z, step_grid(steps))


# ------------------------------------------------------------------------------- the losses


def truncated_snr(t: Tensor) -> Tensor:
    """(B,) max(σ² / α², 1): the weight of ε̂'s error which is ω(λ) = max(α² / σ², 1) on x̂'s.

    At the same z, x̂ − x̂* = −(σ / α) (ε̂ − ε̂*). At t = 999, σ / α is 14.6 and the weight 214.
    """
    alpha, sigma = alpha_sigma(t)
    return (sigma / alpha).square().clamp(min=1).flatten()


def cfg_distillation(unet: UNet, student: nn.Module, z: Tensor, t: Tensor, c: Tensor,
                     empty: Tensor, g: Tensor, weight: Callable | None = None) -> Distilled:
    """Stage one, Eq. 3: L = ω(λ_t) ‖x̂_η(z_t, c, g) − ((1 + g) x̂_c − g x̂_∅)‖².

    That is the teacher's x̂ of ε̂ = (1 + g) ε_c − g ε_∅, and so this is `ppdd.cfg_distillation` of
    another student. ω is `weight`: `truncated_snr`, Salimans & Ho's, as the paper's main text
    leaves it open; else the plain error of ε̂.
    """
    with torch.no_grad():
        both = unet(torch.cat([z, z]), torch.cat([t, t]), torch.cat([c, empty]))
        eps_c, eps_empty = both.float().chunk(2)
        target = cfg(eps_c, eps_empty, g)
    return compare(student(z, t, c, g), target, eps_c, weight(t) if weight else 1.0)


def halving(unet: UNet, student: nn.Module, teacher: Student, z: Tensor, t: Tensor, t_mid: Tensor,
            t_end: Tensor, c: Tensor, g: Tensor, weight: Callable | None = None) -> Distilled:
    """Section 3.2: one step of the student learns two DDIM steps t → t′ → t″ of the teacher, the
    student of the stage before.

    The base's own pass, without guidance, is only the measure of what there was to learn.
    """
    with torch.no_grad():
        z_mid = ddim_step(z, teacher(z, t, c, g), t, t_mid)
        z_end = ddim_step(z_mid, teacher(z_mid, t_mid, c, g), t_mid, t_end)
        target = halving_target(z, z_end, t, t_end)
        eps_c = unet(z, t, c).float()
    return compare(student(z, t, c, g), target, eps_c, weight(t) if weight else 1.0)


# ------------------------------------------------------------------------------- samplers
#
# A predictor is called as predict(z, t), t a number, and returns ε̂. The paper's deterministic
# sampler, Eq. 2, is `ppdd.ddim`. Grids are lists of timesteps, as `ppdd.step_grid` makes them.

Predictor = Callable[[Tensor, int], Tensor]
Sampler = Callable[[Predictor, Tensor, list[int]], Tensor]


def diffuse(z: Tensor, k: int, s: int, noise: Tensor) -> Tensor:
    """Eq. 5: z_s = (α_s / α_k) z_k + σ_{s|k} ε, from z at k up to a noisier s.

    The paper's σ²_{s|k} = (1 − e^{λ_s − λ_k}) σ_s² is σ_s² − (α_s / α_k)² σ_k² here, as λ is
    infinite at the clean end.
    """
    (alpha_k, sigma_k), (alpha_s, sigma_s) = alpha_sigma(k), alpha_sigma(s)
    ratio = alpha_s / alpha_k
    variance = sigma_s**2 - (ratio * sigma_k) ** 2
    return ratio * z + variance**0.5 * noise


def stochastic(predict: Predictor, z: Tensor, grid: list[int], noises: Iterator[Tensor]) -> Tensor:
    """Section 3.3: DDIM steps of twice the length, each followed by one step back up with noise.

    N predictions on a grid of N + 1 timesteps; noises yields ε (B, Z, H, W) for each step back.
    Steps are as long as those of an N / 2-step run, so that is what a network should be distilled
    for. The last is one step of the grid, without noise.
    """
    for t, s, k in zip(grid, grid[1:], grid[2:]):
        z = ddim_step(z, predict(z, t), t, k)                                 # Eq. 4
        z = diffuse(z, k, s, next(noises))                                    # Eq. 5
    t, end = grid[-2:]
    return ddim_step(z, predict(z, t), t, end)                                # Eq. 2


def noise_stream(seeds: Iterable[int], shape: tuple[int, ...],
                 device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Standard normal noise (B, *shape), float32, without end, from one generator a seed.

    The first equals `ppdd.noise`. Each image has a stream of its own, so the batch size never
    changes an image.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        draws = [torch.randn(shape, generator=generator) for generator in generators]
        yield torch.stack(draws).to(device)


# ------------------------------------------------------------------------------- applications


def edit_grid(steps: int, strength: float) -> list[int]:
    """The part of an N-step grid that image-to-image runs through (Section 4.2.3, SDEdit).

    It starts at the grid point nearest to `strength` (0 to 1) and has at least one step; diffusers
    takes the next point below. The run starts from z = α x + σ ε there, `ppdd.add_noise`: the
    network meets no noise level that it wasn't distilled for.
    """
    taken = max(1, math.floor(strength * steps + 0.5))
    return step_grid(steps)[-taken - 1:]


def inpaint(predict: Predictor, z: Tensor, grid: list[int], x: Tensor, noise: Tensor, mask: Tensor,
            sampler: Sampler = ddim) -> Tensor:
    """Inpainting with any base: before every prediction the known part of z becomes α x + σ ε.

    x and noise (B, Z, H, W); mask (B, 1, H, W) is 1 where the image is made anew. Samplers treat
    each position by itself, so what they compute for the known part is discarded.
    """
    def put_back(z: Tensor, t: int) -> Tensor:
        return mask * z + (1 - mask) * add_noise(x, noise, t)

    def predict_beside_known(z: Tensor, t: int) -> Tensor:
        return predict(z if t == grid[0] else put_back(z, t), t)    # at first z is as it was given

    return put_back(sampler(predict_beside_known, z, grid), grid[-1])


def inpaint_by_channels(predict: Predictor, z: Tensor, grid: list[int], mask: Tensor,
                        masked: Tensor, sampler: Sampler = ddim) -> Tensor:
    """Section 4.2.4, inpainting with a UNet of nine channels: ε̂(cat[z_t, mask, E(x (1 − mask))]).

    mask (B, 1, H, W) is 1 where the image is made anew; masked (B, Z, H, W) are the latents of the
    image with those pixels 0, which is grey.
    """
    return sampler(lambda z, t: predict(torch.cat([z, mask, masked], dim=1), t), z, grid)


class BesideMask:
    """A UNet, guide or student of an inpainting model, in training: every z gets the batch's mask
    and latents of the masked image, (B, 1 + Z, H, W), so that the losses need not know of them.

    Only z has four dimensions among a call's arguments.
    """

    def __init__(self, net: Callable, beside: Tensor):
        self.net, self.beside = net, beside

    def __getattr__(self, name: str) -> object:
        return getattr(self.net, name)

    def join(self, z: Tensor) -> Tensor:
        passes = len(z) // len(self.beside)             # the teacher's two are one batch of 2 B
        return torch.cat([z, self.beside.repeat(passes, 1, 1, 1)], dim=1)     # (B, 1 + 2 Z, H, W)

    def encode(self, z: Tensor, emb: Tensor, c: Tensor) -> list[Tensor]:
        return self.net.encode(self.join(z), emb, c)

    def __call__(self, *args: object) -> Tensor | list[Tensor]:
        return self.net(*(self.join(x) if getattr(x, "ndim", 0) == 4 else x for x in args))


def invert(predict: Predictor, x: Tensor, grid: list[int], at_end: bool = False) -> Tensor:
    """Section 4.3, encoding: DDIM from clean latents x up to the noise they would come from.

    grid runs upwards, from −1, which no network has seen: there it is evaluated at 0. A step from t
    up to s evaluates it at t, and with at_end at s, as the step back down will. That suits a
    network halved to this grid: it knows no other timesteps, and t is none of them at first.
    """
    for t, s in pairwise(grid):
        x = ddim_step(x, predict(x, s if at_end else max(t, 0)), t, s)
    return x


def inversion_target(z: Tensor, z_end: Tensor, t: int | Tensor, t_end: int | Tensor) -> Tensor:
    """The one ε̂* whose single DDIM step up from z_t lands on the teacher's z″ at t″: distilled
    encoding. ε̂* = (z″ − (α″ / α_t) z_t) / (σ″ − σ_t α″ / α_t).

    It is `ppdd.halving_target`, written without a division by σ_t, which is 0 at the clean end.
    """
    alpha, sigma = alpha_sigma(t)
    alpha_end, sigma_end = alpha_sigma(t_end)
    ratio = alpha_end / alpha
    return (z_end - ratio * z) / (sigma_end - ratio * sigma)
