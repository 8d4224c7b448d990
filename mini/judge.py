"""The judge: a small classifier that reads a postcard's six attributes off its pixels. And a world
of captions to judge a way of sampling by.

It decides what "the picture follows its caption" means for the miniature. It sees all four styles
in training, blurred and noisy, so that it judges what is shown and not how, nor how sharply.
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

JUDGE = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """Pictures (B, 3, 64, 64) in 0 … 1 to one row of scores an attribute."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths, layers = (3, width, 2 * width, 3 * width, 4 * width), []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out),
                       nn.ReLU(), nn.Conv2d(c_out, c_out, 3, padding=1, groups=8), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())                       # (B, 4 width · 16)
        self.heads = nn.ModuleList(nn.Linear(64 * width, len(v)) for v in ATTRIBUTES.values())

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Scores, six tensors (B, number of values), in the order of `ATTRIBUTES`."""
        h = self.body(pictures * 2 - 1)
        return [head(h) for head in self.heads]

    def read(self, pictures: Tensor) -> Tensor:
        """(B, 6) the most likely value of every attribute."""
        return torch.stack([scores.argmax(1) for scores in self(pictures)], dim=1)

    def loss(self, pictures: Tensor, attributes: Tensor) -> Tensor:
        return sum(F.cross_entropy(s, a) for s, a in zip(self(pictures), attributes.T))


def judge_hash() -> str:
    """What results say of the bundled judge: which one it was."""
    return ppdd.fingerprint(JUDGE)[:12]


def load_judge(path: str | Path = JUDGE, device: str | torch.device = "cpu") -> Judge:
    """A judge, else the bundled one, in float32; eval mode, no gradients."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.to(device).eval().requires_grad_(False)


class World:
    """Fresh pictures with their attributes and full captions, and a base that should know them."""

    def __init__(self, base: ppdd.Base, judge: Judge, count: int, seed: int):
        generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        self.base, self.judge, self.seed = base, judge, seed
        self.attributes = postcards.sample_attributes(count, generator)
        self.real = postcards.draw(self.attributes, generator=generator)
        self.c = base.embed([postcards.caption(a, rng, left_out=False) for a in self.attributes])
        self.empty = base.embed([""])

    def right(self, pictures: Tensor) -> dict[str, float]:
        """Shares of pictures in which every attribute, and each attribute, is as asked."""
        hit = self.judge.read(pictures) == self.attributes                     # (B, 6)
        shares = {"all": hit.all(1)} | dict(zip(ATTRIBUTES, hit.T))
        return {k: round(v.float().mean().item(), 4) for k, v in shares.items()}

    def sampled(self, name: str, g: float, steps: int, guide=None, cfg: bool = False) -> dict:
        """Accuracy and seconds a picture of one way of sampling, in batches of 100."""
        parts, start = [], time.perf_counter()
        for k in tqdm(range(0, len(self.c), 100), desc=name):
            c = self.c[k:k + 100]
            z = ppdd.noise(range(self.seed + k, self.seed + k + len(c)), (4, 8, 8))
            empty = self.empty.expand(len(c), -1, -1) if cfg else None
            parts.append(ppdd.sample(self.base.unet, z, c, g, steps, guide, empty))
        seconds = (time.perf_counter() - start) / len(self.c)
        pictures = torch.cat([self.base.decode(z) for z in parts]).float() / 255
        passes = steps * (2 if cfg else 1)
        return {"g": g, "steps": steps, "UNet passes": passes,
                "ms a picture, without decoding": round(1000 * seconds, 2),
                "right": self.right(pictures)}
