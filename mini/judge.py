"""The judge: a small classifier that reads a postcard's six attributes off its pixels.

It decides what "the picture follows its caption" means for the miniature. It sees all four styles
in training, blurred and noisy, so that it judges what is shown and not how, nor how sharply.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

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


def load_judge(path: str | Path = JUDGE, device: str | torch.device = "cpu") -> Judge:
    """A judge, else the bundled one, in float32; eval mode, no gradients."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.to(device).eval().requires_grad_(False)
