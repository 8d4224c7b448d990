"""The miniature's own training set: postcards, drawn and encoded once, kept in memory."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from mini import postcards
from support.base import Base

# Postcards drawn together. What a CPU draws does not depend on it, what it encodes does in the last
# bits; a GPU would wait for Python with fewer.
ON_CPU, ON_GPU = 250, 1000


class Postcards:
    """`count` postcards with captions, drawn by seed, in the base's style:
    support.data.CaptionedImages' interface."""

    def __init__(self, base: Base, count: int, seed: int):
        self.base = base
        self.image_count = count
        self.style = postcards.style_of(base.name)
        self.identity = f"postcards {count} {seed}" + (
            f" {self.style}" if self.style != postcards.STYLES[0] else "")
        self.skipped: dict[int | str, str] = {}
        self.texts: list[str] = []
        generator = torch.Generator().manual_seed(seed)
        rng = random.Random(seed)
        moments, states = [], []
        attributes = postcards.sample_attributes(count, generator)
        parts = attributes.split(ON_CPU if base.device.type == "cpu" else ON_GPU)
        for part in tqdm(parts, desc="drawing postcards", leave=False):
            images = postcards.draw(part.to(base.device), self.style, generator)
            captions = [postcards.caption(a, rng) for a in part]
            moments.append(base.vae.encode(images * 2 - 1))
            states.append(base.embed(captions).half())                     # half the memory
            self.texts += captions
        self._moments = torch.cat(moments)                                 # (count, 2 Z, H, W)
        self._states = torch.cat(states)                                   # (count, L, D)
        self.side = self._moments.shape[-1]

    def __len__(self) -> int:
        return self.image_count

    def captions(self, rows: Iterable[int]) -> list[str]:
        return [self.texts[row] for row in rows]

    def example_prompts(self, count: int) -> list[str]:
        """Captions that name every attribute, of other postcards than those trained on."""
        rng = random.Random(0)
        generator = torch.Generator().manual_seed(0)
        return [postcards.caption(a, rng, left_out=False)
                for a in postcards.sample_attributes(count, generator)]

    def prompt_states(self, rows: list[int]) -> Tensor:
        """(B, L, D) float32."""
        return self._states[rows].float()

    def batches(self, row_lists: Iterable[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """Each list of rows, and the same as a tensor, which `moments` looks up."""
        return ((rows, torch.tensor(rows)) for rows in row_lists)

    def moments(self, images: Tensor) -> Tensor:
        """(B, 2 Z, H, W) float32, of rows from `batches`."""
        return self._moments[images]

    def skipped_summary(self) -> str:
        return ""
