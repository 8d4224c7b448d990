"""Ways of sampling, one a row of Table 2, and what they are all given: prompts, noise, a base."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ppdd
from clip_text import Tokenizer
from mini import postcards
from support import base as bases
from support import fast
from support.base import Base
from support.captions import notes_on, read_prompts
from support.cli import BadInput, require
from support.distributed import print_once
from support.files import expand, sha256
from support.guides import (
    describe_guide,
    doubts_of_origin,
    guide_path,
    load_guide,
    read_guide,
    transplant,
)
from support.machine import resolve_dtype

GUIDES = ("full", "full-16", "full-8", "tiny", "tiny-16", "tiny-8", "tiny-8-g8")   # the paper's
OUR_GUIDES = tuple(f"tiny-{form}{steps}" for form in ("gated", "seeing")
                   for steps in ("", "-16", "-8"))
# Of `few`: the student of Meng et al., and guides beside it.
FEW_STEPS = ("whole", *(f"{name}-{steps}" for name in ("whole", "full", "tiny", "tiny-seeing")
                        for steps in (8, 4, 2, 1)))
STAGE_ONE = 50                  # steps of a guide that was never halved, and of the teacher
# Commands that take one g.
ONE_G = ("table3", "few", "fig5", "fig6", "fig8", "edits", "restyle")
SMALL = ("match", "features", "inversion")      # and those that take 64 images by default

# Image k of seed s starts from noise FIRST_NOISE + NOISE_PER_SEED · s + k. Training, which draws
# from small seeds, never sees it, and no two seeds of a table share any.
FIRST_NOISE = 10**9
NOISE_PER_SEED = 10**6


# ------------------------------------------------------------------------------- rows

class Row(NamedTuple):
    """One way of sampling: a row of Table 2."""

    name: str                           # in result files and folders: cfg-50, tiny-8
    title: str
    kind: str                           # none, cfg, full, tiny, seeing or whole
    steps: int
    sampler: str = "ddim"
    guide: nn.Module | None = None      # or a student
    file: Path | None = None            # the guide's, and its SHA-256
    guide_hash: str = ""
    only_g: float | None = None         # the one g that it is made for; no guidance is g = 0
    stage_one: bool = True              # not halved, for any g, against the empty prompt
    halved: bool = False                # to the grid of its number of steps
    guided: tuple[int, int] | None = None     # CFG from this step to before that one; None: in all
    leading: bool = False               # on `leading_grid`
    original: tuple[Path, str] | None = None  # the base a student is moved from, and its SHA-256

    @property
    def passes(self) -> tuple[int, int]:
        """Passes of the UNet and of the guide for one image; PLMS takes its first step twice.

        A tiny guide has no encoder of its own, so it has no pass of its own either.
        """
        predictions = self.steps + (self.sampler == "plms" and self.steps > 1)
        guided = len(range(*self.guided)) if self.guided else predictions
        unet = predictions + (guided if self.kind == "cfg" else 0)
        return unet, predictions if self.kind == "full" else 0

    @property
    def unusual(self) -> dict:
        """Settings that few rows have, named only by those, so that no other cell's key changes."""
        few = {"guided steps": self.guided, "spacing": self.leading and "leading",
               "moved from": self.original and self.original[1]}
        return {name: value for name, value in few.items() if value}

    def on(self, base: Base) -> Row:
        """The row on a base: the same, but for a student that is to be moved to it."""
        if not self.original:
            return self
        student = transplant(self.file, self.original[0], base)
        fast.prepack(student)
        return self._replace(guide=student)

    @property
    def source(self) -> str | None:
        """The guide's file and its hash, for a result file."""
        return f"{os.path.relpath(self.file)}, SHA-256 {self.guide_hash}" if self.file else None

    def g_values(self, gs: Iterable[float]) -> list[float]:
        """Those of the guidance numbers at which the row is measured."""
        return [0.0] if self.kind == "none" else [g for g in gs if self.only_g in (None, g)]


# CFG that guides in some steps only, and so has the passes of a tiny guide: number of steps, the
# first that guides, and the one behind the last. In the first half, to the nearest step; or where
# σ/α is within an interval (Kynkäänniemi et al., 2024). This interval did best of six; theirs for
# SD XL, 0.28 to 5.42, comes too late for the miniature.
INTERVAL = (1.0, 10.0)
RIVALS = {"half": ("in the first half", ((33, 0, 17), (11, 0, 5), (5, 0, 3))),
          "interval": ("within an interval", ((32, 3, 21), (10, 1, 7), (5, 1, 4)))}
WITHOUT_GUIDE = (Row("none-50", "no guidance, 50 steps", "none", 50, only_g=0.0),
                 Row("cfg-50", "CFG, DDIM, 50 steps", "cfg", 50),
                 Row("cfg-16", "CFG, DDIM, 16 steps", "cfg", 16),
                 Row("cfg-8", "CFG, DDIM, 8 steps", "cfg", 8),
                 Row("cfg-plms-50", "CFG, PLMS, 50 steps", "cfg", 50, "plms"),
                 Row("cfg-plms-sd-50", "CFG, PLMS on SD's own spacing, 50 steps", "cfg", 50, "plms",
                     leading=True),
                 *(Row(f"cfg-{name}-{n + b - a}", f"CFG {where}, {n} steps", "cfg", n,
                       guided=(a, b))
                   for name, (where, ways) in RIVALS.items() for n, a, b in ways))

CFG_IN_FEW = (Row("cfg-4", "CFG, DDIM, 4 steps", "cfg", 4),
              Row("cfg-2", "CFG, DDIM, 2 steps", "cfg", 2),
              Row("cfg-1", "CFG, DDIM, 1 step", "cfg", 1))


def leading_grid(steps: int) -> list[int]:
    """The N + 1 timesteps of SD's own spacing: 981, 961 … 1 for 50 steps, and 0 at the end.

    In diffusers' words: "leading", with steps_offset 1 and without set_alpha_to_one.
    """
    stride = ppdd.TIMESTEPS // steps
    return [*range(1 + stride * (steps - 1), 0, -stride), 0]


def make_rows(config, base: Base, names: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a base: without a guide, with the guides of these names, and of --guides.

    Guides that are not there are left out, unless --guides asked for them; of the paper's and of a
    student a line says so.
    """
    rows = [*WITHOUT_GUIDE]
    for name in dict.fromkeys((*(names or (*GUIDES, *OUR_GUIDES)), *config.guides)):
        try:
            row = guide_row(config, base, name)
            require((row.name in {other.name for other in rows},
                     f"{row.file} has the name of another guide: rename the file"))
            rows.append(row)
        except BadInput as error:
            if name in config.guides:
                raise
            if name in GUIDES or name.startswith("whole"):
                print_once(f"a row is left out: {error}")
    return rows


def few_rows(config, base: Base) -> list[Row]:
    """CFG in ever fewer steps, a student, and guides of few steps, as far as they are there."""
    every = [row for row in make_rows(config, base, FEW_STEPS)
             if row.sampler == "ddim" and not row.guided]
    return sorted([*every, *CFG_IN_FEW], key=lambda row: row.guide is not None)


def guide_row(config, base: Base, name: str) -> Row:
    """The row of the guide of that name, or in that file, by what it says of itself."""
    path = guide_path(base, name)
    described = read_guide(path)
    about = described.about
    guide = load_guide(path, base.unet.config, resolve_dtype(config.dtype, config.device),
                       config.device)
    print_once(describe_guide(path, about, base))
    fast.prepack(guide)
    steps = about.get("steps") or STAGE_ONE
    low, high = about.get("g_range") or (0, 1)
    only_g = low if low == high else None
    name = path.stem.removesuffix(f"-g{low:g}").removesuffix(f"-{steps}")
    kind = described.config.kind
    title = name.replace("whole", "student") if kind == "whole" else f"{name} guide"
    title += f", {steps} steps" if steps > 1 else ", 1 step"
    if only_g is not None:
        title += f", trained at g = {low:g} only"
    stage_one = not about.get("steps") and only_g is None and not about.get("uncond")
    kind = "seeing" if getattr(described.config, "form", "") == "seeing" else kind
    return Row(path.stem, title, kind, steps, "ddim", guide, path, sha256(path), only_g, stage_one,
               bool(about.get("steps")))


def named_rows(config, rows: list[Row]) -> list[Row]:
    """The rows that --rows names, or all. Raises BadInput for a name that none of them has."""
    unknown = [name for name in config.rows if name not in {row.name for row in rows}]
    require((unknown, f"--rows {' '.join(unknown)}: there is no such row; those there are: "
                      f"{', '.join(row.name for row in rows)}"))
    return [row for row in rows if not config.rows or row.name in config.rows]


def require_guides(rows: list[Row], base: Base, what: str = "guide") -> list[Row]:
    """The rows. Raises BadInput where none of them has a guide."""
    require((not any(row.guide for row in rows),
             f"there is no {what} for {base.name}: train one with train.py"))
    return rows


def plugged_in_rows(config, base: Base, names: tuple[str, ...] = ()) -> list[Row]:
    """No guidance, CFG and the plain base's guides (of these names), for a fine-tune of it.

    Students are there twice: as they are, and moved.
    """
    given = config.bases or config.weights
    plain = replace(base, path=bases.find_weights(config.weights) if given else bases.MINI)
    rows = require_guides(make_rows(config, plain, names), plain)
    students = [row for row in rows if row.kind == "whole"]
    original = (plain.path, plain.sha256) if students else None
    for row in students:
        print_once(*doubts_of_origin(row.file, read_guide(row.file).about, *original))
    moved = [row._replace(name=f"{row.name}-moved", original=original,
                          title=row.title.replace("student", "student moved by its difference"))
             for row in students]
    return [*(row for row in rows if row.sampler == "ddim" and not row.guided), *moved]


# ------------------------------------------------------------------------------- bases, settings

def load(config, path: Path) -> Base:
    """A base as it is evaluated: its convolutions are prepacked, which changes rounding only."""
    base = bases.load_base(path, resolve_dtype(config.dtype, config.device), config.device,
                           config.vae)
    print_once(bases.describe_base(path, config.weights, config.vae))
    fast.prepack(base.unet, base.vae)
    return base


def style_files(config) -> list[Path]:
    """The fine-tuned bases: --bases, else the miniature's three styles. Raises BadInput."""
    if config.bases:
        paths = [expand(path) for path in config.bases]
        names = {bases.base_name(path) for path in paths}
        require(*((not path.exists(), f"--bases: {path} does not exist") for path in paths),
                (len(names) < len(paths), "--bases: give each a name of its own"))
        return paths
    folder = bases.MINI.parent / "styles"
    paths = [folder / f"{style}.safetensors" for style in postcards.STYLES[1:]]
    require(*((not path.exists(), f"there is no {path}: make the miniature's styles with "
               "`python mini/train.py --styles-only`, or pass --bases FILE ...")
              for path in paths))
    return paths


def resolve_defaults(config):
    """The configuration with what suits the command in place of every 0 and empty setting."""
    quick = config.quick
    count = config.count
    if config.prompts:
        prompts = read_prompts(config.prompts, count, config.seed)
        count = count or (min(8, len(prompts)) if quick else len(prompts))
        print_once(*notes_on(prompts, Tokenizer()))
    g = (8.0,) if config.command in ONE_G else (2.0, 8.0) if quick else (2.0, 4.0, 6.0, 8.0)
    config = replace(
        config, g=tuple(dict.fromkeys(config.g)) or g, seeds=config.seeds or (2 if quick else 3),
        count=count or (8 if quick else 64 if config.command in SMALL else 300),
        references=config.references or (200 if quick else 2000),
        repeats=config.repeats or (1 if quick else 3))
    require((config.count > NOISE_PER_SEED, f"--count {config.count}: at most {NOISE_PER_SEED}"),
            (config.command == "match" and any(abs(g) < 0.001 for g in config.g),
             "--g 0 is no guidance: nothing to match"))
    return config


def image_side(config, base: Base) -> int:
    """Side of the images in pixels: what --size says, else 512, or the miniature's 64."""
    unit = 8 * 2 ** (len(base.unet.config.channel_mult) - 1)
    size = config.size or ("64" if base.is_miniature else "512")
    require((not size.isdecimal() or int(size) % unit or not unit <= int(size) <= 4096,
             f"--size {size}: a multiple of {unit} with {base.name}, at most 4096"))
    return int(size)


# ------------------------------------------------------------------------------- prompts, images

class Prompts:
    """What a base is asked for: prompts by seed, and the noise that each image starts from."""

    def __init__(self, config, base: Base):
        self.config = config
        self.own_captions = base.is_miniature and not config.prompts
        self._by_seed: dict[int, tuple[list[str], Tensor | None]] = {}
        self.style = postcards.style_of(base.name)
        require((not base.is_miniature and not config.prompts,
                 f"--prompts is needed with {base.name}: a text file of prompts, or COCO's "
                 "captions_val2014.json"))

    def first_noise(self, seed: int) -> int:
        """The noise seed of a seed's first image."""
        return FIRST_NOISE + NOISE_PER_SEED * seed

    def of(self, seed: int) -> tuple[list[str], Tensor | None]:
        """The prompts of a seed; of the miniature's captions also what they ask for, (N, 6)."""
        if seed not in self._by_seed:
            self._by_seed[seed] = self._make(seed)
        return self._by_seed[seed]

    def _make(self, seed: int) -> tuple[list[str], Tensor | None]:
        config = self.config
        if self.own_captions:
            return full_captions(config.count, self.first_noise(seed) - 1)
        # Drawn by --seed alone: the same prompts for every seed of a table.
        return read_prompts(config.prompts, config.count, config.seed), None


def full_captions(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Fresh captions of postcards that name all six attributes, and the attributes (count, 6)."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    attributes = postcards.sample_attributes(count, generator)
    return [postcards.caption(a, rng, left_out=False) for a in attributes], attributes


def generate(base: Base, row: Row, prompts: list[str], g: float, seeds: Iterable[int],
             side: int, step: Callable[..., Tensor] | None = None) -> Tensor:
    """Images (B, 3, side, side) uint8, on the CPU: one a prompt, from noise of its own seed.

    step is what to call at each step, by default `fast.sample`'s.
    """
    return base.decode(sample_latents(base, row, prompts, g, seeds, side, step)).cpu()


def sample_latents(base: Base, row: Row, prompts: list[str], g: float, seeds: Iterable[int],
                   side: int, step: Callable[..., Tensor] | None = None) -> Tensor:
    """The latents (B, Z, H, W) of those images."""
    c = base.embed(prompts)                                                        # (B, L, D)
    shape = (base.unet.config.in_channels, side // 8, side // 8)
    z = ppdd.noise(seeds, shape).to(c.device)                                      # (B, Z, H, W)
    return run(base, row, z, c, g, sampler=row.sampler, step=step,
               grid=leading_grid(row.steps) if row.leading else None,
               guided=range(*row.guided) if row.guided else None)


def run(base: Base, row: Row, z: Tensor, c: Tensor, g: float, **more) -> Tensor:
    """What a row makes of z (B, Z, H, W) under c (B, L, D); more is for `fast.sample`."""
    empty = base.embed([""]).expand_as(c) if row.kind == "cfg" else None
    return fast.sample(base.unet, z, c, g, row.steps, row.guide, empty, **more)
