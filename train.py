"""Train a guide: `python train.py --guide tiny`.

Stage one is Algorithm 1: the guide learns to give in one pass what classifier-free guidance gives
in two. Then, from 64 steps to 32, 16 and 8, the guide learns to do two of its own steps in one
(Section 4.4). The base is never changed. Each stage's guide is saved as it ends:

    guides/BASE/tiny.safetensors, tiny-32.safetensors, tiny-16.safetensors, tiny-8.safetensors

Every update draws from a generator of its own (seed, stage, update), so a run that was killed and
resumed is, on a CPU, equal to an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

import ppdd
from mini import postcards
from ppdd import Base, Distilled, GuideConfig
from unet import CheckpointError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class BadInput(ValueError):
    """Something the person gave can't be used; the message is all they need to see."""


def option(default, text: str, **more):
    """A field of a configuration, with the help text of its flag."""
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Config:
    """Settings of a run; the command line is generated from them, and they go into every file."""

    guide: str = option("tiny", "which guide to train", choices=("tiny", "full"))
    weights: str = option("", "Stable Diffusion 1.5 to guide; looked for, else the miniature")
    data: str = option("", "folder of pictures with .txt captions, or a text file of prompts, "
                           "one a line (the miniature draws its own)")
    trajectories: float = option(0.0, "share of a batch taken not from noised pictures but from "
                                      "the teacher's own sampling; 1 where there are only prompts")
    size: int = option(512, "side of the training pictures, pixels (small bases: always 64)")
    g_range: tuple[float, float] = option((2.0, 9.0), "g is uniform in LOW HIGH; 8 8 fixes it")
    uncond: str = option("", "a negative prompt to bake into the guide in place of ∅")
    updates: int = option(0, "updates of stage one; 0: what suits this base and guide")
    halving_updates: int = option(0, "updates of each halving stage; 0: what suits")
    max_updates: int = option(0, "no stage is longer than this; 0: no such limit")
    start_steps: int = option(64, "the first halving's teacher takes this many steps")
    end_steps: int = option(8, "halve down to this many steps; start_steps: stage one only")
    batch: int = option(32, "pictures an update")
    optimizer: str = option("", "default: what suits this base and guide",
                            choices=("adamw", "muon"))
    lr: float = option(0.0, "learning rate of stage one; 0: what suits this base and guide")
    halving_lr: float = option(0.0, "learning rate of the halving stages; 0: what suits")
    loss: str = option("eps", "weigh the ε error plainly as the paper does, by truncated SNR, or "
                              "by the root of that", choices=("eps", "root-snr", "snr"))
    pool: str = option("attention", "tiny: how text becomes a vector",
                       choices=("attention", "mean", "end"))
    form: str = option("sum", "tiny: Eq. 5's sum, or g times what time and text say",
                       choices=("sum", "product"))
    pictures: int = option(6000, "the miniature's training pictures")
    clip: float = option(1.0, "gradients are clipped to this norm")
    ema: float = option(0.0, "a stage's guide is the running mean of its weights with this decay; "
                             "0: its last weights")
    seed: int = option(0, "seed of everything")
    device: str = option("", "cuda or cpu; default: cuda where there is one")
    dtype: str = option("auto", "autocast; auto: bf16 on CUDA, none on CPU",
                        choices=("auto", "fp32", "bf16"))
    compile: bool = option(False, "torch.compile the base; needs a C++ compiler on a CPU")
    out: str = option("guides", "finished guides go to OUT/BASE")
    run: str = option("", "folder of checkpoint, log and pictures; default runs/BASE/GUIDE")
    init: str = option("", "start stage one's guide from this file and skip stage one")
    resume: bool = option(False, "go on where the run in this folder stopped")
    save_every: int = option(500, "updates between checkpoints")
    grid_every: int = option(1000, "updates between pictures of CFG beside guide; 0: none")


# Optimiser, then learning rate and updates of stage one and of each halving, by size of base and
# kind of guide. The miniature's made the bundled guides; SD's are starting points, not tried.
LENGTHS = {
    ("mini", "tiny"): ("adamw", 5e-3, 6000, 1e-3, 500),
    ("mini", "full"): ("muon", 6e-3, 9000, 1.5e-3, 500),
    ("sd", "tiny"): ("adamw", 1e-3, 20_000, 3e-4, 5_000),
    ("sd", "full"): ("adamw", 1e-4, 20_000, 3e-5, 5_000),
}

WEIGHTS = {"eps": None, "root-snr": ppdd.root_snr, "snr": ppdd.truncated_snr}


def complete(config: Config, base: Base) -> Config:
    """The configuration with every 0 and "auto" replaced by what it stands for."""
    size = "sd" if base.unet.config.model_channels >= 256 else "mini"
    optimizer, lr, updates, halving_lr, halving_updates = LENGTHS[size, config.guide]
    limit = config.max_updates or math.inf
    fixed = config.g_range[0] == config.g_range[1]
    name = config.guide + (f"-g{config.g_range[0]:g}" if fixed else "")
    return replace(
        config, optimizer=config.optimizer or optimizer, lr=config.lr or lr,
        halving_lr=config.halving_lr or halving_lr,
        trajectories=1.0 if Path(config.data).expanduser().is_file() else config.trajectories,
        updates=int(min(config.updates or updates, limit)),
        halving_updates=int(min(config.halving_updates or halving_updates, limit)),
        run=config.run or f"runs/{base.name}/{name}")


def check(config: Config) -> None:
    """Raises BadInput for settings that cannot work, before anything is loaded."""
    low, high = config.g_range
    for wrong, sentence in (
        (not (0 <= low <= high < 100 and high > 0),
         f"--g-range {low:g} {high:g}: give LOW <= HIGH, from 0 to 100, and not both 0"),
        (config.batch < 1, f"--batch {config.batch}: at least 1"),
        (config.size % 64 or config.size < 64, f"--size {config.size}: a multiple of 64 pixels"),
        (min(config.updates, config.halving_updates, config.max_updates, config.grid_every) < 0,
         "a number of updates can't be negative"),
        (config.save_every < 1, f"--save-every {config.save_every}: at least 1"),
        (config.pictures < 1, f"--pictures {config.pictures}: at least 1"),
        (not (0 <= config.lr < 1 and 0 <= config.halving_lr < 1), "a learning rate is from 0 to 1"),
        (not config.clip > 0, f"--clip {config.clip}: a norm above 0"),
        (not 0 <= config.trajectories <= 1, f"--trajectories {config.trajectories}: from 0 to 1"),
        (not 0 <= config.ema < 1, f"--ema {config.ema}: from 0 to below 1"),
        (not 0 <= config.seed < 2**31, f"--seed {config.seed}: from 0 to 2147483647"),
        (not _halves(config.start_steps, config.end_steps), "--start-steps must be --end-steps "
         "times a power of two, at most 1000: 64 and 8, for example"),
        (config.device.startswith("cuda") and not torch.cuda.is_available(),
         f"--device {config.device}: no CUDA device here; leave it out or pass cpu"),
    ):
        if wrong:
            raise BadInput(sentence)


def _halves(start: int, end: int) -> bool:
    return 1 <= end <= start <= 1000 and start % end == 0 and (start // end).bit_count() == 1


# ------------------------------------------------------------------------------- data

class Postcards:
    """The miniature's own pictures and captions, drawn and encoded once, kept in memory."""

    def __init__(self, base: Base, count: int, seed: int):
        generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        device, moments, states = next(base.unet.parameters()).device, [], []
        attributes = postcards.sample_attributes(count, generator)
        for part in tqdm(attributes.split(250), desc="drawing postcards", leave=False):
            pictures = postcards.draw(part, generator=generator).to(device)
            moments.append(base.vae.encode(pictures * 2 - 1))
            states.append(base.embed([postcards.caption(a, rng) for a in part]).half())
        self.moments, self.states = torch.cat(moments), torch.cat(states)
        self.side = self.moments.shape[-1]

    def examples(self, count: int) -> list[str]:
        """Prompts for the pictures that show how far the guide is."""
        rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        return [postcards.caption(a, rng, left_out=False)
                for a in postcards.sample_attributes(count, generator)]

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Moments (B, 2 Z, H, W) and prompt states (B, L, D)."""
        return self.moments[rows], self.prompts(rows)

    def prompts(self, rows: list[int]) -> Tensor:
        """The prompt states alone."""
        return self.states[rows].float()


class Folder:
    """Pictures with captions beside them (cat.jpg, cat.txt), encoded as they are needed."""

    def __init__(self, base: Base, folder: str, size: int):
        self.base, self.size, self.side = base, size, size // 8
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise BadInput(f"--data {folder} is not a folder: "
                           "give one of pictures with .txt captions")
        self.files = [f for f in sorted(root.rglob("*")) if f.suffix.lower() in IMAGES
                      and f.with_suffix(".txt").is_file()]
        if not self.files:
            raise BadInput(f"--data {folder} holds no picture with a caption: "
                           "cat.jpg needs cat.txt")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        files, device = [self.files[i] for i in rows], next(self.base.unet.parameters()).device
        pictures = torch.stack([self.picture(f) for f in files]).to(device)
        return self.base.vae.encode(pictures).float(), self.prompts(rows)

    def prompts(self, rows: list[int]) -> Tensor:
        return self.base.embed([self.caption(self.files[i]) for i in rows]).float()

    def examples(self, count: int) -> list[str]:
        return [self.caption(f) for f in self.files[:count]]

    def caption(self, file: Path) -> str:
        return file.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").strip()

    def picture(self, file: Path) -> Tensor:
        """(3, size, size) in −1 … 1: the short side resized, the middle cut out."""
        try:
            image = Image.open(file).convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise BadInput(f"{file} can't be read as a picture ({error}): take it out") from error
        scale = self.size / min(image.size)
        image = image.resize([max(self.size, round(s * scale)) for s in image.size],
                             Image.Resampling.LANCZOS)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


class Prompts:
    """Prompts and no pictures: all latents are the teacher's own (`--trajectories 1`)."""

    def __init__(self, base: Base, file: str, size: int):
        self.base, self.side = base, size // 8
        text = Path(file).expanduser().read_text(encoding="utf-8-sig", errors="replace")
        self.texts = [line.strip() for line in text.splitlines() if line.strip()]
        if not self.texts:
            raise BadInput(f"--data {file} holds no prompt: write one a line")

    def __len__(self) -> int:
        return len(self.texts)

    def prompts(self, rows: list[int]) -> Tensor:
        return self.base.embed([self.texts[i] for i in rows]).float()

    def examples(self, count: int) -> list[str]:
        return self.texts[:count]


# ------------------------------------------------------------------------------- optimisation

class Muon(torch.optim.AdamW):
    """AdamW whose matrices instead move by their momentum made orthogonal (Jordan et al., 2024).

    A convolution is the matrix (out, in · rows · columns). The step is scaled to the size of
    AdamW's at a fifth of the learning rate (Liu et al., 2025).
    """

    @torch.no_grad()
    def step(self) -> None:
        matrices = [p for group in self.param_groups for p in group["params"]
                    if p.ndim > 1 and p.grad is not None]
        for p in matrices:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 0.05)
            ahead = p.grad.lerp(state["momentum"], 0.95).flatten(1)
            size = 0.2 * max(ahead.shape) ** 0.5 * self.param_groups[0]["lr"]
            p.sub_(size * orthogonal(ahead).view_as(p))
            p.grad = None                                                  # the rest is AdamW's
        super().step()


def orthogonal(m: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of m = U S Vᵀ, (rows, columns), by a quintic Newton-Schulz iteration."""
    x = m / (m.norm() + 1e-7)
    x = x.T if m.shape[0] > m.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def rate(update: int, total: int, warmup: int = 50) -> float:
    """Share of the learning rate: a short warmup, then a cosine down to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * update / max(total, 1)))
    return min(1.0, (update + 1) / warmup) * (0.05 + 0.95 * cosine)


# ------------------------------------------------------------------------------- a run

@dataclass(frozen=True)
class Stage:
    """One stage: Algorithm 1 where steps is 0, else a halving that ends at this many steps."""

    steps: int
    updates: int
    lr: float

    @property
    def suffix(self) -> str:
        return f"-{self.steps}" if self.steps else ""

    @property
    def title(self) -> str:
        return f"to {self.steps} steps" if self.steps else "CFG in one pass"


def following(steps: int) -> Tensor:
    """(1000,): the timestep that follows t in a run of so many steps; −1 for t outside its grid."""
    grid, after = torch.tensor(ppdd.step_grid(steps)), torch.full((ppdd.TIMESTEPS,), -1)
    after[grid[:-1]] = grid[1:]
    return after


def stages(config: Config) -> list[Stage]:
    result, steps = [Stage(0, config.updates, config.lr)], config.start_steps
    while steps > config.end_steps:
        steps //= 2
        result.append(Stage(steps, config.halving_updates, config.halving_lr))
    return result


class Run:
    """A guide in training: what it needs, where it stands, and how that is kept on disk."""

    def __init__(self, config: Config, base: Base, data: Postcards | Folder | Prompts):
        self.config, self.base, self.data = config, base, data
        self.device = next(base.unet.parameters()).device
        self.folder = Path(config.run)
        self.guide_config = GuideConfig(kind=config.guide, pool=config.pool, form=config.form)
        torch.manual_seed(config.seed)
        self.guide, self.teacher = self.new_guide(), self.new_guide().requires_grad_(False)
        self.guide.start_from(base.unet)
        self.empty = base.embed([config.uncond]).float()
        self.base_hash = ppdd.fingerprint(base.path)
        self.stages, self.stage, self.update = stages(config), 0, 0
        self.average = copy.deepcopy(self.guide).requires_grad_(False) if config.ema else None
        self.begin_stage()

    def start_from(self, path: Path) -> None:
        """Takes a finished stage-one guide, and goes on with the first halving."""
        made, _ = ppdd.read_about(path)
        if made != self.guide_config:
            raise BadInput(f"--init {path} is a guide of other settings ({made}): give the "
                           "--guide, --pool and --form that it was trained with")
        guide = ppdd.load_guide(path, self.base.unet.config).state_dict()
        for _, module in self.modules():
            module.load_state_dict(guide)
        self.stage = 1

    def new_guide(self) -> nn.Module:
        return ppdd.build_guide(self.base.unet.config, self.guide_config).to(self.device)

    def begin_stage(self) -> None:
        self.walk: dict[str, Tensor] = {}                              # see `on_the_way`
        self.recent: list[tuple[float, float]] = []                    # since the last log line
        kind = {"adamw": torch.optim.AdamW, "muon": Muon}[self.config.optimizer]
        self.optimizer = kind(self.guide.parameters(), weight_decay=0.0)

    # -- one update

    def noised(self, stage: Stage, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Pictures of the data with noise: latents z (n, Z, H, W) at timesteps t (n,), prompt
        states (n, L, D) and g (n,)."""
        rows = torch.randint(len(self.data), (n,), generator=generator).tolist()
        moments, c = self.data[rows]
        noise = torch.randn(2, n, moments.shape[1] // 2, *moments.shape[2:], generator=generator)
        noise, g = noise.to(self.device), self.draw_g(n, generator)
        if stage.steps:
            grid = torch.tensor(ppdd.step_grid(stage.steps))
            t = grid[torch.randint(stage.steps, (n,), generator=generator)].to(self.device)
        else:
            t = torch.randint(ppdd.TIMESTEPS, (n,), generator=generator).to(self.device)
        return ppdd.add_noise(self.base.vae.sample(moments, noise[0]), noise[1], t), t, c, g

    def draw_g(self, n: int, generator: torch.Generator) -> Tensor:
        low, high = self.config.g_range
        return (low + (high - low) * torch.rand(n, generator=generator)).to(self.device)

    def on_the_way(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """As `noised`, but where n samplings of the teacher stand (Jensen & Sadat, 2025); those
        that have arrived begin anew, with other noise, prompt and g."""
        shape = (n, self.base.unet.config.in_channels, self.data.side, self.data.side)
        new = {"z": torch.randn(shape, generator=generator).to(self.device),
               "t": torch.full((n,), ppdd.TIMESTEPS - 1, device=self.device),
               "g": self.draw_g(n, generator),
               "row": torch.randint(len(self.data), (n,), generator=generator).to(self.device)}
        walk = self.walk or new
        arrived = walk["t"] < 0
        self.walk = {k: torch.where(arrived.view(-1, *[1] * (v.ndim - 1)), new[k], v)
                     for k, v in walk.items()}
        c = self.data.prompts(self.walk["row"].tolist())
        return self.walk["z"], self.walk["t"], c, self.walk["g"]

    def walk_on(self, stage: Stage, target: Tensor, generator: torch.Generator) -> None:
        """Takes the teacher's next step, with the prediction that the loss needed anyway.

        A stage's first step is a long one, to a place drawn for each, lest they walk abreast.
        """
        t, after = self.walk["t"], following(stage.steps or self.config.start_steps).to(self.device)
        s = after[t]
        if self.update == 0:
            grid = torch.tensor(ppdd.step_grid(stage.steps or self.config.start_steps))
            s = grid[torch.randint(len(grid) - 1, t.shape, generator=generator)].to(self.device)
        self.walk |= {"z": ppdd.ddim_step(self.walk["z"], target, t, s), "t": s}

    def distill(self, stage: Stage, generator: torch.Generator) -> Distilled:
        """The loss of one batch: Algorithm 1, or a halving on the grid of the teacher's steps."""
        n = math.ceil(self.config.trajectories * self.config.batch)
        parts = [self.on_the_way(n, generator)] if n else []
        if n < self.config.batch:
            parts.insert(0, self.noised(stage, self.config.batch - n, generator))
        z, t, c, g = (torch.cat(part) for part in zip(*parts))
        unet, guide, weight = self.base.unet, self.guide, WEIGHTS[self.config.loss]
        if not stage.steps:
            empty = self.empty.expand(len(z), -1, -1)
            result = ppdd.cfg_distillation(unet, guide, z, t, c, empty, g, weight)
        else:
            after = following(2 * stage.steps).to(self.device)
            result = ppdd.halving(unet, guide, self.teacher, z, t, after[t], after[after[t]], c, g,
                                  weight)
        if n:
            self.walk_on(stage, result.target[-n:], generator)
        return result

    def step(self, stage: Stage) -> tuple[float, float]:
        """One update; returns loss and unexplained share. Stops where they are not finite."""
        seed = ((self.config.seed * 31 + self.stage) * 1_000_003 + self.update) % 2**63
        for group in self.optimizer.param_groups:
            group["lr"] = stage.lr * rate(self.update, stage.updates)
        bf16 = {"auto": self.device.type == "cuda", "fp32": False, "bf16": True}[self.config.dtype]
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        with autocast, ppdd.quick_attention(self.device):
            result = self.distill(stage, torch.Generator().manual_seed(seed))
        loss, unexplained = torch.stack([result.loss.detach(), result.unexplained]).tolist()
        if not math.isfinite(loss):
            raise BadInput(
                f"the loss is {loss} at update {self.update + 1} ({stage.title}): go on from the "
                f"last checkpoint with --resume and a lower --{'halving-' * bool(stage.steps)}lr "
                f"(now {stage.lr:g}), or with --dtype fp32")
        self.optimizer.zero_grad(set_to_none=True)
        with ppdd.quick_attention(self.device):
            result.loss.backward()
        nn.utils.clip_grad_norm_(self.guide.parameters(), self.config.clip)
        self.optimizer.step()
        self.update += 1
        if self.average:
            keep = min(self.config.ema, self.update / (self.update + 10))
            with torch.no_grad():
                for mean, weight in zip(self.average.parameters(), self.guide.parameters()):
                    mean.lerp_(weight, 1 - keep)
        return loss, unexplained

    # -- the whole run

    def train(self) -> None:
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            self.train_stage(stage)
            if self.average:
                self.guide.load_state_dict(self.average.state_dict())
            self.save_guide(stage)
            self.teacher.load_state_dict(self.guide.state_dict())
            self.stage, self.update = self.stage + 1, 0
            self.begin_stage()
            self.save()
        (self.folder / "state.safetensors").unlink(missing_ok=True)

    def train_stage(self, stage: Stage) -> None:
        with tqdm(total=stage.updates, initial=self.update, desc=stage.title) as bar:
            while self.update < stage.updates:
                self.recent.append(self.step(stage))
                bar.update()
                last = self.update == stage.updates
                if self.update % 50 == 0 or last:
                    loss, unexplained = np.mean(self.recent, axis=0)
                    bar.set_postfix(loss=f"{loss:.4g}", unexplained=f"{unexplained:.1%}")
                    self.log(stage, loss, unexplained)
                    self.recent = []
                if self.config.grid_every and (self.update % self.config.grid_every == 0 or last):
                    self.draw_grid(stage)
                if self.update % self.config.save_every == 0:
                    self.save()

    def log(self, stage: Stage, loss: float, unexplained: float) -> None:
        entry = {"stage": self.stage, "steps": stage.steps, "update": self.update, "loss": loss,
                 "unexplained": unexplained, "lr": self.optimizer.param_groups[0]["lr"],
                 "time": round(time.time(), 1)}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def draw_grid(self, stage: Stage) -> None:
        """CFG above, the guide below, from the same noise, at this stage's number of steps."""
        prompts, side = self.data.examples(4), self.data.side
        z = ppdd.noise(range(len(prompts)), (4, side, side)).to(self.device)
        c, steps = self.base.embed(prompts).float(), stage.steps or 25
        g = min(8.0, self.config.g_range[1])
        empty = self.empty.expand(len(prompts), -1, -1)
        rows = [ppdd.sample(self.base.unet, z, c, g, steps, empty=empty),
                ppdd.sample(self.base.unet, z, c, g, steps, guide=self.average or self.guide)]
        pictures = [torch.cat(list(self.base.decode(row).cpu()), dim=2) for row in rows]
        pictures = torch.cat(pictures, dim=1)                                  # (3, 2 H, 4 W)
        image = Image.fromarray(pictures.permute(1, 2, 0).numpy())
        image.save(self.folder / f"{self.config.guide}{stage.suffix}-{self.update:06d}.png")

    # -- on disk

    def save_guide(self, stage: Stage) -> None:
        low, high = self.config.g_range
        name = self.config.guide + stage.suffix + (f"-g{low:g}" if low == high else "")
        path = Path(self.config.out) / self.base.name / f"{name}.safetensors"
        about = {"base": self.base.name, "base_hash": self.base_hash,
                 "stage": self.stage, "steps": stage.steps, "g_range": [low, high],
                 "uncond": self.config.uncond, "updates": self.update, "seed": self.config.seed,
                 "settings": asdict(self.config)}
        ppdd.save_guide(path, self.guide, self.guide_config, about)
        tqdm.write(f"saved {path}")

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """What a checkpoint keeps, by the prefix of its tensors."""
        yield from (("guide.", self.guide), ("teacher.", self.teacher))
        if self.average:
            yield "average.", self.average

    def save(self) -> None:
        """The whole state in one safetensors file, written aside and renamed."""
        tensors = {f"walk.{k}": v for k, v in self.walk.items()}
        for name, module in self.modules():
            tensors |= {name + k: v for k, v in module.state_dict().items()}
        state = {"stage": self.stage, "update": self.update, "recent": self.recent,
                 "base_hash": self.base_hash, "config": asdict(self.config)}
        ppdd.save_tensors(self.folder / "state.safetensors",
                          tensors | ppdd.optimizer_tensors(self.optimizer),
                          {"state": json.dumps(state)})

    def load(self) -> None:
        """Go on from the last checkpoint; log lines written after it are dropped."""
        path = self.folder / "state.safetensors"
        try:
            with safe_open(path, framework="pt") as opened:
                state = json.loads(opened.metadata()["state"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{path} is damaged ({error}): delete it and begin anew") from error
        self.refuse_other_settings(state["config"])
        if state["base_hash"] != self.base_hash:
            raise BadInput(f"{self.folder} was begun on another base than {self.base.path}: "
                           "give the same --weights, or another --run")
        self.stage, self.update, self.recent = state["stage"], state["update"], state["recent"]
        self.walk = {k.removeprefix("walk."): v.to(self.device) for k, v in tensors.items()
                     if k.startswith("walk.")}
        for name, module in self.modules():
            module.load_state_dict({k.removeprefix(name): v for k, v in tensors.items()
                                    if k.startswith(name)})
        ppdd.load_optimizer(self.optimizer, tensors)
        log = self.folder / "log.jsonl"
        if log.exists():
            entries = [json.loads(line) for line in log.read_text().splitlines()
                       if line.endswith("}")]                          # the last may be half a line
            temporary = log.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(e) + "\n" for e in entries if
                                         (e["stage"], e["update"]) <= (self.stage, self.update)))
            temporary.replace(log)

    def refuse_other_settings(self, before: dict) -> None:
        free = {"resume", "save_every", "grid_every", "device", "compile", "max_updates", "lr",
                "halving_lr", "updates", "halving_updates", "dtype", "out", "init", "weights"}
        now = json.loads(json.dumps(asdict(self.config)))
        changed = [k for k in now if k not in free and before.get(k) != now[k]]
        if changed:
            raise BadInput(f"{self.folder} was begun with another {', '.join(changed)}: "
                           "give the same, or another --run")


# ------------------------------------------------------------------------------- command line

def parse(argv: list[str] | None = None) -> Config:
    """The command line, one flag a field of `Config`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for f in fields(Config):
        flag, more = "--" + f.name.replace("_", "-"), dict(f.metadata)
        more["help"] += "" if f.default in ("", False) else " (%(default)s)"
        if isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true", **more)
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, type=float, nargs=2, metavar=("LOW", "HIGH"),
                                default=f.default, **more)
        else:
            parser.add_argument(flag, type=type(f.default), default=f.default, **more)
    given = vars(parser.parse_args(argv))
    return Config(**given | {"g_range": tuple(given["g_range"])})


def prepare(config: Config) -> Run:
    """Load the base and the data, and stand where the run stopped, or at its beginning."""
    check(config)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = ppdd.find_weights(config.weights)
    base = ppdd.load_base(path, device=device)
    base.unet.to(memory_format=torch.channels_last)
    config = complete(config, base)
    print(f"base: {base.name} ({path})")
    state = Path(config.run) / "state.safetensors"
    if config.resume and not state.exists():
        raise BadInput(f"{config.run} holds no unfinished run: leave out --resume")
    if state.exists() and not config.resume:
        raise BadInput(f"{config.run} holds an unfinished run: go on with --resume, "
                       "or give another --run")
    data = load_data(config, base)
    if config.compile:
        base.unet.encode = torch.compile(base.unet.encode)
        base.unet.decode = torch.compile(base.unet.decode)
    run = Run(config, base, data)
    if config.resume:
        run.load()
        return run
    if config.init:
        run.start_from(Path(config.init))
    (run.folder / "log.jsonl").unlink(missing_ok=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def load_data(config: Config, base: Base) -> Postcards | Folder | Prompts:
    mini = base.unet.config.model_channels < 256
    size = postcards.SIZE if mini else config.size
    if Path(config.data).expanduser().is_file():
        return Prompts(base, config.data, size)
    if config.data:
        return Folder(base, config.data, size)
    if not mini:
        raise BadInput("--data is needed with these weights: a folder of pictures with .txt "
                       "captions, or a text file of prompts")
    return Postcards(base, min(config.pictures, 40 * config.batch) if config.max_updates else
                     config.pictures, config.seed)


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    try:
        run = prepare(config)
        run.train()
    except KeyboardInterrupt:
        raise SystemExit("stopped: --resume goes on from the last checkpoint") from None
    except (BadInput, CheckpointError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
