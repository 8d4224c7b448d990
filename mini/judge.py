"""The judge: a small classifier that reads a postcard's six attributes off its pixels.

Caption accuracy is the share of images in which it finds every attribute as the caption says. It is
trained on all four styles, blurred and noisy, so that neither style nor sharpness sways it.

Shapes: B images of 64 × 64 pixels, N values of an attribute.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import ppdd
from mini import postcards
from mini.postcards import ATTRIBUTES
from support import fast
from support.base import Base
from support.files import sha256

JUDGE = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """Images (B, 3, 64, 64) in 0 … 1 to one row of scores an attribute."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out),
                       nn.ReLU(), nn.Conv2d(c_out, c_out, 3, padding=1, groups=8), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())                       # (B, 4 width · 16)
        self.heads = nn.ModuleList(nn.Linear(64 * width, len(v)) for v in ATTRIBUTES.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Scores, six tensors (B, N), in the order of `ATTRIBUTES`."""
        h = self.body(images * 2 - 1)
        return [head(h) for head in self.heads]

    def read(self, images: Tensor) -> Tensor:
        """(B, 6) the most likely value of every attribute."""
        return torch.stack([scores.argmax(1) for scores in self(images)], dim=1)

    def loss(self, images: Tensor, attributes: Tensor) -> Tensor:
        """Sum of the six cross entropies."""
        return sum(F.cross_entropy(s, a) for s, a in zip(self(images), attributes.T))


def judge_hash() -> str:
    """Which judge measured: every result that rests on one names it."""
    return sha256(JUDGE)[:12]


def load_judge(path: str | Path = JUDGE, device: str | torch.device = "cpu") -> Judge:
    """A judge, by default the bundled one, in float32; eval mode, no gradients."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.to(device).eval().requires_grad_(False)


class Benchmark:
    """Fresh postcards and captions that name every attribute, to measure ways of sampling with."""

    def __init__(self, base: Base, judge: Judge, count: int, seed: int):
        self.base = base
        self.judge = judge
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        rng = random.Random(seed)
        self.attributes = postcards.sample_attributes(count, generator)        # (count, 6)
        self.real = postcards.draw(self.attributes, generator=generator)       # (count, 3, 64, 64)
        self.c = base.embed([postcards.caption(a, rng, left_out=False) for a in self.attributes])
        self.empty = base.embed([""])

    def accuracy(self, images: Tensor) -> dict[str, float]:
        """Shares of images in which every attribute, and each one, is as the caption says."""
        hits = self.judge.read(images) == self.attributes                      # (count, 6)
        shares = {"all": hits.all(1)} | dict(zip(ATTRIBUTES, hits.T))
        return {name: round(hit.float().mean().item(), 4) for name, hit in shares.items()}

    def measure(self, name: str, g: float, steps: int, guide: nn.Module | None = None,
                cfg: bool = False) -> dict:
        """Caption accuracy and time of sampling with a guide, with CFG or without guidance."""
        latents = []
        start = time.perf_counter()
        for i in tqdm(range(0, len(self.c), 100), desc=name):
            c = self.c[i:i + 100]
            z = ppdd.noise(range(self.seed + i, self.seed + i + len(c)), (4, 8, 8))
            empty = self.empty.expand(len(c), -1, -1) if cfg else None
            latents.append(fast.sample(self.base.unet, z, c, g, steps, guide, empty))
        seconds = (time.perf_counter() - start) / len(self.c)
        images = torch.cat([self.base.decode(z) for z in latents]).float() / 255
        return {"g": g, "steps": steps, "UNet passes": steps * (2 if cfg else 1),
                "ms an image, without decoding": round(1000 * seconds, 2),
                "caption accuracy": self.accuracy(images)}
