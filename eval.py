"""Scores of pictures, and the paper's tables and figures: `python eval.py COMMAND`.

    fid A B                     distance between two sets of pictures, folders or .npz files
    clip DIR --prompts FILE     how far pictures show what their prompts say
    table1                      parameters and arithmetic of networks, guides and whole pictures
    table2                      guides, CFG and no guidance, by number of steps and g
    table3                      the plain base's guides plugged into fine-tuned bases
    match                       how much of the CFG correction a guide explains, by g and by t
    fig5 fig6 fig7 fig8         the paper's figures
    quality                     Table 2 as a chart: quality over measured time
    speed                       what steps, pictures and updates take; see speed --help

Each writes its result, with its protocol, to a JSON or PNG file. The distance is FID where
pytorch-fid's Inception weights are found; else it is the same distance between features of a CLIP
and is called CLIP-FID, which is never to be set beside an FID. The miniature's tables have CLIP-FID
of its own CLIP unless --inception asks for FID; `fid` takes pictures of 64 x 64 for the
miniature's where Inception is not found, and says so.

Shapes: B pictures, H and W their sides, d features of one, L tokens.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import io
import json
import logging
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property, partial
from importlib.metadata import distributions
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from scipy.linalg import eigh, eigvalsh
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ppdd
from clip_text import TextConfig, TextEncoder, Tokenizer
from mini import postcards
from mini.judge import judge_hash, load_judge
from ppdd import Base, rank, world
from unet import CheckpointError, UNet, UNetConfig, injection_channels
from vae import VAE, VAEConfig


class BadInput(ValueError):
    """Something the person gave can't be used; the message is all they need to see."""


def refuse(*faults: tuple[object, str]) -> None:
    """Raises BadInput with the first sentence whose condition holds."""
    for wrong, sentence in faults:
        if wrong:
            raise BadInput(sentence)


def option(default, text: str, **more):
    """A field of a configuration, with the help text of its flag."""
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Config:
    """Settings of a command; the command line is generated from them, and every result has them."""

    command: str = option("", "what to measure")
    paths: tuple[str, ...] = option((), "fid: two folders or .npz files; clip: a folder")
    weights: str = option("", "Stable Diffusion 1.5; default: looked for, else the miniature")
    clip: str = option("", "an open_clip model, MODEL:TAG or MODEL:FILE, or mini; default: mini "
                           "for the miniature's pictures, else ViT-g-14:laion2b_s34b_b88k; "
                           "OpenAI's weights in a file not named so: MODEL-quickgelu:FILE")
    inception: str = option("", "pytorch-fid's weight file; default: looked for in torch's cache")
    prompts: str = option("", "prompts: a text, one a line, COCO's captions .json, a .tsv or .csv")
    real: tuple[str, ...] = option((), "reference pictures, a folder or .npz; table3: one for all "
                                       "bases, or one each")
    count: int = option(0, "so many pictures, or prompts of a file; 0: all")
    seed: int = option(0, "seed of what is drawn")
    batch: int = option(32, "pictures at a time")
    size: str = option("", "side of the pictures; default: 512, the miniature's 64; table1: mini "
                           "for the miniature, default: Stable Diffusion 1.5")
    device: str = option("", "cuda or cpu; default: cuda where there is one")
    dtype: str = option("auto", "of the base; auto: bf16 on CUDA, fp16 if it is old, else fp32",
                        choices=("auto", "fp32", "bf16", "fp16"))
    skip_bad: bool = option(False, "leave out pictures that can't be read")
    guides: tuple[str, ...] = option((), "tables: more guides, by name (tiny-product-8) or file")
    bases: tuple[str, ...] = option((), "table3, fig8: fine-tuned bases; default: mini/styles")
    prompt: tuple[str, ...] = option((), "figures: what to paint; default: a few examples")
    g: tuple[float, ...] = option((), "guidance numbers; default: 2 4 6 8, or 8 where there is one",
                                  type=float)
    seeds: int = option(0, "tables: seeds, each with --count pictures; 0: 3")
    references: int = option(0, "real postcards to compare with; 0: 2000")
    repeats: int = option(0, "tables: rounds of timing; 0: 3")
    quick: bool = option(False, "few pictures, two g, two seeds; in a result file of its own")
    save: str = option("", "fid: write the first folder's statistics to this file, an .npz")
    out: str = option("", "the file; default: results/COMMAND.json, a figure's docs/COMMAND.png")


# ------------------------------------------------------------------------------- the distance

class Statistics:
    """Mean and covariance of features, in float64, streamed: no picture's features are kept.

    n counts the pictures; it is 0 where a file does not say. `of` names the features, where known.
    """

    def __init__(self, of: str = ""):
        self.n, self.of = 0, of
        self.mean = self._scatter = np.zeros(0)

    def add(self, features: Tensor) -> None:
        """Takes in the features (B, d) of B more pictures."""
        x = features.detach().cpu().double().numpy()
        part = Statistics()
        part.n, part.mean = len(x), x.mean(0)
        part._scatter = (x - part.mean).T @ (x - part.mean)
        self.merge(part)

    def merge(self, other: Statistics) -> None:
        """Takes in another's pictures; exact, in any order, up to rounding (Chan et al., 1979)."""
        if not self.mean.size:
            self.n, self.mean, self._scatter = other.n, other.mean, other._scatter.copy()
            return
        if not (self.n and other.n):
            raise ValueError("statistics of an unknown number of pictures can't be added to")
        n, apart = self.n + other.n, other.mean - self.mean
        self._scatter += other._scatter
        self._scatter += np.outer(apart, apart * (self.n * other.n / n))
        self.mean, self.n = self.mean + apart * (other.n / n), n

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), with n − 1 in the denominator; zeros for one picture."""
        return self._scatter / max(self.n - 1, 1)

    def save(self, path: str | Path) -> None:
        """An .npz with mu and sigma, as pytorch-fid writes and reads it, and with n and of."""
        with ppdd.written(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, n=self.n, of=self.of)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """What `save` or pytorch-fid wrote. Raises BadInput where the file is something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                mu, sigma = (file[k].astype(np.float64, casting="same_kind")
                             for k in ("mu", "sigma"))
                n = int(file["n"]) if "n" in file else 0
                of = str(file["of"]) if "of" in file else ""
        except FileNotFoundError:
            raise BadInput(f"{path}: there is no such file") from None
        except Exception as error:      # a damaged archive raises whatever its parts do
            raise BadInput(f"{path} is no .npz with mu and sigma ({error}): pass one, or a folder "
                           "of pictures") from None
        fits = mu.ndim == 1 and sigma.shape == 2 * mu.shape and mu.size > 0
        refuse((not (fits and np.isfinite(mu).all() and np.isfinite(sigma).all()),
                f"{path}: mu {mu.shape} and sigma {sigma.shape} are no finite mean and "
                "covariance; compute them again"))
        self = cls(of)
        self.n, self.mean, self._scatter = n, mu, sigma * max(n - 1, 1)
        return self


def frechet(a: Statistics, b: Statistics) -> float:
    """‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2 √(Σ₁ Σ₂)), the distance of Heusel et al. (2017); at least 0.

    Tr √(Σ₁ Σ₂) = Σ √eigenvalues of R Σ₂ Rᵀ, RᵀR = Σ₁, which is symmetric: never complex. R has as
    many rows as Σ₁ has rank; the zeros of a deficient Σ₁ would come out as noise, and its root is
    large. Raises BadInput where the features are not the same.
    """
    if a.mean.shape != b.mean.shape:
        raise BadInput(f"{a.mean.size} features a picture and {b.mean.size} can't be compared: "
                       "both sides must come from one network")
    values, vectors = eigh(a.covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    root = vectors[:, kept] * np.sqrt(values[kept])                            # (d, rank), Rᵀ
    spectrum = eigvalsh(root.T @ b.covariance @ root) if kept.any() else np.zeros(1)
    cross = np.sqrt(spectrum.clip(min=0)).sum()
    apart = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(0.0, float(apart @ apart + traces - 2 * cross))


# ------------------------------------------------------------------------------- FID's Inception

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Unit(nn.Module):
    """Convolution, batch norm, ReLU; `same` keeps the sides."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1,
                 same: bool = True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = [k // 2 if same and stride == 1 else 0 for k in kernel]
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, joined over the channels, the pooled one last.

    A branch is a row of (name, channels, kernel[, stride]); a list in it is a fork whose outputs
    are joined too. The pooled branch ends in a 1×1 unit of `pooled` channels where that is not 0.
    """

    def __init__(self, c_in: int, pool: nn.Module, pooled: int, *branches: tuple):
        super().__init__()
        self.pool, self.paths = pool, []
        for branch in branches:
            channels, path = c_in, []
            for step in branch:
                fork = step if isinstance(step, list) else [step]
                for name, *sizes in fork:
                    setattr(self, name, Unit(channels, *sizes))
                path.append([name for name, *_ in fork])
                channels = fork[0][1]
            self.paths.append(path)
        self.branch_pool = Unit(c_in, pooled, 1) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for path in self.paths:
            h = x
            for names in path:
                h = torch.cat([getattr(self, name)(h) for name in names], dim=1)
            outputs.append(h)
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], dim=1)


def _average() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _mixed_5(c_in: int, pooled: int) -> Mixed:
    return Mixed(c_in, _average(), pooled, (("branch1x1", 64, 1),),
                 (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
                 (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)))


def _mixed_6(c_in: int, c: int) -> Mixed:
    return Mixed(c_in, _average(), 192, (("branch1x1", 192, 1),),
                 (("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))),
                 (("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)),
                  ("branch7x7dbl_3", c, (1, 7)), ("branch7x7dbl_4", c, (7, 1)),
                  ("branch7x7dbl_5", 192, (1, 7))))


def _mixed_7(c_in: int, pool: nn.Module) -> Mixed:
    return Mixed(c_in, pool, 192, (("branch1x1", 320, 1),),
                 (("branch3x3_1", 384, 1),
                  [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]),
                 (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
                  [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]))


class Inception(nn.Module):
    """The Inception v3 of FID, from 2015, without its classifier; names are the weight file's keys.

    It is not torchvision's: averages leave padding out, and the last block pools by maximum.
    """

    def __init__(self):
        super().__init__()
        self.protocol = {"network": "Inception v3 (2015-12-05), 2048 features of the last pooling",
                         "resize": "299 x 299, bilinear, align_corners=False, no antialias"}
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c = _mixed_5(192, 32), _mixed_5(256, 64)
        self.Mixed_5d = _mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, nn.MaxPool2d(3, 2), 0, (("branch3x3", 384, 3, 2),),
                              (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3),
                               ("branch3x3dbl_3", 96, 3, 2)))
        self.Mixed_6b, self.Mixed_6c = _mixed_6(768, 128), _mixed_6(768, 160)
        self.Mixed_6d, self.Mixed_6e = _mixed_6(768, 160), _mixed_6(768, 192)
        self.Mixed_7a = Mixed(768, nn.MaxPool2d(3, 2), 0,
                              (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)),
                              (("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
                               ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)))
        self.Mixed_7b = _mixed_7(1280, _average())
        self.Mixed_7c = _mixed_7(2048, nn.MaxPool2d(3, stride=1, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 to features (B, 2048)."""
        x = F.interpolate(pictures.float() / 255, (299, 299), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))      # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)                                              # (B, 192, 35, 35)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))                                                  # (B, 2048)


def find_inception(given: str = "") -> Path | None:
    """The weight file given, else one in ./weights or in torch's cache, else None."""
    if given:
        return path_of(given)
    folders = (Path("weights"), Path(torch.hub.get_dir()) / "checkpoints")
    return next((f / INCEPTION for f in folders if (f / INCEPTION).is_file()), None)


def load_inception(path: str | Path, device: str | torch.device = "cpu") -> Inception:
    """FID's Inception in float32, eval mode. Raises BadInput where the file is not the one."""
    path = Path(path)
    digest = ppdd.fingerprint(path) if path.is_file() else ""
    if digest != INCEPTION_SHA:
        found = f"has SHA-256 {digest[:8]}…, not {INCEPTION_SHA[:8]}…" if digest else "is no file"
        raise BadInput(f"{path} {found}: pass {INCEPTION} from pytorch-fid's releases")
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = Inception()
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    network.protocol = {**network.protocol, "sha256": digest}
    return network.to(device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------- CLIP

VIT_G = "ViT-g-14:laion2b_s34b_b88k"


class Clip:
    """An open_clip model; called, it is `images`, so that it serves as an extractor of features."""

    def __init__(self, name: str, model: nn.Module, preprocess: Callable, tokenizer: Callable,
                 digest: str):
        """preprocess is open_clip's own for PIL pictures, of which its normalisation is last."""
        self.name, self.model, self.tokenizer = name, model, tokenizer
        *self.spatial, self.normalise = preprocess.transforms
        moves = [str(s) for s in self.spatial if not type(s).__name__.startswith("Maybe")]
        self.protocol = {"network": f"{name}, normalised image features", "sha256": digest,
                         "resize": "; ".join(moves), "normalisation": str(self.normalise)}

    def prepare(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to what the model reads: open_clip's own steps, on the whole batch.

        Equal to its preprocessing of PIL pictures where nothing is resized; where something is,
        torchvision's 8-bit bicubic stands in for Pillow's: some pixels differ by a level or two.
        """
        for step in self.spatial:
            pictures = step(pictures)
        return self.normalise(pictures.float() / 255)

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        """Features (B, d), float32, of length 1, of pictures (B, 3, H, W) uint8."""
        x = self.prepare(pictures.to(next(self.model.parameters()).device))
        return F.normalize(self.model.encode_image(x).float(), dim=1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Features (B, d), float32, of length 1, of B texts; what is past 77 tokens is not read."""
        ids = self.tokenizer(texts).to(next(self.model.parameters()).device)   # (B, L), padded by 0
        return F.normalize(self.model.encode_text(ids).float(), dim=1)

    __call__ = images


def load_clip(spec: str, device: str | torch.device = "cpu") -> Clip:
    """The CLIP "mini", MODEL:TAG of open_clip or MODEL:FILE, in float32 and eval mode.

    Raises BadInput where there is no such model, or its weights are not to be had.
    """
    try:
        import open_clip
    except ImportError as error:
        raise BadInput("CLIP needs a package that is missing: pip install open_clip_torch "
                       f"({error})") from None
    with quiet():
        clip = _load_mini_clip(open_clip) if spec == "mini" else _load_open_clip(open_clip, spec)
    clip.model.to(device).eval().requires_grad_(False)
    return clip


def _load_mini_clip(open_clip) -> Clip:
    folder = ppdd.MINI.parent
    model = open_clip.CLIP(**json.loads((folder / "clip.json").read_text()))
    model.load_state_dict(load_file(folder / "clip.safetensors"))
    # it was trained on pixels as they are, in 0 … 1
    preprocess = open_clip.image_transform(64, is_train=False, mean=(0., 0., 0.), std=(1., 1., 1.))
    return Clip("the miniature's CLIP", model, preprocess, open_clip.SimpleTokenizer(),
                ppdd.fingerprint(folder / "clip.safetensors"))


def _load_open_clip(open_clip, spec: str) -> Clip:
    name, _, weights = spec.partition(":")
    if name not in open_clip.list_models() or not weights:
        raise BadInput(f"--clip {spec}: MODEL:TAG, MODEL:FILE or mini, for example {VIT_G}")
    known, file = open_clip.get_pretrained_cfg(name, weights), path_of(weights)
    if not known and not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise BadInput(f"--clip {spec}: there is no such file, nor such a tag of {name} ({tags})")
    try:
        file = Path(open_clip.download_pretrained(known)) if known else file
        # a file of weights can't say that it wants the quick GELU: OpenAI's do, known here by
        # their name or, in the hub's cache, by the repository's, and of others MODEL-quickgelu says
        # so; which one was used is in the result
        places = [weights] if known else [file.name, *(
            part for part in file.absolute().parts if part.startswith("models--"))]
        quick = known.get("quick_gelu", False) or "openai" in "".join(places).lower()
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=weights if known else str(file), force_quick_gelu=quick,
            weights_only=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:          # from the network, the hub, torch.load or load_state_dict
        reason = textwrap.shorten(str(error), 140, placeholder=" …")
        raise BadInput(f"--clip {spec} can't be loaded ({reason}): pass weights you have as "
                       f"--clip {name}:FILE, .safetensors or a plain state dict") from None
    clip = Clip(spec, model, preprocess, tokenizer, ppdd.fingerprint(file))
    kinds = {type(m).__name__ for m in model.modules()} & {"GELU", "QuickGELU"}
    clip.protocol["activation"] = " and ".join(sorted(kinds))
    return clip


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines of libraries: what goes wrong is said in a sentence of ours."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def clip_scores(clip: Clip, pictures: Tensor, texts: list[str]) -> Tensor:
    """(B,) cosine between each of B pictures (B, 3, H, W) uint8 and its text."""
    return (clip.images(pictures) * clip.texts(texts)).sum(1)


def identity(name: str, features: Callable) -> str:
    """The name of a distance and of the very weights that its features come from."""
    return f"{name}, weights {features.protocol['sha256'][:8]}"


def extractor(config: Config, base_is_mini: bool) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What the distance is called, and the network whose features it compares.

    FID where Inception's weights are given, or, but for the miniature, found; else CLIP-FID, named
    with its CLIP. For the command `fid`, --clip alone asks for CLIP-FID. The network's `protocol`
    says what it is.
    """
    clip_asked = base_is_mini or (config.command == "fid" and config.clip)
    path = None if clip_asked and not config.inception else find_inception(config.inception)
    if path:
        return "FID", load_inception(path, config.device)
    try:
        clip = load_clip(config.clip or ("mini" if base_is_mini else VIT_G), config.device)
    except BadInput as error:
        raise BadInput(f"{error}; or, for FID, pass --inception {INCEPTION}") from None
    return f"CLIP-FID ({clip.name})", clip


# ------------------------------------------------------------------------------- pictures, prompts

THREADS, AHEAD = 4, 3           # that decode pictures, and how many batches they may be ahead
SHEET = re.compile(r"(grid|compare)(-\d+)?\.png")


def path_of(given: str | Path) -> Path:
    """The path given, with ~ for the home folder, where there is one."""
    return Path(os.path.expanduser(given))


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures below a folder, "9.png" before "10.png"; raises BadInput where there are none.

    Contact sheets of sample.py are not among them.
    """
    folder = path_of(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such folder")
    kinds = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [p for p in folder.rglob("*") if p.suffix.lower() in kinds and p.is_file()
             and not p.name.startswith(".") and not (SHEET.fullmatch(p.name) and _is_sheet(p))]
    if not files:
        raise BadInput(f"{folder}: there are no pictures in it")
    return sorted(files, key=lambda p: _natural(str(p.relative_to(folder))))


def _natural(name: str) -> tuple:
    """A key by which numbers in names are ordered as numbers, and before letters."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], name


def _is_sheet(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return "ppdd" in image.info and "sheet" in image.info
    except OSError:
        return False


def read_picture(path: Path) -> Tensor | None:
    """(3, H, W) uint8, transparency dropped; None for what can't be read."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception:                   # decoders of broken files raise all kinds
        return None


def pictures_in(folder: str | Path, batch: int, skip_bad: bool = False,
                cure: str = "take them out, or pass --skip-bad"
                ) -> Iterator[tuple[list[Path], Tensor]]:
    """Paths and pictures (B, 3, H, W) uint8 of a folder, in natural order, B at most `batch`.

    Threads decode ahead. Neighbours of one size share a batch. Pictures that can't be read are
    named and counted at the end, on stderr with skip_bad, else in a BadInput; after the first of
    them the rest is only looked through.
    """
    files, bad = picture_files(folder), []
    for read in _decoded(files, batch):
        bad += [path for path, picture in read if picture is None]
        if skip_bad or not bad:
            good = [(path, picture) for path, picture in read if picture is not None]
            for _, same in groupby(good, key=lambda item: item[1].shape):
                paths, pictures = zip(*same)
                yield list(paths), torch.stack(pictures)
    _report_bad(bad, len(files), skip_bad, cure)


def _decoded(files: list[Path], batch: int) -> Iterator[list[tuple[Path, Tensor | None]]]:
    """Batches of files with their pictures, of which some more are being decoded meanwhile."""
    ahead: deque = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for i in range(0, len(files), batch):
            chunk = files[i:i + batch]
            ahead.append(zip(chunk, pool.map(read_picture, chunk)))        # starts at once
            if len(ahead) > AHEAD:
                yield list(ahead.popleft())
        while ahead:
            yield list(ahead.popleft())


def _report_bad(bad: list[Path], total: int, skip_bad: bool, cure: str) -> None:
    if not bad:
        return
    named = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
    said = f"{len(bad)} of {total} pictures can't be read: {named}"
    if not skip_bad or len(bad) == total:
        raise BadInput(f"{said}; {cure}")
    print(f"warning: {said}; left out", file=sys.stderr)


def read_prompts(path: str | Path, count: int = 0, seed: int = 0) -> list[str]:
    """The prompts of a file, or `count` of them drawn by seed, in the file's order.

    A text has one a line; COCO's captions .json give one caption an image, chosen by seed, in the
    order of image ids; the first line of a .tsv or .csv names a column `caption`, `text` or
    `prompt`. Blank ones are passed over. Raises BadInput.
    """
    path = path_of(path)
    readers = {".json": _coco_captions, ".csv": _captions_in_table, ".tsv": _captions_in_table}
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = readers.get(path.suffix.lower(), _lines)(path, text, random.Random(seed))
    except UnicodeDecodeError:
        raise BadInput(f"--prompts {path}: not a UTF-8 text") from None
    except FileNotFoundError:
        raise BadInput(f"--prompts {path}: there is no such file") from None
    prompts = [prompt for prompt in (" ".join(said.split()) for said in found) if prompt]
    if not prompts:
        raise BadInput(f"--prompts {path}: there is no prompt in it")
    if count > len(prompts):
        raise BadInput(f"--count {count}: {path} holds {len(prompts)} prompts only")
    rows = sorted(random.Random(seed).sample(range(len(prompts)), count or len(prompts)))
    return [prompts[i] for i in rows]


def _lines(path: Path, text: str, rng: random.Random) -> list[str]:
    return text.split("\n")


def _coco_captions(path: Path, text: str, rng: random.Random) -> list[str]:
    try:
        said: dict[int, list] = {}
        for a in sorted(json.loads(text)["annotations"], key=lambda a: (a["image_id"], a["id"])):
            said.setdefault(a["image_id"], []).append(str(a["caption"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"--prompts {path}: no captions as in COCO's captions_val2014.json "
                       f"({type(error).__name__}: {error})") from None
    return [rng.choice(captions) for captions in said.values()]


def _captions_in_table(path: Path, text: str, rng: random.Random) -> list[str]:
    tabs = path.suffix[1] in "tT"                    # where quotation marks are the text's own
    table = csv.DictReader(io.StringIO(text), delimiter="\t" if tabs else ",",
                           quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    try:
        names = {name.strip().lower(): name for name in table.fieldnames or ()}
        named = [names[k] for k in ("caption", "text", "prompt") if k in names]
        refuse((not named, f"--prompts {path}: no column is called caption, text or prompt; name "
                           "the one that is in the first line"))
        return [row[named[0]] or "" for row in table]
    except csv.Error as error:
        raise BadInput(f"--prompts {path}: a table that can't be read ({error})") from None


def prompt_in(path: Path) -> str:
    """The prompt in a PNG's chunk `parameters`, as sample.py and popular interfaces write it."""
    try:
        with Image.open(path) as image:
            said = str(image.info.get("parameters", ""))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        said = ""
    return said.rpartition("\nSteps: ")[0].partition("\nNegative prompt: ")[0]


# ------------------------------------------------------------------------------- results

def write_json(path: str | Path, value) -> None:
    """The value as JSON, indented, written aside and renamed."""
    with ppdd.written(path) as temporary:
        text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def save_png(path: Path, image: Image.Image) -> None:
    """A PNG, written aside and renamed."""
    with ppdd.written(path) as temporary:
        image.save(temporary, "PNG")


def table(head: Iterable, rows: Iterable[Iterable], align: str = "---") -> list[str]:
    """The lines of a Markdown table whose first column has names."""
    head, *rows = ([str(cell) for cell in line] for line in (head, *rows))
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return [lines[0], "|---" + f"|{align}" * (len(head) - 1) + "|", *lines[1:]]


def hardware(device: str | torch.device = "cpu") -> str:
    """What computes: the GPU's name, or the CPU threads in use and the kind of machine."""
    kind = torch.device(device).type
    if kind != "cpu":
        return torch.cuda.get_device_name(device) if kind == "cuda" else kind
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' * (threads > 1)}, {platform.machine()}"


def surroundings(config: Config | SpeedConfig, *more: str) -> dict:
    """What every result file says of how it came about; a broken installation has no name."""
    there = {(d.name or "").lower().replace("-", "_"): d.version for d in distributions()}
    packages = ("torch", "numpy", "scipy", "pillow", "open_clip_torch", *more)
    return {"settings": asdict(config), "hardware": hardware(config.device),
            "versions": {package: there.get(package) for package in packages},
            "commit": ppdd.commit()}


def result_file(config: Config) -> Path:
    """Where the JSON goes; --quick never overwrites a real result."""
    if not config.quick:
        return path_of(config.out or f"results/{config.command}.json")
    path = path_of(config.out or PICTURES / f"{config.command}.json")
    return path.with_stem(f"{path.stem.removesuffix('-quick')}-quick")


def finish(file: Path, result: dict, page: str = "") -> None:
    """Writes a result as JSON, and where there is a page of Markdown prints and writes it too."""
    write_json(file, result)
    if page:
        with ppdd.written(file.with_suffix(".md")) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    print(page or f"written to {file}")


# ------------------------------------------------------------------------------- eval.py fid, clip

FEW = 2048                      # pictures under which FID's bias is large


def run_fid(config: Config) -> None:
    """`fid A B`: the distance between two sets of pictures, each a folder or an .npz."""
    paths = [path_of(path) for path in config.paths]
    refuse((len(paths) != 2 and not (len(paths) == 1 and config.save),
            "fid takes two folders of pictures or .npz files, or one and --save FILE"))
    folders = [path for path in paths if path.suffix.lower() != ".npz"]
    known = {path: Statistics.load(path) for path in paths if path not in folders}
    name, features = "", None
    for folder in folders:
        picture_files(folder)
    if folders:
        mini = of_miniature(folders[0]) and not find_inception(config.inception)
        if mini:
            print("the pictures are 64 x 64: taken for the miniature's, and read by its own CLIP; "
                  "--inception FILE gives their FID", file=sys.stderr)
        name, features = extractor(config, mini)
    sets = [known.get(path) or measured(config, path, name, features) for path in paths]
    if config.save:
        file = path_of(config.save)
        file = file if file.suffix.lower() == ".npz" else file.with_name(f"{file.name}.npz")
        sets[0].save(file)
        print(f"statistics of {sets[0].n or 'some'} pictures in {file}")
    if len(sets) == 2:
        report_distance(config, paths, sets, features)


def measured(config: Config, folder: Path, name: str, features: Callable) -> Statistics:
    """The statistics of a folder's pictures."""
    taken, total = Statistics(of=identity(name, features)), len(picture_files(folder))
    with tqdm(total=total, unit="picture", desc=folder.name, leave=False) as bar:
        for _, pictures in pictures_in(folder, config.batch, config.skip_bad):
            taken.add(features(pictures.to(config.device)))
            bar.update(len(pictures))
    return taken


def of_miniature(folder: Path) -> bool:
    """Whether a folder's first picture has the miniature's size, 64 x 64: its own CLIP reads it."""
    files = picture_files(folder)
    first = next((p for p in map(read_picture, files) if p is not None), None)
    if first is None:
        raise BadInput(f"{folder}: none of its {len(files)} pictures can be read")
    return first.shape[1:] == (64, 64)


def report_distance(config: Config, paths: list[Path], sets: list[Statistics],
                    features: Callable | None) -> None:
    """Prints and writes the distance, by the name of the features it is a distance of."""
    names = list(dict.fromkeys(s.of for s in sets if s.of))
    if len(names) > 1:
        raise BadInput(f"{paths[0]} and {paths[1]} hold features of different networks: "
                       f"{names[0]}; {names[1]}")
    name = (names or ["Fréchet distance of unnamed features"])[0].partition(", weights")[0]
    value = frechet(*sets)
    counts = [f"{s.n:,}" if s.n else "an unknown number of" for s in sets]
    print(f"{name}: {value:.4f}\nbetween {counts[0]} pictures of {paths[0]} and {counts[1]} of "
          f"{paths[1]}")
    for sentence in doubts(sets, name):
        print(f"warning: {sentence}", file=sys.stderr)
    network = features.protocol if features else "as in the .npz files"
    sides = [described(p, s) for p, s in zip(paths, sets)]
    finish(result_file(config), {"score": name, "value": value, "network": network,
                                 "sets": sides} | surroundings(config))


def described(path: Path, side: Statistics) -> dict:
    """One side of a distance, in the result file."""
    if path.is_dir():
        return {"folder": str(path), "pictures": side.n,
                "left out": len(picture_files(path)) - side.n}
    return {"file": str(path), "pictures": side.n or None, "sha256": ppdd.fingerprint(path)}


def doubts(sets: list[Statistics], name: str) -> list[str]:
    """Why a distance should not be trusted, in sentences."""
    n, d = min((s.n for s in sets if s.n), default=0), sets[0].mean.size
    said = {f"FID of {n} pictures is biased upwards: take at least {FEW:,}, and compare it only "
            "with FIDs of as many": 0 < n < FEW and name == "FID",
            f"{n} pictures can't fill {d} dimensions: the covariance is singular": 0 < n <= d}
    return [sentence for sentence, holds in said.items() if holds]


def run_clip(config: Config) -> None:
    """`clip DIR --prompts FILE`: the CLIP score of pictures; prompt k belongs to the k-th."""
    refuse((len(config.paths) != 1, "clip takes one folder of pictures, and --prompts FILE"))
    folder = path_of(config.paths[0])
    prompts = prompts_of(config, picture_files(folder))
    spec = config.clip or ("mini" if of_miniature(folder) else VIT_G)
    clip, cosines = load_clip(spec, config.device), []
    with tqdm(total=len(prompts), unit="picture", leave=False) as bar:
        for paths, pictures in pictures_in(folder, config.batch, config.skip_bad):
            cosines += clip_scores(clip, pictures, [prompts[path] for path in paths]).tolist()
            bar.update(len(paths))
    cosine, spread = float(np.mean(cosines)), float(np.std(cosines, ddof=len(cosines) > 1))
    print(f"CLIP score ({clip.name}): {100 * cosine:.3f}, cosine {cosine:.5f} ± {spread:.5f} from "
          f"picture to picture\nof {len(cosines):,} pictures of {folder}")
    finish(result_file(config), {
        "score": f"CLIP score ({clip.name}), 100 cos", "value": 100 * cosine, "cosine": cosine,
        "deviation": spread, "pictures": len(cosines), "left out": len(prompts) - len(cosines),
        "network": clip.protocol} | surroundings(config))


def prompts_of(config: Config, files: list[Path]) -> dict[Path, str]:
    """Each picture's prompt, from the file of prompts, else from the picture itself."""
    if not config.prompts:
        prompts = {path: prompt_in(path) for path in files}
        without = next((path for path, prompt in prompts.items()
                        if not prompt and read_picture(path) is not None), None)
        if without:
            raise BadInput(f"{without} does not say its prompt: pass --prompts FILE, one a line")
        return prompts
    prompts = read_prompts(config.prompts, 0, config.seed)
    if len(prompts) != len(files):
        raise BadInput(f"--prompts {config.prompts} has {len(prompts)} prompts, and there are "
                       f"{len(files)} pictures: prompt k belongs to the k-th picture")
    return dict(zip(files, prompts))


# ------------------------------------------------------------------------------- Table 1

STEPS = (8, 16, 50)
PAPER_TABLE1 = {                # parameters in millions; "FLOPs (trillion)", which are GMACs
    "base UNet": (859, 338.7), "teacher": (859, 677.5), "full guide": (361, 116.5),
    "tiny guide": (8.27, 7.79)}


class Networks(NamedTuple):
    """All networks on the meta device, which has shapes and no numbers, and one latent's side."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    full: ppdd.FullGuide
    tiny: ppdd.TinyGuide
    side: int


def build_networks(size: str) -> Networks:
    """Stable Diffusion 1.5 at 512 pixels, or "mini": the miniature at 64; guides as by default."""
    unet, vae, text, side = UNetConfig(), VAEConfig(), TextConfig(), 64
    if size == "mini":
        base = ppdd.load_base(ppdd.MINI)
        unet, vae, text, side = base.unet.config, base.vae.config, base.text.config, 8
    with torch.device("meta"):
        return Networks(UNet(unet), VAE(vae), TextEncoder(text), ppdd.FullGuide(unet),
                        ppdd.TinyGuide(unet), side)


class Arithmetic(NamedTuple):
    """Multiply-accumulates of one call: of convolutions and linear layers, and of everything."""

    layers: int
    all: int


@torch.no_grad()
def arithmetic(call: Callable[[], object]) -> Arithmetic:
    """Counts what a call on meta tensors would compute.

    Layers are counted by a hook on every Conv2d and Linear that runs; everything, by PyTorch's own
    counter, which sees matrix products and convolutions wherever they are, attention's as well.
    """
    layers = 0

    def count(module: nn.Module, _, output: Tensor) -> None:
        nonlocal layers
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers += output.numel() * module.weight[0].numel()

    hook = register_module_forward_hook(count)
    try:
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            call()
    finally:
        hook.remove()
    return Arithmetic(layers, counter.get_total_flops() // 2)


def passes(nets: Networks) -> dict[str, Arithmetic]:
    """One pass of each network for one picture, of the tiny guide in two ways of running it."""
    z, t, g, c, emb = _inputs(nets)
    skips, middle = nets.unet.encode(z, emb, c)
    positions = [x[0, 0].numel() for x in (*skips, middle)]
    calls = {
        "base UNet": lambda: nets.unet(z, t, c),
        "teacher": lambda: [nets.unet(z, t, c) for _ in range(2)],
        "full guide": lambda: nets.full(g, emb, c, z, t),
        "tiny guide, on maps": lambda: tiny_on_maps(nets.tiny, emb, c, positions),
        "tiny guide, as computed": lambda: nets.tiny(g, emb, c),
        "hint encoder": lambda: nets.full.hint(g, z),
        "VAE decoder": lambda: nets.vae.decode(z),
        "text encoder": lambda: nets.text(_ids(nets)),
    }
    told = {name: arithmetic(call) for name, call in calls.items()}
    tiny = told["tiny guide, as computed"]       # Θ_z2 is no layer there: `TinyGuide.read_text`
    return told | {"tiny guide, as computed": tiny._replace(
        layers=tiny.layers + nets.tiny.theta_z2.weight.numel())}


def tiny_on_maps(tiny: ppdd.TinyGuide, emb: Tensor, c: Tensor, positions: list[int]) -> None:
    """Eq. 5 as convolutions over maps: of its readings, the one nearest to the paper's figure.

    The timestep goes through Θ_z1 at every position of the latent, the text through Θ_z2 token by
    token, and their sum through each Θ_z3 at every position of its injection point.
    """
    tiny.theta_z1(emb.expand(positions[0], -1))
    tiny.theta_z2(c[0])
    for theta, n in zip(tiny.theta_z3, positions):
        theta(torch.empty(n, theta.in_features))


def picture_cost(nets: Networks, method: str) -> dict[int, int]:
    """MACs of one picture at 8, 16 and 50 steps, from prompt to pixels, as `ppdd.sample` computes.

    method is cfg, full or tiny. What is computed once a run (the full guide's hint, the empty
    prompt, decoding) is counted once. The cost is affine in the steps: one and two tell the rest.
    """
    z, *_ = _inputs(nets)
    guide = {"full": nets.full, "tiny": nets.tiny}.get(method)

    def paint(n: int) -> None:
        c = nets.text(_ids(nets))
        empty = nets.text(_ids(nets)) if method == "cfg" else None
        nets.vae.decode(ppdd.sample(nets.unet, z, c, 8.0, n, guide, empty))

    one, two = arithmetic(lambda: paint(1)).all, arithmetic(lambda: paint(2)).all
    return {n: one + (n - 1) * (two - one) for n in STEPS}


def _inputs(nets: Networks) -> tuple[Tensor, ...]:
    """z, t, g, c and a time embedding for one picture."""
    base = nets.unet.config
    shapes = ((1, base.in_channels, nets.side, nets.side), (1,), (1,),
              (1, nets.text.config.positions, base.context_dim), (1, 4 * base.model_channels))
    return tuple(torch.empty(shape, device="meta") for shape in shapes)


def _ids(nets: Networks) -> Tensor:
    return torch.empty(1, nets.text.config.positions, dtype=torch.long, device="meta")


def run_table1(config: Config) -> None:
    """`table1`: the paper's Table 1 beside what the modules themselves have and compute."""
    refuse((config.size not in ("", "mini"),
            f"--size {config.size}: table1 takes mini, or nothing for SD 1.5"))
    nets = build_networks(config.size)
    once = passes(nets)
    result = {
        "of": "the miniature, 64 x 64" if config.size else "Stable Diffusion 1.5, 512 x 512",
        "rows": table1_rows(nets, once, with_paper=not config.size),
        "notes": table1_notes(nets, once),
        "GMACs a picture": {method: {str(steps): macs / 1e9 for steps, macs in
                                     picture_cost(nets, method).items()}
                            for method in ("cfg", "full", "tiny")},
        "GMACs once a picture": {name: once[name].all / 1e9 for name in
                                 ("VAE decoder", "text encoder", "hint encoder")},
    }
    finish(result_file(config), result | surroundings(config))
    print(table1_markdown(result))


def table1_rows(nets: Networks, once: dict[str, Arithmetic], with_paper: bool) -> list[dict]:
    """One row a network: parameters, GMACs, and by how many percent they are off the paper's."""
    modules = {"base UNet": nets.unet, "teacher": nets.unet, "full guide": nets.full,
               "tiny guide, on maps": nets.tiny, "tiny guide, as computed": nets.tiny}
    rows = []
    for name, module in modules.items():
        row = {"network": name, "parameters": sum(p.numel() for p in module.parameters()),
               "GMACs": once[name].layers / 1e9, "GMACs with attention": once[name].all / 1e9}
        paper = PAPER_TABLE1.get(name.partition(",")[0]) if with_paper else None
        if paper:
            row["paper"] = {"parameters": paper[0] * 1e6, "GMACs": paper[1]}
            row["off by %"] = {k: 100 * (row[k] / v - 1) for k, v in row["paper"].items()}
        rows.append(row)
    return rows


def table1_notes(nets: Networks, once: dict[str, Arithmetic]) -> dict[str, str]:
    """What a reader must know of a row, and why it is off the paper's by more than 0.1 %."""
    queries = nets.tiny.query.numel()
    plain = sum(p.numel() for p in nets.tiny.parameters()) - queries
    tokens, positions = nets.text.config.positions, nets.side ** 2
    return {
        "teacher": "Two passes of the base.",
        "full guide": f"With its hint encoder, {_giga(once['hint encoder'].all)} G, which here "
                      "runs once a picture and not once a step.",
        "tiny guide, on maps":
            f"{plain:,} parameters are Eq. 5's; {queries:,} more are the queries by which the text "
            "becomes a vector, which the paper leaves open. Its arithmetic the paper does not "
            f"explain either. Nearest to its figure comes Θ_z1 at all {positions:,} positions of "
            f"the latent, Θ_z2 on all {tokens} tokens and Θ_z3 at every position of its injection "
            "point: what is counted here.",
        "tiny guide, as computed":
            "Eq. 5 says the same at every position, so vectors do; their addition to the features "
            "broadcasts. The text's pooling is in the column with attention.",
    }


def table1_markdown(result: dict) -> str:
    """Table 1 and the cost of pictures, in Markdown."""
    pictures, titles = result["GMACs a picture"], {"cfg": "CFG"}
    costs = [[titles.get(method, f"{method} guide"),
              *(f"{_giga(g * 1e9)} ({g / pictures['cfg'][k]:.0%})" for k, g in cost.items())]
             for method, cost in pictures.items()]
    said = ", ".join(f"{name} {_giga(g * 1e9)}" for name, g in
                     result["GMACs once a picture"].items())
    return "\n".join([
        f"Table 1: {result['of']}. GMACs of convolutions and linear layers, one pass; the paper "
        "calls them FLOPs (trillion).", "",
        *table(["", "parameters", "paper, M", "off", "GMACs", "paper", "off", "with attention"],
               map(_table1_row, result["rows"]), "---:"),
        "", *(f"- *{name}*: {note}" for name, note in result["notes"].items()), "",
        "GMACs a picture, with attention, text encoder and VAE decoder; in brackets beside CFG of "
        "as many steps.", "", *table(["", *(f"{n} steps" for n in STEPS)], costs, "---:"), "",
        f"Once a picture: {said} (CFG encodes two texts; only the full guide has a hint)."])


def _table1_row(row: dict) -> list[str]:
    paper, off = row.get("paper"), row.get("off by %")
    beside = ([f"{paper['parameters'] / 1e6:g}", f"{off['parameters']:+.2f} %",
               f"{paper['GMACs']:g}", f"{off['GMACs']:+.2f} %"] if paper else [""] * 4)
    return [row["network"], f"{row['parameters']:,}", *beside[:2], _giga(row["GMACs"] * 1e9),
            *beside[2:], _giga(row["GMACs with attention"] * 1e9)]


def _giga(macs: float) -> str:
    """In 10⁹, five digits, or six places where it is small."""
    return f"{macs / 1e9:,.5g}" if macs >= 1e6 else f"{macs / 1e9:.6f}"


# ------------------------------------------------------------------------------- ways of sampling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GUIDES = ("full", "full-16", "full-8", "tiny", "tiny-16", "tiny-8", "tiny-8-g8")   # the paper's
OURS = ("tiny-gated", "tiny-gated-16", "tiny-gated-8")
PICTURES = Path("runs/eval")
JUDGED = "judge on real pictures, %"
STAGE_ONE = 50                  # steps of a guide that was never halved, and of the teacher
FIRST, SEED_STEP = 10**9, 10**6 # picture k of seed s starts from noise FIRST + SEED_STEP · s + k
REAL_SEED = 7                   # of the postcards to compare with; training has others


class Row(NamedTuple):
    """One way of sampling: a row of Table 2."""

    name: str                           # in result files and folders: cfg-50, tiny-8
    title: str
    kind: str                           # none, cfg, full or tiny
    steps: int
    sampler: str = "ddim"
    guide: nn.Module | None = None
    file: Path | None = None            # the guide's, and its SHA-256
    guide_hash: str = ""
    only_g: float | None = None         # the one g that it is made for; no guidance is g = 0
    plain: bool = True                  # of stage one, for any g, against the empty prompt

    @property
    def passes(self) -> tuple[int, int]:
        """Passes of the UNet and of the guide for one picture; PLMS takes its first step twice.

        The tiny guide never sees z_t: all its steps are computed at once, which is no pass.
        """
        n = self.steps + (self.sampler == "plms" and self.steps > 1)
        return n * (1 + (self.kind == "cfg")), n * (self.kind == "full")

    @property
    def source(self) -> str | None:
        """The guide's file and its hash, as results say them."""
        return f"{os.path.relpath(self.file)}, SHA-256 {self.guide_hash}" if self.file else None


PLAIN = (Row("none-50", "no guidance, 50 steps", "none", 50, only_g=0.0),
         Row("cfg-50", "CFG, DDIM, 50 steps", "cfg", 50),
         Row("cfg-16", "CFG, DDIM, 16 steps", "cfg", 16),
         Row("cfg-8", "CFG, DDIM, 8 steps", "cfg", 8),
         Row("cfg-plms-50", "CFG, PLMS, 50 steps", "cfg", 50, "plms"))


def methods(config: Config, base: Base, guides: tuple[str, ...] = ()) -> list[Row]:
    """Rows for a base: without guidance, CFG, and those of `guides`, else all, that are there."""
    rows = [*PLAIN]
    for name in dict.fromkeys((*(guides or (*GUIDES, *OURS)), *config.guides)):
        try:
            row = guide_row(config, base, name)
            refuse((row.name in {other.name for other in rows},
                    f"{row.file} has the name of another guide: rename the file"))
            rows.append(row)
        except (BadInput, CheckpointError) as error:
            if name in config.guides:
                raise
            if rank() == 0 and name not in OURS:
                print(f"a row is left out: {error}")
    return rows


def guide_row(config: Config, base: Base, name: str) -> Row:
    """The guide of that name, or in that file, with what it says of itself."""
    path = find_guide(base, name)
    made, about = ppdd.read_about(path)
    guide = ppdd.load_guide(path, base.unet.config, dtype_of(config), config.device)
    ppdd.pack(guide)
    steps, (low, high) = about.get("steps") or STAGE_ONE, about.get("g_range") or (0, 1)
    only_g = low if low == high else None
    title = f"{path.stem.removesuffix(f'-g{low:g}').removesuffix(f'-{steps}')} guide, {steps} steps"
    title += "" if only_g is None else f", trained at g = {low:g} only"
    plain = not about.get("steps") and only_g is None and not about.get("uncond")
    return Row(path.stem, title, made.kind, steps, "ddim", guide, path, ppdd.fingerprint(path),
               only_g, plain)


def find_guide(base: Base, name: str) -> Path:
    """guides/BASE/NAME.safetensors; for small bases also the bundled ones, in mini/guides."""
    if name.endswith(".safetensors"):
        return path_of(name)
    places = [Path("guides") / base.name / f"{name}.safetensors"]
    if is_mini(base):
        places.append(ppdd.MINI.parent / "guides" / f"{name}.safetensors")
    for place in places:
        if place.is_file():
            return place
    raise BadInput(f"there is no {places[0]}; train.py makes guides")


def is_mini(base: Base) -> bool:
    """Whether the base is the miniature or as small, and paints postcards of 64 pixels."""
    return base.unet.config.model_channels < 256


def paint(base: Base, row: Row, prompts: list[str], g: float, seeds: Iterable[int],
          size: int) -> Tensor:
    """Pictures (B, 3, size, size) uint8, on the CPU: one a prompt, from noise of its own seed."""
    c = base.embed(prompts)                                                        # (B, L, D)
    empty = base.embed([""]).expand_as(c) if row.kind == "cfg" else None
    shape = (base.unet.config.in_channels, size // 8, size // 8)
    z = ppdd.noise(seeds, shape).to(c.device)                                      # (B, Z, H, W)
    z = ppdd.sample(base.unet, z, c, g, row.steps, row.guide, empty, row.sampler)
    return base.decode(z).cpu()


# ------------------------------------------------------------------------------- processes

@contextmanager
def together(config: Config) -> Iterator[Config]:
    """Meets the other processes of torchrun, each on a GPU of its own where there are GPUs."""
    if world() == 1:
        yield config
        return
    cuda, local = config.device.startswith("cuda"), int(os.environ.get("LOCAL_RANK", -1))
    refuse((local < 0 or (cuda and local >= torch.cuda.device_count()),
            "start several processes with torchrun, and at most one a GPU"))
    if cuda:
        config = replace(config, device=f"cuda:{local}")
        torch.cuda.set_device(config.device)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    try:
        yield config
    finally:
        distributed.destroy_process_group()


def wait() -> None:
    """Until every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()


# ------------------------------------------------------------------------------- cells

class Cell(NamedTuple):
    """Pictures of one row, at one g, from one seed."""

    row: Row
    g: float
    s: int


class Bench:
    """A base, the pictures asked of it, and what they are measured by."""

    def __init__(self, config: Config, base: Base, place: int = 0):
        """place: of the base among those of the command, which may have a --real each."""
        self.config, self.base = config, base
        self.size = picture_size(config, base)
        self.hash = ppdd.fingerprint(base.path)
        self.own_captions = is_mini(base) and not config.prompts
        self.judged = self.own_captions and self.size == postcards.SIZE
        self.real = config.real[place % len(config.real)] if config.real else ""
        self.style = base.name if base.name in postcards.STYLES else postcards.STYLES[0]
        refuse((not is_mini(base) and not config.prompts,
                f"--prompts is needed with {base.name}: a text file of prompts, or COCO's "
                "captions_val2014.json"),
               (not is_mini(base) and not self.real and config.command != "match",
                f"--real is needed with {base.name}: a folder of real pictures, or their "
                "statistics as .npz"))

    def first(self, s: int) -> int:
        """The noise seed of seed s's first picture; no two seeds have one in common."""
        return FIRST + SEED_STEP * s

    def prompts(self, s: int) -> tuple[list[str], Tensor | None]:
        """The prompts of seed s, and where they are our own what they ask for, (N, 6)."""
        if self.own_captions:
            return captions(self.config.count, self.first(s) - 1)
        return self.given_prompts, None

    @cached_property
    def given_prompts(self) -> list[str]:
        """Those of --prompts, the same for every seed."""
        return read_prompts(self.config.prompts, self.config.count, self.config.seed)

    def settings(self, cell: Cell, prompts: list[str]) -> dict:
        """All that changes a cell's pictures."""
        row, told = cell.row, json.dumps(prompts).encode()
        return {"base": self.hash, "kind": row.kind, "steps": row.steps, "sampler": row.sampler,
                "guide": row.guide_hash, "g": cell.g, "first noise seed": self.first(cell.s),
                "prompts": hashlib.sha256(told).hexdigest(), "size": self.size,
                "batch": self.config.batch, "dtype": str(dtype_of(self.config)),
                "device": self.config.device.split(":")[0], "torch": torch.__version__}

    def key(self, cell: Cell) -> str:
        """A short hash of the cell's settings."""
        told = json.dumps(self.settings(cell, self.prompts(cell.s)[0])).encode()
        return hashlib.sha256(told).hexdigest()[:12]

    def folder(self, cell: Cell) -> Path:
        name = f"{cell.row.name}-g{cell.g:g}-seed{cell.s}"
        return PICTURES / self.base.name / self.key(cell) / name

    def paint(self, cell: Cell, progress: Callable[[int], object]) -> None:
        """This process's share of a cell's batches, where they are not on disk yet.

        Batch b always holds the same pictures, so neither a resumed run nor the number of
        processes changes a bit of them. progress(n) is called for every batch of n pictures.
        """
        prompts, _ = self.prompts(cell.s)
        folder, first, size = self.folder(cell), self.first(cell.s), self.config.batch
        folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0 and not (folder / "cell.json").exists():
            write_json(folder / "cell.json", self.settings(cell, prompts) | {
                "commit": ppdd.commit(), "hardware": hardware(self.config.device)})
        for b, k in enumerate(range(0, len(prompts), size)):
            part = range(k, min(k + size, len(prompts)))
            files = [folder / f"{i:05d}.png" for i in part]
            if b % world() == rank() and not all(file.exists() for file in files):
                pictures = paint(self.base, cell.row, prompts[k:k + size], cell.g,
                                 [first + i for i in part], self.size)
                for file, picture in zip(files, pictures):
                    save_png(file, to_image(picture))
            progress(len(part))

    # -- measuring

    @cached_property
    def clip(self) -> Clip:
        """The CLIP of the CLIP score; where the distance is a CLIP-FID, the same."""
        features = self.extractor[1]
        if isinstance(features, Clip):
            return features
        return load_clip(self.config.clip or ("mini" if is_mini(self.base) else VIT_G),
                         self.config.device)

    @cached_property
    def extractor(self) -> tuple[str, Callable[[Tensor], Tensor]]:
        return extractor(self.config, is_mini(self.base))

    @cached_property
    def judge(self) -> nn.Module:
        return load_judge()

    @cached_property
    def references(self) -> Statistics:
        """Statistics of the real pictures: those of --real, else postcards in the base's style."""
        config, (name, features) = self.config, self.extractor
        if self.real.lower().endswith(".npz"):
            real = Statistics.load(path_of(self.real))
            blank = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=config.device)
            refuse((real.of not in ("", identity(name, features)) or
                    real.mean.size != features(blank).shape[1],
                    f"--real {self.real} holds features of another network "
                    f"({real.of or f'{real.mean.size} a picture'}) than {name}"))
            return real
        real = Statistics(of=name)
        found = (pictures_in(self.real, config.batch, config.skip_bad) if self.real else
                 ((None, pictures) for pictures, _ in self.drawn))
        for _, pictures in found:
            real.add(features(pictures.to(config.device)))
        return real

    @cached_property
    def drawn(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of real postcards, (B, 3, 64, 64) uint8, and their attributes (B, 6)."""
        generator = torch.Generator().manual_seed(REAL_SEED)
        attributes = postcards.sample_attributes(self.config.references, generator)
        return [((postcards.draw(part, self.style, generator) * 255).round().byte(), part)
                for part in attributes.split(200)]

    def right(self, pictures: Tensor, attributes: Tensor) -> Tensor:
        """(B, 6) whether each attribute of pictures (B, 3, 64, 64) uint8 is as asked."""
        return self.judge.read(pictures.cpu().float() / 255) == attributes

    def measured_by(self) -> dict:
        """What the scores of this base mean."""
        (name, features), real = self.extractor, self.references
        said = {"distance": name, "features": features.protocol, "CLIP": self.clip.protocol,
                "references": self.real or f"{real.n} postcards, style {self.style}",
                "reference pictures": real.n or None,
                "reference hash": hashlib.sha256(real.mean.round(6).tobytes()).hexdigest()[:12]}
        if name == "FID" and self.config.count < FEW:
            said["warning"] = (f"FID of {self.config.count} pictures is biased upwards: compare it "
                               "only with FIDs of as many")
        if self.judged:
            hits = [self.right(*part).all(1).float() for part in self.drawn]
            said[JUDGED] = round(100 * torch.cat(hits).mean().item(), 2)
            said["judge"] = judge_hash()
        return said

    def score(self, cell: Cell) -> dict[str, float]:
        """Distance to the real pictures, CLIP score and, in percent, the shares that are right."""
        prompts, attributes = self.prompts(cell.s)
        (name, features), painted, cosines, hits = self.extractor, Statistics(), [], []
        again = "delete them, and they are painted again"
        for paths, batch in pictures_in(self.folder(cell), self.config.batch, cure=again):
            rows = [int(path.stem) for path in paths]
            painted.add(features(batch.to(self.config.device)))
            cosines.append(clip_scores(self.clip, batch, [prompts[k] for k in rows]).cpu())
            if self.judged:
                hits.append(self.right(batch, attributes[rows]))
        scores = {name.split()[0]: frechet(painted, self.references),
                  "CLIP": 100 * torch.cat(cosines).double().mean().item()}
        if hits:
            hit = torch.cat(hits).double()                                         # (N, 6)
            shares = {"accuracy": hit.prod(1).mean()} | dict(zip(postcards.ATTRIBUTES, hit.mean(0)))
            scores |= {name: 100 * share.item() for name, share in shares.items()}
        return {name: round(score, 6) for name, score in scores.items()}


def captions(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Fresh captions of postcards that name all six attributes, and those, (count, 6)."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    attributes = postcards.sample_attributes(count, generator)
    return [postcards.caption(a, rng, left_out=False) for a in attributes], attributes


def picture_size(config: Config, base: Base) -> int:
    """Side of the pictures: what was asked for, else 512, or the miniature's 64."""
    unit = 8 * 2 ** (len(base.unet.config.channel_mult) - 1)
    size = config.size or ("64" if is_mini(base) else "512")
    refuse((not size.isdecimal() or int(size) % unit or not unit <= int(size) <= 4096,
            f"--size {size}: a multiple of {unit} with {base.name}, at most 4096"))
    return int(size)


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) uint8 as Pillow's."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def summary(seeds: dict[str, dict]) -> dict:
    """Mean and spread (standard deviation, n − 1) over the seeds of every score."""
    names = [name for name, value in next(iter(seeds.values())).items()
             if not isinstance(value, str)]
    values = {name: [entry[name] for entry in seeds.values()] for name in names}
    return {"mean": {name: round(statistics.fmean(v), 6) for name, v in values.items()},
            "spread": {name: round(statistics.stdev(v), 6) if len(v) > 1 else None
                       for name, v in values.items()}, "seeds": seeds}


# ------------------------------------------------------------------------------- tables 2 and 3

ONE_G = ("table3", "fig5", "fig6", "fig8")        # commands that take one g
ASKED = ("prompts", "pictures a cell and seed", "seeds", "g", "size")   # what a file has one of
TITLES = {"table2": "Table 2: guides, CFG and their numbers of steps",
          "table3": "Table 3: guides of the plain base, plugged into fine-tuned bases untrained",
          "match": "Teacher match: ‖e − e_teacher‖² / ‖ε_c − e_teacher‖² in percent"}


def table2(config: Config) -> None:
    """Every row for one base: results/table2.json and .md."""
    with together(config) as config:
        base = load(config, ppdd.find_weights(config.weights))
        refuse((len(config.real) > 1, "--real: table2 has one base, and one set of real pictures"))
        tabulate(fill(config), methods(config, base), [base], [base.name])


def table3(config: Config) -> None:
    """The plain base's guides in fine-tuned bases, 50 steps: results/table3.json and .md."""
    paths = styles(config)
    with together(config) as config:
        first = load(config, paths[0])
        bases = (load(config, path) if k else first for k, path in enumerate(paths))
        names = [ppdd.base_name(path) for path in paths]
        tabulate(fill(config), plugged(config, first), bases, names)


def need(rows: list[Row], base: Base, what: str = "guide") -> list[Row]:
    """The rows. Raises BadInput where none of them has a guide."""
    refuse((not any(row.guide for row in rows),
            f"there is no {what} for {base.name}: train one with train.py"))
    return rows


def plugged(config: Config, base: Base) -> list[Row]:
    """No guidance, CFG and the plain base's stage-one guides, for a fine-tune of that base."""
    path = ppdd.find_weights(config.weights) if config.bases or config.weights else ppdd.MINI
    plain = replace(base, path=path)
    return [row for row in need(methods(config, plain, ("full", "tiny", *OURS[:1])), plain)
            if row.guide or (row.steps, row.sampler) == (STAGE_ONE, "ddim")]


def styles(config: Config) -> list[Path]:
    """The files of the fine-tuned bases: --bases, else the miniature's three styles."""
    if config.bases:
        paths = [path_of(path) for path in config.bases]
        names = [ppdd.base_name(path) for path in paths]
        refuse(*((not path.exists(), f"--bases: {path} does not exist") for path in paths),
               (len(set(names)) < len(names), "--bases: give each a name of its own"))
        return paths
    paths = [ppdd.MINI.parent / "styles" / f"{s}.safetensors" for s in postcards.STYLES[1:]]
    refuse(*((not path.exists(), f"there is no {path}: make the miniature's styles with "
              "`python mini/train.py --styles-only`, or pass --bases FILE ...") for path in paths))
    return paths


def load(config: Config, path: Path) -> Base:
    base = ppdd.load_base(path, dtype_of(config), config.device)
    if rank() == 0:
        print(ppdd.say_base(path, config.weights))
    ppdd.pack(base.unet, base.vae)
    return base


def dtype_of(config: Config) -> torch.dtype:
    """The base's and the guides'."""
    return DTYPES[ppdd.auto_dtype(config.device) if config.dtype == "auto" else config.dtype]


def fill(config: Config) -> Config:
    """The configuration with what suits in place of every 0 and every empty setting."""
    quick, count = config.quick, config.count
    if config.prompts and not count:
        count = len(read_prompts(config.prompts))
        count = min(8, count) if quick else count
    g = (8.0,) if config.command in ONE_G else (2.0, 8.0) if quick else (2.0, 4.0, 6.0, 8.0)
    config = replace(
        config, g=tuple(dict.fromkeys(config.g)) or g, seeds=config.seeds or (2 if quick else 3),
        count=count or (8 if quick else 64 if config.command == "match" else 300),
        references=config.references or (200 if quick else 2000),
        repeats=config.repeats or (1 if quick else 3))
    refuse((not all(abs(g) <= 1000 for g in config.g), "--g: numbers; 0 is no guidance, 8 is much"),
           (not 1 <= config.count <= SEED_STEP, f"--count {config.count}: at most {SEED_STEP}"),
           (config.command == "match" and any(abs(g) < 0.001 for g in config.g),
            "--g 0 is no guidance: nothing to match"),
           (not all(1 <= n <= SEED_STEP for n in (config.references, config.seeds, config.repeats)),
            f"--seeds, --references and --repeats: from 1 to {SEED_STEP}"))
    return config


def read_result(file: Path) -> dict:
    """What an earlier run left in a result file, or an empty result."""
    if not file.exists():
        return {"protocol": {}, "bases": {}}
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        return {"protocol": result["protocol"], "bases": dict(result["bases"])}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file} is no result of this command: move it away") from error


def columns(row: Row, gs: Iterable[float]) -> list[float]:
    """The g at which a row is measured."""
    return [0.0] if row.kind == "none" else [g for g in gs if row.only_g in (None, g)]


def tabulate(config: Config, rows: list[Row], bases: Iterable[Base], names: list[str]) -> None:
    """Paints, scores and times all rows on all bases; the result is written after every cell."""
    file, shapes = result_file(config), set()
    refuse((len(config.real) not in (0, 1, len(names)),
            f"--real: one set of pictures for all bases, or {len(names)}, one each"))
    keep_all(file, "bases", read_result(file)["bases"], names)
    rows = [row for row in rows if columns(row, config.g)]
    cells = [Cell(row, g, s) for row in rows for g in columns(row, config.g)
             for s in range(config.seed, config.seed + config.seeds)]
    with tqdm(total=len(names) * len(cells) * config.count, unit="picture", desc=config.command,
              disable=rank() > 0) as bar:
        for k, base in enumerate(bases):
            shapes |= {base.unet.config}
            refuse((len(shapes) > 1, f"{base.path} has another size than a base before it: give "
                                     "fine-tunes of one base"))
            bench = Bench(config, base, k)
            if rank() == 0:
                begin(bench, cells, file)
            wait()
            run_cells(bench, cells, file, bar)
            if rank() == 0:
                time_rows(bench, rows, file)
            wait()
    if rank() == 0:
        result = read_result(file)
        result["bases"] = {name: result["bases"][name] for name in names}
        finish(file, result, table_markdown(config.command, result))


def keep_all(file: Path, what: str, before: Iterable[str], now: Iterable[str]) -> None:
    """Raises BadInput where a result holds something that this run would not have."""
    lost = [name for name in before if name not in {*now}]
    refuse((lost, f"{file} holds other {what} too ({', '.join(lost)}): pass --out for a file of "
                  "its own, or move that one away"))


def begin(bench: Bench, cells: list[Cell], file: Path) -> None:
    """Enters the base into the result file, with those of its cells that are done already."""
    result, measured, now = read_result(file), bench.measured_by(), protocol(bench)
    other = [k for k in ASKED if result["protocol"] and result["protocol"].get(k) != now[k]]
    refuse((other, f"{file} holds a result of another setting ({', '.join(other)}): pass --out for "
                   "a file of its own, or move that one away"))
    before = result["bases"].get(bench.base.name, {})
    kept, by = before.get("rows", {}), before.get("measured by", measured)
    rows = {cell.row.name: about_row(cell.row) for cell in cells}
    keep_all(file, "rows", kept, rows)
    free = {JUDGED, "warning"} | ({"reference hash"} if not bench.real else set())
    other = [k for k in measured if by.get(k) != measured[k] and k not in free]
    refuse((other, f"{file} was measured by another {', '.join(other)}: pass --out for a file of "
                   "its own, or move that one away"))
    for cell in cells:
        seeds = kept.get(cell.row.name, {}).get("cells", {}).get(f"{cell.g:g}", {}).get("seeds", {})
        scores = seeds.get(str(cell.s), {})
        if scores.get("key") == bench.key(cell):
            enter(rows, cell, scores)
    for name, row in rows.items():                   # until the rows are timed again, all in turn
        row |= {k: v for k, v in kept.get(name, {}).items() if k == "milliseconds"}
    result["protocol"] = now
    result["bases"][bench.base.name] = {"base hash": bench.hash, "measured by": measured,
                                        "rows": rows}
    write_json(file, result)


def about_row(row: Row) -> dict:
    unet, guide = row.passes
    return {"title": row.title, "steps": row.steps, "UNet passes": unet, "guide passes": guide,
            "guide": row.source, "cells": {}}


def enter(rows: dict, cell: Cell, scores: dict) -> None:
    """Adds one seed's scores to a base's rows."""
    told = rows[cell.row.name]["cells"]
    seeds = told.get(f"{cell.g:g}", {}).get("seeds", {}) | {str(cell.s): scores}
    told[f"{cell.g:g}"] = summary(seeds)


def run_cells(bench: Bench, cells: list[Cell], file: Path, bar: tqdm) -> None:
    """All processes paint a cell, then the first one scores it and writes it down."""
    result = read_result(file)
    rows = result["bases"][bench.base.name]["rows"]
    for cell in cells:
        done = rows[cell.row.name]["cells"].get(f"{cell.g:g}", {}).get("seeds", {})
        if str(cell.s) not in done:
            bench.paint(cell, bar.update)
            wait()
            if rank() == 0:
                painted = json.loads((bench.folder(cell) / "cell.json").read_text("utf-8"))
                about = {"key": bench.key(cell), "painted at": painted["commit"]}
                enter(rows, cell, about | bench.score(cell))
                write_json(file, result)
        else:
            bar.update(bench.config.count)


def time_rows(bench: Bench, rows: list[Row], file: Path) -> None:
    """Milliseconds a picture, from prompt to pixels: rounds of one batch a row, rows in turn."""
    config, result, times = bench.config, read_result(file), {row.name: [] for row in rows}
    prompts = bench.prompts(config.seed)[0][:config.batch]
    for k in tqdm(range(config.repeats + 1), desc="timing", unit="round"):
        for row in rows:
            start, g = time.perf_counter(), columns(row, config.g)[-1]
            shown = row if k else row._replace(steps=2)              # the first round warms up
            paint(bench.base, shown, prompts, g, range(len(prompts)), bench.size)
            times[row.name] += [1000 * (time.perf_counter() - start) / len(prompts)] if k else []
    for name, rounds in times.items():
        result["bases"][bench.base.name]["rows"][name]["milliseconds"] = {
            "median": round(statistics.median(rounds), 2),
            "spread": round(statistics.stdev(rounds), 2) if len(rounds) > 1 else None,
            "rounds": [round(value, 2) for value in rounds]}
    write_json(file, result)


def protocol(bench: Bench) -> dict:
    """What a reader must know to make a result again, or to set it beside another."""
    config = bench.config
    return {
        "prompts": config.prompts or "fresh captions of postcards that name all six attributes",
        "pictures a cell and seed": config.count,
        "seeds": list(range(config.seed, config.seed + config.seeds)), "g": list(config.g),
        "noise": f"picture k of seed s starts from noise {FIRST} + {SEED_STEP} s + k",
        "spread": "standard deviation over the seeds, n − 1",
        "size": f"{bench.size} × {bench.size}, batches of {config.batch}",
        "steps": "t_i = round(1000 i / N) − 1",
        "milliseconds": f"a picture, from prompt to pixels; median of {config.repeats} rounds of "
                        f"one batch of {min(config.batch, config.count)}, rows in turn",
        "dtype": str(dtype_of(config)), "processes": world(), **surroundings(config)}


def table_markdown(command: str, result: dict) -> str:
    """A result of Table 2 or 3 as a page: the table, then its protocol."""
    rows = [(name, row) for name, base in result["bases"].items() for row in base["rows"].values()]
    gs = sorted({g for _, row in rows for g in row["cells"]}, key=float)
    measured = next(iter(result["bases"].values()))["measured by"]
    scores = [measured["distance"], "CLIP score"]
    scores += ["accuracy in %"] * (JUDGED in measured)
    cells = [[name, row["title"], passes_of(row["UNet passes"], row["guide passes"]),
              plus_minus(row["milliseconds"]["median"], row["milliseconds"]["spread"]),
              *(cell_markdown(row["cells"].get(g)) for g in gs)] for name, row in rows]
    lines = [f"# {TITLES[command]}", "", f"Cells: {' / '.join(scores)}; mean ± spread.", "",
             *table(["base", "method", "passes", "ms", *(f"g = {g}" for g in gs)], cells),
             "", "Protocol:", "", *protocol_lines(result["protocol"])]
    for item in result["bases"].items():
        lines += base_lines(*item)
    return "\n".join(lines) + "\n"


def passes_of(unet: int | str, guide: int) -> str:
    return f"{unet}" + f" + {guide} guide" * bool(guide)


def cell_markdown(cell: dict | None) -> str:
    """Distance / CLIP score / accuracy of one cell, and nothing where none was measured."""
    names = [name for name in cell["mean"] if name not in postcards.ATTRIBUTES] if cell else ()
    return " / ".join(plus_minus(cell["mean"][name], cell["spread"][name],
                                 4 if name == "CLIP-FID" else 2) for name in names)


def plus_minus(middle: float, spread: float | None, digits: int = 2) -> str:
    return f"{middle:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def protocol_lines(protocol: dict) -> list[str]:
    """A protocol as a list in Markdown; of the packages' versions torch's alone."""
    return listed(protocol | {"torch": protocol["versions"]["torch"]})


def listed(told: dict) -> list[str]:
    """What is no dictionary itself, as a list in Markdown."""
    return [f"- {name}: {value}" for name, value in told.items() if not isinstance(value, dict)]


def base_lines(name: str, base: dict) -> list[str]:
    """A base's hash, what it was measured by, and its guides, as a list in Markdown."""
    told = {"SHA-256": base["base hash"]} | base["measured by"]
    lines = listed(told)
    lines += [f"- {what}: {', '.join(f'{k} {v}' for k, v in told[what].items())}"
              for what in ("features", "CLIP")]
    lines += [f"- {row}: {told['guide']}" for row, told in base["rows"].items() if told["guide"]]
    return ["", f"Base {name}:", "", *lines]


# ------------------------------------------------------------------------------- teacher match

BINS = 10                       # of t
SOURCES = ("noised real pictures", "CFG's own trajectories")


def match(config: Config) -> None:
    """How much of the CFG correction each stage-one guide leaves unexplained, by g and by t.

    Measured on noised pictures, as in training, and on the states that CFG visits in sampling.
    """
    base = load(config, ppdd.find_weights(config.weights))
    config = fill(config)
    guides = need([row for row in methods(config, base) if row.guide and row.plain], base,
                  "stage-one guide")
    bench, steps = Bench(config, base), 10 if config.quick else STAGE_ONE
    sums = torch.zeros(len(guides), len(SOURCES), len(config.g), BINS, 2, dtype=torch.float64)
    with tqdm(total=config.count, unit="picture", desc="match") as bar:
        for k in range(0, config.count, config.batch):
            rows = slice(k, min(k + config.batch, config.count))
            sums += unexplained(bench, guides, rows, ppdd.step_grid(steps))
            bar.update(rows.stop - k)
    told = {"base": base.name, "base hash": bench.hash, "pictures": config.count,
            "prompts": config.prompts or "fresh captions of postcards, as in Table 2",
            "dtype": str(dtype_of(config)), "t": f"those of a run of {steps} steps",
            "noise": f"seeds from {bench.first(config.seed)}", **surroundings(config)}
    result = {"protocol": told, "guides": {
        row.name: {"guide": row.source} | {
            source: match_shares(config, sums[r, j]) for j, source in enumerate(SOURCES)
            if bench.own_captions or j} for r, row in enumerate(guides)}}
    finish(result_file(config), result, match_markdown(result))


@torch.no_grad()
def unexplained(bench: Bench, guides: list[Row], rows: slice, grid: list[int]) -> Tensor:
    """‖e − e_teacher‖² and ‖ε_c − e_teacher‖² of some pictures, (guides, SOURCES, G, BINS, 2)."""
    base, gs, seed = bench.base, bench.config.g, bench.first(bench.config.seed) + rows.start
    prompts, attributes = bench.prompts(bench.config.seed)
    c = base.embed(prompts[rows])                                                  # (B, L, D)
    empty, b = base.embed([""]).expand_as(c), len(c)
    shape = (base.unet.config.in_channels, bench.size // 8, bench.size // 8)
    walks = [ppdd.noise(range(seed, seed + b), shape).to(c.device)] * len(gs)      # (B, Z, H, W)
    real = noised(bench, attributes[rows], grid, seed) if bench.own_captions else None
    sums = torch.zeros(len(guides), len(SOURCES), len(gs), BINS, 2, dtype=torch.float64)
    for i, (t, s) in enumerate(pairwise(grid)):
        times, place = torch.full((b,), t, device=c.device), t * BINS // ppdd.TIMESTEPS
        if real:
            sums[:, 0, :, place] += beside_teacher(base, guides, gs, real[i], times, c, empty)[0]
        for k, g in enumerate(gs):
            told, e = beside_teacher(base, guides, (g,), walks[k], times, c, empty)
            sums[:, 1, k, place] += told[:, 0]
            walks[k] = ppdd.ddim_step(walks[k], e, t, s)
    return sums


def beside_teacher(base: Base, guides: list[Row], gs: tuple[float, ...], z: Tensor, t: Tensor,
                   c: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """The sums (guides, G, 2) of one batch at one t, and Eq. 3 at the last g, (B, Z, H, W).

    The base runs once with the prompt and once without, for all guides and g.
    """
    unet, z = base.unet, z.to(c)
    emb, sums = unet.embed_time(t), torch.zeros(len(guides), len(gs), 2)
    skips, h = unet.encode(z, emb, c)
    eps_c = unet.decode(skips, h, emb, c).float()
    eps_empty = unet.decode(*unet.encode(z, emb, empty), emb, empty).float()
    for i, g in enumerate(gs):
        e_teacher = ppdd.cfg(eps_c, eps_empty, g)
        guidance = torch.full((len(z),), g, device=z.device)
        for r, row in enumerate(guides):
            y = row.guide(guidance, emb, c, z, t)
            e = unet.decode(skips, h, emb, c, y).float()
            off = torch.stack([e - e_teacher, eps_c - e_teacher])
            sums[r, i] = off.square().mean((2, 3, 4)).sum(1).cpu()
    return sums, e_teacher


def noised(bench: Bench, attributes: Tensor, grid: list[int], seed: int) -> list[Tensor]:
    """Real postcards of these attributes, noised to every t of the grid: z_t (B, Z, H, W) each."""
    base, device = bench.base, bench.config.device
    generator = torch.Generator().manual_seed(seed)
    pictures = postcards.draw(attributes, bench.style, generator).to(device)
    moments = base.vae.encode((pictures * 2 - 1).to(next(base.vae.parameters()).dtype)).float()
    shape = (len(grid), len(moments), moments.shape[1] // 2, *moments.shape[2:])
    noise = torch.randn(shape, generator=generator).to(device)
    x = base.vae.sample(moments, noise[-1])
    return [ppdd.add_noise(x, eps, torch.full((len(x),), t, device=device))
            for t, eps in zip(grid[:-1], noise)]


def match_shares(config: Config, sums: Tensor) -> dict:
    """The shares in percent, of sums (G, BINS, 2): of all, by g and by t."""
    def share(part: Tensor) -> float:
        return round(100 * (part[..., 0].sum() / part[..., 1].sum()).item(), 2)

    width = ppdd.TIMESTEPS // BINS
    return {"all": share(sums),
            "by g": {f"{g:g}": share(part) for g, part in zip(config.g, sums)},
            "by t": {f"{b * width}–{(b + 1) * width - 1}": share(sums[:, b]) for b in range(BINS)}}


def match_markdown(result: dict) -> str:
    """A table by g, one by t, and the protocol."""
    lines = [f"# {TITLES['match']}", "", "100 is no guide at all, 0 a perfect one."]
    shares = [(name, source, told[source]) for name, told in result["guides"].items()
              for source in SOURCES if source in told]
    for by in ("by g", "by t"):
        heads = [f"{by[-1]} = {head}" for head in shares[0][2][by]]
        lines += ["", *table(["guide", "on", "all", *heads],
                             ([name, source, told["all"], *told[by].values()]
                              for name, source, told in shares))]
    told = protocol_lines(result["protocol"])
    told += [f"- {name}: {guide['guide']}" for name, guide in result["guides"].items()]
    return "\n".join([*lines, "", *told]) + "\n"


# ------------------------------------------------------------------------------- figures

MINI_EXAMPLES = ("a big red boat on the sea at sunset, in the middle",
                 "a small white house in the snow at night, on the left",
                 "a big orange balloon in a meadow in the morning, in the middle",
                 "a small blue car in the city at noon, on the right",
                 "a big purple rocket in the desert at night, on the left")
SD_EXAMPLES = ("a photograph of an astronaut riding a horse",
               "a lighthouse on a cliff at sunset, oil painting",
               "a red fox in the snow, soft morning light",
               "a wooden cabin by a mountain lake, watercolor")


def grid(headings: list[str], labels: list[str], pictures: list[list[Image.Image | None]],
         terms: str, side: int = 192) -> Image.Image:
    """A white sheet: headings above, labels to the left of the rows, a note of terms below.

    A heading's first line is in black, its others in grey. Pictures are brought to `side` pixels
    or more, every pixel a square; None leaves a narrow gap.
    """
    shown = [[p and enlarged(p, side) for p in row] for row in pictures]
    width, height = next(p.size for row in shown for p in row if p)
    unit = max(width / 192, 1.0)
    gap, small, title = round(8 * unit), *map(ImageFont.load_default, (13 * unit, 17 * unit))
    lefts, x = [], round(150 * unit)
    for k in range(len(headings)):
        lefts.append(x)
        x += gap + (width if any(row[k] for row in shown) else gap)
    wide = max(8, round(width / (6.6 * unit)))
    heads = [wrapped(head, wide) for head in headings]
    top = round((24 + 18 * max(head.count("\n") + 1 for head in heads)) * unit)
    note = textwrap.fill(terms, round(x / (6.4 * unit)))
    bottom = round((26 + 18 * (note.count("\n") + 1)) * unit)
    sheet = Image.new("RGB", (x + gap, top + len(shown) * (height + gap) + bottom), "white")
    draw = ImageDraw.Draw(sheet)
    for left, head in zip(lefts, heads):
        first, _, rest = head.partition("\n")
        draw.text((left + width / 2, 20 * unit), first, "#111", title, anchor="mm")
        draw.multiline_text((left + width / 2, 34 * unit), rest, "#777", small, anchor="ma",
                            align="center")
    for k, (label, row) in enumerate(zip(labels, shown)):
        y = top + k * (height + gap)
        draw.text((2 * gap, y + height / 2), wrapped(label, 18), "#555", small, anchor="lm")
        for left, picture in zip(lefts, row):
            if picture:
                sheet.paste(picture, (left, y))
    draw.text((2 * gap, sheet.height - bottom + 10 * unit), note, "#777", small)
    return sheet


def wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """The picture with every pixel a square, so that it is at least so wide."""
    times = math.ceil(side / image.width)
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)


def stage(config: Config) -> tuple[Config, Base, list[str], int]:
    """What every figure starts from: the settings, the base, the prompts, the pictures' side."""
    base = load(config, ppdd.find_weights(config.weights))
    prompts = list(config.prompt or (MINI_EXAMPLES if is_mini(base) else SD_EXAMPLES))
    return fill(config), base, prompts, picture_size(config, base)


def column(config: Config, base: Base, row: Row, prompts: list[str], size: int
           ) -> list[Image.Image]:
    """What a row makes of every prompt, prompt k from noise seed + k, at the last g."""
    seeds = range(config.seed, config.seed + len(prompts))
    return [to_image(p) for p in paint(base, row, prompts, config.g[-1], seeds, size)]


def heading(row: Row) -> str:
    """A row's title over two lines, and its passes."""
    unet, guide = row.passes
    name, _, rest = row.title.partition(", ")
    return f"{name}\n{rest}\n{passes_of(f'{unet} UNet', guide)} passes"


def show(config: Config, sheet: Image.Image) -> None:
    path = path_of(config.out or f"docs/{config.command}.png")
    save_png(path, sheet)
    print(f"{path}: {sheet.width} × {sheet.height}")


def fig5(config: Config) -> None:
    """Fig. 5: the guides at 50, 16 and 8 steps, and the tiny one that was trained at one g."""
    beside(config, lambda config, base: [row for row in methods(config, base, GUIDES) if row.guide],
           "Fewer steps come from halving: one step learns what two did.")


def fig6(config: Config) -> None:
    """Fig. 6: the guides beside CFG, from the same noise."""
    beside(config, lambda config, base: plugged(replace(config, weights=str(base.path)), base),
           "CFG runs the UNet twice a step, with the prompt and without; a guide, told g, adds to "
           "one pass what the other would have brought.")


def beside(config: Config, choose: Callable[[Config, Base], list[Row]], terms: str) -> None:
    """A sheet with a column a way of sampling and a row a prompt."""
    config, base, prompts, size = stage(config)
    rows = [row for row in need(choose(config, base), base) if columns(row, config.g[-1:])]
    pictures = [column(config, base, row, prompts, size) for row in rows]
    terms = (f"g = {config.g[-1]:g} (guidance scale {1 + config.g[-1]:g} elsewhere), DDIM, the "
             f"same noise along a row. {terms}")
    show(config, grid([heading(row) for row in rows], prompts, list(zip(*pictures)), terms))


def fig8(config: Config) -> None:
    """Fig. 8: the plain base's guides in fine-tuned bases, beside those bases' own CFG."""
    labels, pictures = [], []
    for path in styles(config):
        told, base, prompts, size = stage(replace(config, weights=str(path)))
        for row in (row for row in plugged(config, base) if row.kind != "none"):
            labels.append(f"{base.name}\n{heading(row)}")
            pictures.append(column(told, base, row, prompts, size))
    terms = (f"g = {told.g[-1]:g}, DDIM, the same noise down a column. The guides were trained on "
             "the plain base only, and are plugged into the fine-tuned ones as they are.")
    show(config, grid([f"\n{prompt}" for prompt in prompts], labels, pictures, terms))


# -- what a guide injects

def fig7(config: Config) -> None:
    """Fig. 7: what the stage-one guides add to the decoder, over steps and g."""
    config, base, prompts, size = stage(config)
    rows = [row for row in methods(config, base) if row.guide and row.steps == STAGE_ONE]
    rows = need(rows, base)
    sheets = [full_sheet(config, base, row, prompts[0], size) if row.kind == "full" else
              tiny_sheet(base, row, prompts) for row in rows]
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height
    show(config, whole)


def injected(base: Base, row: Row, prompt: str, g: float, seed: int, size: int
             ) -> list[list[Tensor]]:
    """What a full guide adds, mean over channels, (H, W): by step, then by injection point."""
    maps: list[list[Tensor]] = []

    def keep(module: nn.Module, given: tuple, y: list[Tensor]) -> None:
        maps.append([feature[0].float().mean(0).cpu() for feature in y])

    hook = row.guide.register_forward_hook(keep)
    try:
        paint(base, row, [prompt], g, [seed], size)
    finally:
        hook.remove()
    return maps


def full_sheet(config: Config, base: Base, row: Row, prompt: str, size: int) -> Image.Image:
    """Feature maps of a full guide: a row an injection point, columns the steps, by g."""
    times, points = ppdd.step_grid(row.steps), point_names(base)
    shown = [round(k * (row.steps - 1) / 5) for k in range(6)]
    maps = {g: injected(base, row, prompt, g, config.seed, size) for g in config.g}
    side = size // 8 * math.ceil(72 / (size // 8))           # a multiple of every map's side
    headings, lines = [], [[] for _ in points]
    for g in config.g:
        headings += ["", *(f"{f'g = {g:g}' if k == 0 else ''}\nt = {times[i]}"
                          for k, i in enumerate(shown))]
        for p, line in enumerate(lines):
            peak = max(step[p].abs().max() for of_g in maps.values() for step in of_g)
            tints = [tinted(maps[g][i][p] / peak.clamp(min=1e-12)) for i in shown]
            line += [None, *(t.resize((side, side), Image.Resampling.NEAREST) for t in tints)]
    terms = (f"What the {row.title.partition(',')[0]} adds at each place of the UNet's decoder "
             f"while it paints “{prompt}” in {row.steps} steps: mean over channels, each row of "
             "maps divided by its largest absolute value. White is 0, red positive, blue negative. "
             "A skip is what one block of the encoder hands to the decoder.")
    return grid(headings, points, lines, terms, side)


@torch.no_grad()
def tiny_sheet(base: Base, row: Row, prompts: list[str]) -> Image.Image:
    """Norms ‖y‖ of a tiny guide's vectors over t and g, a heat map an injection point."""
    c = base.embed(prompts)
    gs, times = torch.linspace(9, 2, 36), ppdd.step_grid(STAGE_ONE)[:-1]
    emb = base.unet.embed_time(torch.tensor(times, device=c.device))
    norms = torch.stack([torch.stack([vectors(row.guide, g, emb, state) for state in c]).mean(0)
                         for g in gs.tolist()], dim=1)                           # (P, G, T)
    peaks = norms.amax((1, 2)).clamp(min=1e-12)
    headings = [f"{name}\nlargest norm {peak:.3g}" for name, peak in zip(point_names(base), peaks)]
    name = row.title.partition(",")[0]
    terms = (f"What the {name} adds is the same at every pixel: one vector. Its norm over the "
             f"timestep t and g, mean of {len(prompts)} prompts, each map divided by its largest "
             "norm: white is 0, the darkest red that norm.")
    pictures = [tinted(part / peak) for part, peak in zip(norms, peaks)]
    axes = f"{name}\n\nupwards: g from 2 to 9\nto the right: t from 999 down to {times[-1]}"
    return grid(headings, [axes], [pictures], terms, 200)


def vectors(guide: nn.Module, g: float, emb: Tensor, c: Tensor) -> Tensor:
    """Norms (P, T) of what a tiny guide adds at P points, for T time embeddings and a prompt."""
    n = len(emb)
    y = guide(emb.new_full((n,), g, dtype=torch.float), emb, c.expand(n, -1, -1))
    return torch.stack([layer.float().flatten(1).norm(dim=1) for layer in y]).cpu()


def point_names(base: Base) -> list[str]:
    """The injection points, in the order of a guide's y."""
    *skips, middle = injection_channels(base.unet.config)
    names = [f"skip {k}\n{n} channels" for k, n in enumerate(skips)]
    return [*names, f"middle\n{middle} channels"]


def tinted(values: Tensor) -> Image.Image:
    """A map (H, W) in −1 … 1: white at 0, through red to dark red, through blue to dark blue."""
    ramp = torch.tensor([[8., 28, 88], [70, 120, 200], [255, 255, 255], [222, 84, 56], [92, 8, 18]])
    place = 2 * (values.clamp(-1, 1) + 1)                                          # 0 … 4
    low = place.floor().clamp(max=3).long()
    color = torch.lerp(ramp[low], ramp[low + 1], (place - low)[..., None])         # (H, W, 3)
    return Image.fromarray(color.round().byte().numpy())


# -- quality against time

def quality(config: Config) -> None:
    """Distance and accuracy over milliseconds a picture, from Table 2's result, as a chart."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("this chart needs a package that is missing: pip install matplotlib"
                       ) from None
    file = result_file(replace(config, command="table2", out=""))
    refuse((not file.exists(), f"there is no {file}: make it with `python eval.py table2`"))
    name, base = next(iter(read_result(file)["bases"].items()), ("", {"rows": {}}))
    rows = [row for row in base["rows"].values() if "milliseconds" in row]
    refuse((not rows, f"{file} is not finished: run `python eval.py table2` again"))
    g = max((g for row in rows for g in row["cells"]), key=float)
    distance = base["measured by"]["distance"]
    scores = {distance.split()[0]: f"{distance}, lower is better"}
    if JUDGED in base["measured by"]:
        scores["accuracy"] = "pictures with every attribute as asked, in %"
    figure = Figure(figsize=(6.4 * len(scores), 5.6), layout="constrained")
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, (score, said) in zip(panels, scores.items()):
        draw_curves(axes, rows, score, g)
        axes.set(xscale="log", xlabel="milliseconds a picture, from prompt to pixels", ylabel=said)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{name}, g = {g}: quality over time. Beside each point its number of steps; "
                    "bars: standard deviation over seeds", fontsize=10)
    path = path_of(config.out or f"docs/quality{'-quick' * config.quick}.png")
    with ppdd.written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    print(path)


def draw_curves(axes, rows: list[dict], score: str, g: str) -> None:
    """A curve a method, through its numbers of steps, at g; no guidance is at g = 0."""
    curves: dict[str, list[dict]] = {}
    for row in rows:
        if {g, "0"} & row["cells"].keys():
            method = row["title"].replace(f", {row['steps']} steps", "")
            curves.setdefault(method, []).append(row)
    for k, (method, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda row: row["milliseconds"]["median"])
        cells = [row["cells"].get(g) or row["cells"]["0"] for row in points]
        x, y = [row["milliseconds"]["median"] for row in points], [c["mean"][score] for c in cells]
        axes.errorbar(x, y, [c["spread"][score] or 0 for c in cells], fmt="osD^vP*X"[k % 8] + "-",
                      capsize=3, label=method)
        for row, at in zip(points, zip(x, y)):
            axes.annotate(row["steps"], at, (5, 5), textcoords="offset points", fontsize=8)


# ------------------------------------------------------------------------------- speed

SPEED_G = 8.0
SPEED_PROMPT = "a lighthouse on a cliff at sunset, oil painting"
PEER = "diffusers: "            # before the name of what it does as well
COMPILE = {"cuda": {"mode": "max-autotune"}}        # which makes CUDA graphs, as sample.py does
PROFILED = ("UNet pass", PEER + "UNet pass", "CFG step", "tiny step", "tiny stage-one update",
            "tiny stage-one update, naive")
AGREE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}   # largest difference, of the largest value


@dataclass(frozen=True)
class SpeedConfig:
    """Settings of `eval.py speed`. Weights are random: they do not change what anything takes."""

    command: str = option("speed", "what to measure")
    size: str = option("sd15", "which networks: Stable Diffusion 1.5's or the miniature's",
                       choices=("sd15", "mini"))
    side: tuple[int, ...] = option((), "sides of the latents, an eighth of the pictures'; default: "
                                       "64; on a CPU 32 64, with --quick 16; mini: 8", type=int)
    batch: tuple[int, ...] = option((), "pictures at a time; default: 1 4 16; on a CPU 1", type=int)
    steps: tuple[int, ...] = option((), "numbers of steps of the whole pictures; default: 8 16 "
                                        "50; on a CPU 8, with --quick 2", type=int)
    rounds: int = option(0, "how often everything is measured; 0: 20; on a CPU 3, with "
                            "--quick 1")
    device: str = option("", "cuda or cpu; default: cuda where there is one")
    dtype: str = option("auto", "dtype of all networks; auto: bf16 on CUDA, fp16 if it is "
                                "old, else fp32",
                        choices=("auto", *DTYPES))
    compile: bool = option(False, "torch.compile, for us and the peer alike")
    peer: bool = option(False, "diffusers beside it, with the same weights")
    quick: bool = option(False, "small and once, in a result file of its own")
    out: str = option("", "the file; default: results/speed-SIZE-DEVICE.json")


def settle_speed(config: SpeedConfig) -> SpeedConfig:
    """The configuration with what suits the machine in place of what was not given."""
    device = find_device(config.device)
    cpu, mini, quick = device == "cpu", config.size == "mini", config.quick
    side = (8,) if mini else (64,) if not cpu else (16,) if quick else (32, 64)
    config = replace(
        config, device=device, side=config.side or side,
        batch=config.batch or ((1,) if cpu else (1, 4, 16)),
        steps=config.steps or ((2,) if cpu and quick else (8,) if cpu else STEPS),
        rounds=config.rounds or (1 if quick else 3 if cpu else 20))
    refuse((any(side % 8 or not 8 <= side <= 512 for side in config.side),
            "--side: multiples of 8, from 8 to 512"),
           (not all(1 <= b <= 4096 for b in config.batch), "--batch: from 1 to 4096"),
           (not all(1 <= n <= ppdd.TIMESTEPS for n in config.steps), "--steps: from 1 to 1000"),
           (config.rounds < 1, f"--rounds {config.rounds}: at least 1"),
           (device == "mps", "--device mps: speed is measured on cpu or cuda"),
           (world() > 1, "speed runs in one process: leave out torchrun"))
    return config


def speed(config: SpeedConfig) -> None:
    """`speed`: what a step, a picture and an update take, beside CFG, a peer and the limit."""
    base, guides = random_base(config)
    pipe = build_peer(base) if config.peer else None
    short = config.quick and config.size != "mini"
    starts = {} if short else fresh_processes(config, base, guides["tiny"])     # before packing
    trained = with_the_same_weights({"base": base.unet} | guides)
    if not config.compile:                       # as sample.py does
        ppdd.pack(base.unet, base.vae, *guides.values())
    checked = check_peer(config, base, pipe) if pipe else {}
    limit, profiles = machine_rates(config), []
    left_out = ["sample.py in a process of its own: --quick has no time for it"] * short
    rows = [speed_row(name, config.side[0], 1, told, {}, limit) for name, told in starts.items()]
    step = compile_networks(base, pipe) if config.compile else ppdd.predict
    for side in config.side:
        nets = build_networks(config.size)._replace(side=side)
        macs = speed_macs(nets, config.steps)
        for batch in config.batch:
            if config.compile:
                torch.compiler.reset()           # other shapes are compiled anew
            task = Task(config, base, guides, pipe, side, batch, step)
            first = side == config.side[0]
            whole = config.device != "cpu" or config.size == "mini" or first
            task.warm_up()
            races = [(task.parts, config.rounds, first)]         # the last: warmed up on a CPU too
            if whole:
                few = min(config.rounds, 2) if config.device == "cpu" else config.rounds
                races += [(task.pictures, few, False), *(
                    (partial(task.updates, name, trained), few, not config.quick)
                    for name in guides)]
            else:
                left_out.append(f"whole pictures and updates at {side} × {side}: minutes each on a "
                                "CPU; they are measured at the side that --side names first")
            for make, rounds, warm in races:
                calls, warm = make(), 3 if config.compile or config.device != "cpu" else warm
                rows += [speed_row(name, side, batch, told, macs, limit)
                         for name, told in race(calls, config.device, rounds, warm).items()]
                profiles += [{"what": name, "side": side, "batch": batch,
                              "shares": operators(calls[name], config.device)}
                             for name in PROFILED if name in calls and whole]
    result = {"size": config.size, "protocol": speed_protocol(config), "limit": limit,
              "checked": checked, "rows": rows, "ratios": speed_ratios(rows), "profiles": profiles,
              "left out": left_out}
    name = f"speed-{config.size}-{torch.device(config.device).type}{'-quick' * config.quick}.json"
    finish(path_of(config.out or f"results/{name}"), result, speed_markdown(result))


def random_base(config: SpeedConfig) -> tuple[Base, dict[str, nn.Module]]:
    """Networks and guides of random weights, no layer of them zero: the same at every call."""
    *nets, _ = build_networks(config.size)
    generator = torch.Generator(config.device).manual_seed(0)
    for k, module in enumerate(nets):
        nets[k] = module.to(dtype_of(config)).to_empty(device=config.device)
        for name, p in module.named_parameters():
            bound = (3 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1     # of variance 1 / inputs
            p.data.uniform_(-bound, bound, generator=generator)
            if p.ndim == 1 and name.endswith("weight"):
                p.data.add_(1)
        nets[k].eval().requires_grad_(False)
        if config.device != "cpu":               # as sample.py does: on a CPU it wins nothing
            nets[k].to(memory_format=torch.channels_last)
    unet, vae, text, full, tiny = nets
    return Base(unet, vae, text, Tokenizer(), Path("random")), {"full": full, "tiny": tiny}


def fresh_processes(config: SpeedConfig, base: Base, tiny: nn.Module) -> dict[str, dict]:
    """What a fresh Python takes to import torch, and `sample.py` from its start to its end."""
    steps = config.steps[0]
    with tempfile.TemporaryDirectory() as folder:
        weights, guide = (Path(folder, f"{name}.safetensors") for name in ("weights", "tiny"))
        ppdd.save_base(weights, base.unet, base.vae, base.text)
        ppdd.save_guide(guide, tiny, tiny.guide_config, {})
        flags = {"prompt": SPEED_PROMPT, "weights": weights, "guide": guide, "steps": steps,
                 "g": SPEED_G, "size": 8 * config.side[0], "device": config.device,
                 "dtype": config.dtype}
        words = [str(word) for k, v in flags.items() for word in (f"--{k}", v)]
        script = str(Path(__file__).with_name("sample.py"))

        def fresh(*command: str) -> None:
            done = subprocess.run([sys.executable, *command], cwd=folder, text=True,
                                  capture_output=True)
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            refuse((done.returncode, f"a fresh Python failed ({done.returncode}): {said[-1]}"))

        told = race({"import torch, fresh Python": lambda: fresh("-c", "import torch"),
                     f"sample.py, {steps} steps, from start to end": lambda: fresh(script, *words)},
                    "cpu", min(config.rounds, 2), warm=0)
    return {name: entry | {"GiB": None} for name, entry in told.items()}


def with_the_same_weights(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of modules, with the very tensors of theirs."""
    shared = {id(p): p for module in modules.values() for p in module.parameters()}
    return copy.deepcopy(modules, shared)


def compile_networks(base: Base, pipe) -> Callable[..., Tensor]:
    """Compiles the base as sample.py does, and the peer as its manual says.

    Returns `ppdd.predict` as one graph.
    """
    options = {"dynamic": False} | COMPILE.get(next(base.unet.parameters()).device.type, {})

    def graph(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled = torch.compile(call, **options)

        def copied(*given) -> Tensor:            # a CUDA graph writes where it wrote before
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(*given).clone()
        return copied

    for module in (pipe.unet, pipe.vae.decoder) if pipe else ():
        module.compile(**options)
    step, unet = graph(ppdd.predict), base.unet
    unet.forward, base.vae.decode = graph(unet.forward), graph(base.vae.decode)
    return step


class Task:
    """The work at one side of the latents and one batch: calls, by name, that one race times."""

    def __init__(self, config: SpeedConfig, base: Base, guides: dict[str, nn.Module], pipe,
                 side: int, batch: int, step: Callable[..., Tensor] = ppdd.predict):
        self.config, self.base, self.guides, self.pipe = config, base, guides, pipe
        self.step = step                         # ppdd.predict, or that compiled
        self.prompts = [SPEED_PROMPT] * batch
        shape = (base.unet.config.in_channels, side, side)
        self.z = ppdd.noise(range(batch), shape).to(config.device)                 # (B, Z, H, W)
        self.t = torch.full((batch,), 500, device=config.device)
        self.ids = base.tokenizer(self.prompts).to(config.device)                  # (B, L)
        self.c, self.empty = base.text(self.ids), base.embed([""])
        self.empty = self.empty.expand_as(self.c)                                  # (B, L, D)

    def warm_up(self) -> None:
        """Has the convolutions packed for these sides, before anything is timed."""
        for guide in self.guides.values():
            ppdd.sample(self.base.unet, self.z, self.c, SPEED_G, 1, guide, predict=self.step)
        self.base.vae.decode(self.z.to(self.c.dtype))

    def sample(self, method: str, steps: int, c: Tensor, empty: Tensor) -> Tensor:
        guide, empty = self.guides.get(method), empty if method == "CFG" else None
        return ppdd.sample(self.base.unet, self.z, c, SPEED_G, steps, guide, empty,
                           predict=self.step)

    def parts(self) -> dict[str, Callable]:
        """One of each; of steps a whole run, as what is computed before them is theirs."""
        base, pipe, z = self.base, self.pipe, self.z.to(self.c.dtype)
        steps = run_length(self.config.device)
        scaled = z / base.vae.config.scale_factor
        calls = {}
        for name, ours, theirs in (
                ("UNet pass", lambda: base.unet(z, self.t, self.c),
                 lambda: pipe.unet(z, self.t, self.c)),
                ("VAE decode", lambda: base.vae.decode(z), lambda: pipe.vae.decode(scaled)),
                ("text encoding", lambda: base.text(self.ids),
                 lambda: pipe.text_encoder(self.ids))):
            calls |= {name: ours} | ({PEER + name: theirs} if pipe else {})
        return calls | {f"{method} step": partial(self.sample, method, steps, self.c, self.empty)
                        for method in ("CFG", "full", "tiny")}

    def pictures(self) -> dict[str, Callable]:
        """From prompt to pixels: text encoder, sampling, VAE."""
        calls = {f"{method} picture, {n} steps": partial(self.picture, method, n)
                 for n in self.config.steps for method in ("CFG", "full", "tiny")}
        return calls | {f"{PEER}CFG picture, {n} steps": partial(self.theirs, n)
                        for n in self.config.steps if self.pipe}

    def picture(self, method: str, steps: int) -> Tensor:
        c = self.base.embed(self.prompts)
        empty = self.base.embed([""]).expand_as(c) if method == "CFG" else c
        return self.base.decode(self.sample(method, steps, c, empty))

    def theirs(self, steps: int, output: str = "pt") -> Tensor:
        """Pictures, or latents, of diffusers' StableDiffusionPipeline with CFG."""
        empty = self.base.tokenizer([""]).to(self.ids.device)
        c, empty = (self.pipe.text_encoder(ids).last_hidden_state for ids in (self.ids, empty))
        return self.pipe(prompt_embeds=c, negative_prompt_embeds=empty.expand_as(c),
                         num_inference_steps=steps, guidance_scale=1 + SPEED_G,
                         latents=self.z.to(c.dtype), height=8 * self.z.shape[2],
                         width=8 * self.z.shape[3], output_type=output).images

    def updates(self, name: str, nets: dict[str, nn.Module]) -> dict[str, Callable]:
        """One update of a guide, AdamW and all, as train.py makes it, and the naive way.

        All in float32, under autocast where the dtype is another; the base compiled in two halves.
        """
        unet, z, c, empty = nets["base"], self.z, self.c.float(), self.empty.float()
        unet = unet if self.c.dtype == torch.float32 else copy.deepcopy(unet).float()
        for half in ("encode", "decode") * self.config.compile:
            whole = getattr(UNet, half).__get__(unet)
            setattr(unet, half, torch.compile(whole, dynamic=False))
        teacher = copy.deepcopy(nets[name]).float().to(memory_format=torch.contiguous_format)
        guide = copy.deepcopy(teacher).requires_grad_()
        optimizer = torch.optim.AdamW(guide.parameters())
        t, t_mid, t_end = (torch.full_like(self.t, t) for t in ppdd.step_grid(16)[4:7])
        given, g = (unet, guide, z, t, c, empty), torch.full_like(self.t, 8).float()
        losses = {
            "stage-one update": lambda: ppdd.cfg_distillation(*given, g).loss,
            "stage-one update, naive": lambda: naive_loss(*given, g),
            "halving update": lambda: ppdd.halving(unet, guide, teacher, z, t, t_mid, t_end, c,
                                                   g).loss}
        return {f"{name} {kind}": partial(self.update, loss, optimizer)
                for kind, loss in losses.items()}

    def update(self, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
        device, dtype = self.z.device.type, self.c.dtype
        with ppdd.quick_attention(device):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                value = loss()
            optimizer.zero_grad(set_to_none=True)
            value.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()


def naive_loss(unet: UNet, guide: nn.Module, z: Tensor, t: Tensor, c: Tensor, empty: Tensor,
               g: Tensor) -> Tensor:
    """Algorithm 1 without sharing: a teacher's batch of two, then a whole pass of the student."""
    with torch.no_grad():
        both, emb = torch.cat([c, empty]), unet.embed_time(torch.cat([t, t]))
        eps = unet.decode(*unet.encode(torch.cat([z, z]), emb, both), emb, both).float()
        e_teacher, emb = ppdd.cfg(*eps.chunk(2), g), unet.embed_time(t)
    y = guide(g, emb, c, z, t)
    e = unet.decode(*unet.encode(z, emb, c), emb, c, y).float()
    return (e - e_teacher).square().mean()


# -- measuring

def run_length(device: str) -> int:
    """Steps of the run whose time is shared out over them as that of a step."""
    return 2 if device == "cpu" else 8


def race(calls: dict[str, Callable], on: str, rounds: int, warm: int = 1) -> dict[str, dict]:
    """Milliseconds and peak memory of calls that take turns, after `warm` rounds unmeasured.

    A turn is a second of calls one after the other, at most ten, but one where it is the first.
    """
    device, told = torch.device(on), {name: {"rounds": []} for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for k in tqdm(range(warm + rounds), desc=f"{next(iter(calls))} …", leave=False):
        for name, call in calls.items():
            counted, n = reset_peak(device), run_length(on) if name.endswith(" step") else 1
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = (time.perf_counter() - start) / repeats[name]
            repeats[name] = max(1, min(10, int(1 / max(took, 0.01))))
            took *= 1000 / n
            if k >= warm:
                told[name]["rounds"].append(round(took, 4))
                told[name]["GiB"] = round(peak(device) / 2**30, 3) if counted else None
    for entry in told.values():
        low, entry["ms"], high = np.percentile(entry["rounds"], (25, 50, 75)).round(4).tolist()
        entry["quartiles"] = [low, high]
    return told


def reset_peak(device: torch.device) -> bool:
    """Begins a new peak of memory, the GPU's or this process's; False where none can be had."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")      # Linux: VmHWM is the size of now
        except OSError:
            return False
    return True


def peak(device: torch.device) -> int:
    """Bytes allocated at most since `reset_peak`, weights included; of a CPU, resident ones."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def operators(call: Callable, device: str) -> dict[str, float]:
    """The share of a call's time that each of PyTorch's operators took, those of 1 % and more."""
    gpu = device.startswith("cuda")
    with torch.autograd.profiler.profile(use_device="cuda" if gpu else None,
                                         use_kineto=gpu) as recorded:
        call()
    return operator_shares(recorded.key_averages(), gpu)


def operator_shares(events: Iterable, gpu: bool) -> dict[str, float]:
    """Shares of the time of a profile's events; on a GPU each kernel's is in two of them.

    They are the operator's and the kernel's own: one of the two is counted, the kernels where a
    CUDA graph started most of them and so hardly any has an operator.
    """
    spent: dict[bool, dict[str, float]] = {True: {}, False: {}}                # is it a kernel?
    for event in events:
        if getattr(event, "is_user_annotation", False):
            continue                                 # a span of others, the optimiser's step's
        kernel = gpu and event.device_type != torch.autograd.DeviceType.CPU
        spent[kernel][event.key.removeprefix("aten::")] = (
            event.self_device_time_total if gpu else event.self_cpu_time_total)
    totals = {kernel: sum(times.values()) for kernel, times in spent.items()}
    kernel = totals[False] < totals[True] / 2
    shares = {name: round(time / (totals[kernel] or 1), 3) for name, time in spent[kernel].items()}
    return {name: share for name, share in sorted(shares.items(), key=lambda kv: -kv[1])
            if share >= 0.01}


def machine_rates(config: SpeedConfig) -> dict[str, float]:
    """The fastest round of products of square matrices, and of copies, in this dtype."""
    n = 8192 if config.device != "cpu" else 2048 if config.size == "sd15" else 1024
    a, b = torch.randn(2, n, n, device=config.device).to(dtype_of(config))
    big, other = torch.zeros(2, 2**26 if config.size == "sd15" else 2**23, device=config.device)
    told = race({"matrix": lambda: a @ b, "copy": lambda: big.copy_(other)},
                config.device, 1 if config.quick else 5, warm=3)
    fastest = {name: min(entry["rounds"]) / 1000 for name, entry in told.items()}
    return {"matrix, TFLOP/s": round(2 * n**3 / fastest["matrix"] / 1e12, 4),
            "copy, GB/s, read and written": round(2 * big.nbytes / fastest["copy"] / 1e9, 2)}


def speed_macs(nets: Networks, steps: tuple[int, ...]) -> dict[str, int]:
    """Multiply-accumulates of the things raced, for one picture, attention included."""
    once = {name: told.all for name, told in passes(nets).items()}
    unet, hint, text = (once[name] for name in ("base UNet", "hint encoder", "text encoder"))
    step = {"CFG": 2 * unet, "full": unet + once["full guide"] - hint,
            "tiny": unet + once["tiny guide, as computed"]}
    ends = {"CFG": text, "full": hint, "tiny": 0}        # beside what every picture begins and ends
    parts = {"UNet pass": unet, "VAE decode": once["VAE decoder"], "text encoding": text}
    return parts | {f"{method} step": macs for method, macs in step.items()} | {
        f"{method} picture, {n} steps": n * macs + ends[method] + text + once["VAE decoder"]
        for method, macs in step.items() for n in steps}


def speed_row(name: str, side: int, batch: int, told: dict, macs: dict[str, int],
              limit: dict[str, float]) -> dict:
    """What was measured, and what follows from it."""
    row, seconds = {"what": name, "side": side, "batch": batch, **told}, told["ms"] / 1000
    if name.removeprefix(PEER) in macs:
        done = batch * macs[name.removeprefix(PEER)]
        row |= {"GMACs": done / 1e9, "TFLOP/s": 2 * done / seconds / 1e12}
        row["of the matrix rate"] = row["TFLOP/s"] / limit["matrix, TFLOP/s"]
    if "picture" in name or "update" in name:
        row["images/s"] = batch / seconds
    if "update" in name:
        row["hours for 3,000 updates of 64"] = 3000 * 64 / row["images/s"] / 3600
    return {key: round(value, 5) if isinstance(value, float) else value
            for key, value in row.items()}


def speed_ratios(rows: list[dict]) -> list[dict]:
    """Guides beside CFG, ours beside the peer's, shared beside naive: medians over the rounds."""
    found, by_name = [], {(row["what"], row["side"], row["batch"]): row for row in rows}
    for (name, side, batch), row in by_name.items():
        rival = re.sub("^(full|tiny) ", "CFG ", name)
        for other in dict.fromkeys((rival, PEER + name, PEER + rival, f"{name}, naive")):
            if other != name and (beside := by_name.get((other, side, batch))):
                pairs = zip(row["rounds"], beside["rounds"])
                found.append({"side": side, "batch": batch, "ratio": f"{name} / {other}",
                              "median": round(statistics.median(a / b for a, b in pairs), 4)})
    return found


def speed_protocol(config: SpeedConfig) -> dict:
    """How it was measured."""
    cpu = config.device == "cpu"
    return {
        "weights": "random, seed 0", "g": SPEED_G, "dtype": str(dtype_of(config)),
        "compiled": config.compile,
        "milliseconds": f"median and quartiles of {config.rounds} rounds in which everything takes "
                        "turns (of up to ten calls, as go into a second), after 3 that warm up; on "
                        "a CPU of 2 where it would be long, and after 1 or none; of a fresh Python "
                        "2 at most, after none; ratios are medians of each round's own",
        "a step": f"the time of a run of {run_length(config)} steps of ppdd.sample, divided by "
                  f"{run_length(config)}",
        "sample.py": "a process of its own, never compiled, that paints one picture with a tiny "
                     "guide, weights in one fp16 file that was just written",
        "a picture": "text encoder, sampling, VAE; diffusers': StableDiffusionPipeline, DDIM",
        "memory": "peak resident size of the process, with all networks of this command in it" if
                  cpu else "peak allocated on the GPU, with all networks of this command on it",
        "arithmetic": "two operations a multiply-accumulate, attention's products included, of "
                      "plain passes: what a run computes once counts in each of its steps",
        "an update": "forward, backward, clipping and AdamW, from latents and text states; base "
                     "and guide in float32, under autocast where the dtype above is another",
        **surroundings(config, "diffusers", "transformers")}


def speed_markdown(result: dict) -> str:
    """The page beside the result file."""
    def cell(row: dict, key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else ""

    lines = [[row["what"], f"{row['side']} × {row['side']}", row["batch"], f"{row['ms']:,.4g}",
              " … ".join(f"{q:,.4g}" for q in row["quartiles"]), cell(row, "images/s", ".3g"),
              cell(row, "GiB", ".2f"), cell(row, "TFLOP/s", ".3g"),
              cell(row, "of the matrix rate", ".0%"),
              cell(row, "hours for 3,000 updates of 64", ",.3g")] for row in result["rows"]]
    head = ["", "latents", "batch", "ms", "quartiles", "images/s", "peak GiB", "TFLOP/s",
            "of the limit", "hours for 3,000 updates of 64"]
    ratios = [[r["ratio"], f"{r['side']} × {r['side']}", r["batch"], f"{r['median']:.3f}"]
              for r in result["ratios"]]
    profiles = [[told["what"], f"{told['side']} × {told['side']}", told["batch"], ", ".join(
        f"{name} {share:.0%}" for name, share in [*told["shares"].items()][:5])]
        for told in result["profiles"]]
    told = listed(result["limit"] | {f"{name}, difference from diffusers": value for name, value in
                                     result["checked"].items()})
    return "\n".join([f"# Speed, {result['size']}", "", *table(head, lines, "---:"), "",
                      *table(["ratio of times", "latents", "batch", ""], ratios, "---:"), "",
                      *table(["where the time goes", "latents", "batch", ""], profiles, "---:"),
                      "", *told,
                      *protocol_lines(result["protocol"]),
                      *(f"- left out: {said}" for said in result["left out"])]) + "\n"


# -- the peer

def build_peer(base: Base):
    """diffusers' StableDiffusionPipeline over the base's own weights: nothing is copied."""
    try:
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
        from diffusers import UNet2DConditionModel as PeerUNet
        from diffusers.loaders import single_file_utils as official
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError as error:
        raise BadInput(f"--peer needs a package that is missing: pip install diffusers "
                       f"transformers ({error})") from None
    u, v, t = base.unet.config, base.vae.config, base.text.config
    levels, place = len(v.ch_mult), {True: "CrossAttn", False: ""}
    with torch.device("meta"):
        unet = PeerUNet(
            in_channels=u.in_channels, out_channels=u.out_channels,
            block_out_channels=[u.model_channels * m for m in u.channel_mult],
            down_block_types=[f"{place[a]}DownBlock2D" for a in u.attention],
            up_block_types=[f"{place[a]}UpBlock2D" for a in reversed(u.attention)],
            layers_per_block=u.num_res_blocks, cross_attention_dim=u.context_dim,
            attention_head_dim=u.num_heads, norm_num_groups=u.norm_groups)
        vae = AutoencoderKL(
            in_channels=v.in_channels, out_channels=v.out_channels, latent_channels=v.z_channels,
            block_out_channels=[v.ch * m for m in v.ch_mult], layers_per_block=v.num_res_blocks,
            down_block_types=["DownEncoderBlock2D"] * levels, norm_num_groups=v.norm_groups,
            up_block_types=["UpDecoderBlock2D"] * levels, scaling_factor=v.scale_factor)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=t.vocab_size, hidden_size=t.width, intermediate_size=4 * t.width,
        num_hidden_layers=t.layers, num_attention_heads=t.heads, hidden_act="quick_gelu",
        max_position_embeddings=t.positions, bos_token_id=49406, eos_token_id=49407))
    for theirs, ours, prefix, convert in (
            (unet, base.unet, "model.diffusion_model.", official.convert_ldm_unet_checkpoint),
            (vae, base.vae, "first_stage_model.", official.convert_ldm_vae_checkpoint)):
        named = {prefix + name: p for name, p in ours.state_dict().items()}
        theirs.load_state_dict(convert(named, dict(theirs.config)), assign=True)
    prefix = "text_model." * next(iter(text.state_dict())).startswith("text_model.")
    text.load_state_dict({prefix + name: p for name, p in base.text.state_dict().items()},
                         assign=True)
    for module in (unet, vae, text.to(base.text.final_layer_norm.weight.device)):
        module.eval().requires_grad_(False)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=1)
    pipe = StableDiffusionPipeline(vae, text, None, unet, scheduler, None, None,
                                   requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_peer(config: SpeedConfig, base: Base, pipe) -> dict[str, float]:
    """By how much the peer's outputs differ from ours. Raises BadInput where by more than AGREE."""
    task = Task(config, base, {}, pipe, min(config.side), 1)
    calls, found = task.parts(), {}
    ours = {name: calls[name]() for name in ("UNet pass", "VAE decode", "text encoding")}
    theirs = {name: calls[PEER + name]()[0] for name in ours}
    ours["CFG picture, 2 steps"] = task.sample("CFG", 2, task.c, task.empty)
    theirs["CFG picture, 2 steps"] = task.theirs(2, "latent")
    for name, mine in ours.items():
        other = theirs[name].float()
        found[name] = ((mine.float() - other).abs().max() / other.abs().max()).item()
    dtype = next(name for name, kind in DTYPES.items() if kind == dtype_of(config))
    refuse(*((not off <= AGREE[dtype], f"{name}: diffusers' output is off ours by {off:.2g} of its "
              f"largest value, more than {AGREE[dtype]:g}: a comparison would mean nothing")
             for name, off in found.items()))
    return found


# ------------------------------------------------------------------------------- command line

COMMANDS = {"fid": run_fid, "clip": run_clip, "table1": run_table1, "table2": table2,
            "table3": table3, "match": match, "fig5": fig5, "fig6": fig6, "fig7": fig7,
            "fig8": fig8, "quality": quality, "speed": speed}


class Parser(argparse.ArgumentParser):
    """Answers bad input with one sentence, without its usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def command_line(kind: type) -> Parser:
    """The command and its paths, and one flag for every other field of a configuration."""
    parser = Parser(prog="eval.py", description=__doc__.splitlines()[0])
    command, *flags = fields(kind)
    parser.add_argument(command.name, choices=tuple(COMMANDS), **command.metadata)
    for f in flags:
        flag, more = "--" + f.name.replace("_", "-"), dict(f.metadata)
        if f.name == "paths":
            parser.add_argument(f.name, nargs="*", **more)
        elif isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true", **more)
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, nargs="+", action="extend", default=[], **more)
        else:
            more["help"] += " (%(default)s)" if f.default != "" else ""
            parser.add_argument(flag, type=type(f.default), default=f.default, **more)
    return parser


def find_device(device: str) -> str:
    """The device asked for, else a GPU, else the CPU. Raises BadInput where it is not there."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    try:
        asked = torch.device(device)
    except RuntimeError:
        raise BadInput(f"--device {device}: cpu, cuda or cuda:1, for example") from None
    refuse(((asked.index or 0) >= there.get(asked.type, 0),
            f"--device {device}: there is none here; leave it out, or pass cpu"))
    return device


def settle(config: Config) -> Config:
    """The configuration with its device decided. Raises BadInput for what no command can use."""
    device = find_device(config.device)
    refuse(
        (config.command == "speed", "speed comes first, before its flags"),
        (not 1 <= config.batch <= 4096, f"--batch {config.batch}: from 1 to 4096"),
        (not 0 <= config.seed < 2**31, f"--seed {config.seed}: from 0 to {2**31 - 1}"),
        (config.count < 0, f"--count {config.count}: a number of pictures, or 0 for all"),
        (config.paths and config.command not in ("fid", "clip"),
         f"{config.command} takes no paths, and got {' '.join(config.paths)}"),
        (config.count and config.command in ("fid", "clip", "table1"),
         f"--count {config.count}: {config.command} takes all there are; leave it out"),
        (world() > 1 and config.command not in ("table2", "table3"),
         f"{config.command} runs in one process: leave out torchrun"))
    return replace(config, device=device)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    kind, decide = (SpeedConfig, settle_speed) if argv[:1] == ["speed"] else (Config, settle)
    parser = command_line(kind)
    ppdd.print_any_name()
    given = {k: tuple(v) if isinstance(v, list) else v
             for k, v in vars(parser.parse_intermixed_args(argv)).items()}
    for f in fields(kind):                                   # argparse makes a list of --seed=--
        if isinstance(given[f.name], tuple) and not isinstance(f.default, tuple):
            parser.error(f"argument --{f.name}: expected one argument")
    try:
        config = decide(kind(**given))
        COMMANDS[config.command](config)
    except KeyboardInterrupt:
        parser.exit(130, "stopped\n")
    except OSError as error:
        named = error.filename2 or error.filename or "a file"
        parser.error(f"{named}: {error.strerror or error}")
    except (BadInput, CheckpointError, ImportError) as error:
        parser.error(str(error))
    except torch._dynamo.exc.TorchDynamoException as error:
        parser.error(f"--compile can't be used here, leave it out ({str(error).splitlines()[0]})")
    except (MemoryError, RuntimeError) as error:
        if not ppdd.out_of_memory(error):
            raise
        parser.error("out of memory: pass a smaller --batch")


if __name__ == "__main__":
    main()
