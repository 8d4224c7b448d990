"""What images of a base are measured by: distance, CLIP score and caption accuracy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.clip_score import clip_cosines
from evaluation.features import VIT_G, Clip, choose_extractor, feature_name, load_clip
from evaluation.fid import FEW, Statistics, frechet
from evaluation.folders import images_in
from evaluation.sampling import Prompts
from mini import postcards
from mini.judge import judge_hash, load_judge
from support.base import Base
from support.cli import require
from support.files import expand

JUDGE_ACCURACY = "judge on real images, %"
REFERENCE_SEED = 7              # of the real postcards; training draws from others

class Metrics:
    """What the images of one base are measured by; networks are loaded when first needed."""

    def __init__(self, config, base: Base, prompts: Prompts, side: int, real: str = ""):
        """real: reference images, a folder or an .npz; without, postcards of the base's style."""
        self.config = config
        self.real = real
        self.style = prompts.style
        self.miniature = base.is_miniature
        self.judged = prompts.own_captions and side == postcards.SIZE
        require((not self.miniature and not real,
                 f"--real is needed with {base.name}: a folder of real images, or their "
                 "statistics as .npz"))

    @cached_property
    def extractor(self) -> tuple[str, Callable[[Tensor], Tensor]]:
        config = self.config
        return choose_extractor(self.miniature, config.clip_model, config.inception, config.device)

    @cached_property
    def clip(self) -> Clip:
        """The CLIP of the CLIP score; where the distance is a CLIP-FID, the same one."""
        _, features = self.extractor
        if isinstance(features, Clip):
            return features
        name = self.config.clip_model or ("mini" if self.miniature else VIT_G)
        return load_clip(name, self.config.device)

    @cached_property
    def judge(self) -> nn.Module:
        return load_judge()

    @cached_property
    def references(self) -> Statistics:
        """Statistics of the real images: those of --real, else postcards."""
        name, features = self.extractor
        if self.real.lower().endswith(".npz"):
            return self._stored_references()
        statistics_ = Statistics(name)
        batches = ((batch for _, batch in images_in(self.real, self.config.batch,
                                                    self.config.skip_bad))
                   if self.real else (batch for batch, _ in self.postcards))
        for batch in batches:
            statistics_.add(features(batch.to(self.config.device)))
        return statistics_

    def _stored_references(self) -> Statistics:
        name, features = self.extractor
        stored = Statistics.load(expand(self.real))
        blank = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=self.config.device)
        require((stored.features not in ("", feature_name(name, features))
                 or stored.mean.size != features(blank).shape[1],
                 f"--real {self.real} holds features of another network "
                 f"({stored.features or f'{stored.mean.size} an image'}) than {name}"))
        return stored

    @cached_property
    def postcards(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of real postcards, (B, 3, 64, 64) uint8, and their attributes (B, 6)."""
        generator = torch.Generator().manual_seed(REFERENCE_SEED)
        attributes = postcards.sample_attributes(self.config.references, generator)
        return [((postcards.draw(part, self.style, generator) * 255).round().byte(), part)
                for part in attributes.split(200)]

    def correct(self, batch: Tensor, attributes: Tensor) -> Tensor:
        """(B, 6) whether the judge sees each attribute of images (B, 3, 64, 64) uint8 as asked."""
        return self.judge.read(batch.cpu().float() / 255) == attributes

    @cached_property
    def settings(self) -> dict:
        """All that changes scores of given images."""
        name, features = self.extractor
        settings = {"distance": name, "features": features.protocol, "CLIP": self.clip.protocol,
                    "references": self.real or
                    f"{self.references.n} postcards, style {self.style}",
                    "reference images": self.references.n or None}
        if self.real:                   # postcards are drawn alike everywhere, up to rounding
            settings["reference hash"] = self._reference_hash()
        return settings | ({"judge": judge_hash()} if self.judged else {})

    def _reference_hash(self) -> str:
        return hashlib.sha256(self.references.mean.round(6).tobytes()).hexdigest()[:12]

    def describe(self) -> dict:
        """The settings, and what a reader needs to judge the scores by."""
        description = self.settings | {"reference hash": self._reference_hash()}
        if self.extractor[0] == "FID" and self.config.count < FEW:
            description["warning"] = (f"FID of {self.config.count} images is biased upwards: "
                                      "compare it only with FIDs of as many")
        if self.judged:
            correct = [self.correct(*part).all(1).float() for part in self.postcards]
            description[JUDGE_ACCURACY] = round(100 * torch.cat(correct).mean().item(), 2)
        return description

    def score(self, folder: Path, prompts: list[str], attributes: Tensor | None
              ) -> dict[str, float]:
        """Scores of a cell's images: distance, CLIP score and, in percent, caption accuracy.

        Caption accuracy is the share of images with all attributes as asked; then come the shares
        of each attribute.
        """
        name, features = self.extractor
        sampled = Statistics()
        cosines, correct = [], []
        for paths, batch in images_in(folder, self.config.batch,
                                      advice="delete them, and they are sampled again"):
            indices = [int(path.stem) for path in paths]
            sampled.add(features(batch.to(self.config.device)))
            cosines.append(clip_cosines(self.clip, batch, [prompts[k] for k in indices]).cpu())
            if self.judged:
                correct.append(self.correct(batch, attributes[indices]))
        scores = {name.split()[0]: frechet(sampled, self.references),
                  "CLIP": 100 * torch.cat(cosines).double().mean().item()}
        if correct:
            hits = torch.cat(correct).double()                                     # (N, 6)
            shares = {"caption accuracy": hits.prod(1).mean()}
            shares |= dict(zip(postcards.ATTRIBUTES, hits.mean(0)))
            scores |= {name: 100 * share.item() for name, share in shares.items()}
        return {name: round(score, 6) for name, score in scores.items()}
