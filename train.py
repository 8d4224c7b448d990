"""Train a guide: `python train.py --guide tiny`.

Stage one is Algorithm 1: the guide learns to give in one pass what classifier-free guidance gives
in two. Then, from 64 steps to 32, 16 and 8, the guide learns to do two of its own steps in one
(Section 4.4). The base is never changed. Each stage's guide is saved as it ends:

    guides/BASE/tiny.safetensors, tiny-32.safetensors, tiny-16.safetensors, tiny-8.safetensors

Every update draws from a random generator of its own (seed, stage, update). So a run that was
killed and resumed is, on a CPU, equal to an uninterrupted one, bit for bit.

Shapes: B batch, n of it noised images and the rest rollouts, Z latent channels, H and W sides of
the latent, L tokens, D width of a token.
"""

from __future__ import annotations

import functools
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import ppdd
from mini import postcards
from mini.dataset import Postcards
from ppdd import Distilled, GuideConfig
from support.base import Base, describe_base, find_weights, load_base, merge_loras, to_channels_last
from support.captions import DATA_FORMS
from support.capture import CapturedUpdate
from support.cli import BadInput, option, parse, require, run_command
from support.data import CachedImages, CaptionedImages
from support.distributed import (
    all_reduce,
    barrier,
    init_distributed,
    print_once,
    processes_here,
    rank,
    rank_zero_only,
    world_size,
)
from support.files import atomic_write, check_writable, expand, sha256, sync
from support.guides import load_guide, read_guide, save_guide
from support.machine import find_device, math_attention, resolve_dtype
from support.muon import Muon
from support.training_state import RunFolder, load_optimizer, optimizer_tensors, set_aside

# ------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Config:
    """Settings of a run. The command line is generated from them; they are saved in every file."""

    guide: str = option("tiny", "which guide to train", choices=("tiny", "full"))
    form: str = option("sum", "of the tiny guide: Eq. 5's sum; gated: the text scales what g and "
                              "the time say", choices=("sum", "gated"))

    weights: str = option("", "Stable Diffusion 1.5 to guide; default: looked for, else the "
                              "miniature")
    lora: tuple[str, ...] = option((), "LoRA files to merge into the base: FILE or FILE:scale")
    data: tuple[str, ...] = option((), "a folder of images with .txt or .caption files, or with "
                                       "metadata.jsonl or .csv (file_name, text); img2dataset's "
                                       "shards: a .tar, a folder, 'shards/{00000..00012}.tar'; "
                                       "COCO's captions.json:FOLDER; a text file of prompts, one a "
                                       "line. May be given again (the miniature draws its own)")
    images: int = option(0, "the miniature's training images; 0: 6000, or with --max-updates at "
                            "most 40 batches", low=0, high=10**6)
    size: int = option(512, "side of the training images, pixels (small bases: always 64)",
                       low=64, high=2048)
    cache: str = option("", "encode the images of --data once, and keep that in this folder, fp16")
    trajectories: float = option(0.0, "share of a batch taken not from noised images but from the "
                                      "teacher's own sampling; 1 where there are only prompts",
                                 low=0, high=1)

    g_range: tuple[float, float] = option((2.0, 9.0), "g is uniform in LOW HIGH; 8 8 fixes it",
                                          metavar=("LOW", "HIGH"), low=0, below=100)
    uncond: str = option("", "a negative prompt to bake into the guide in place of ∅")
    updates: int = option(0, "updates of stage one; 0: what suits this base and guide", low=0)
    halving_updates: int = option(0, "updates of each halving stage; 0: what suits", low=0)
    max_updates: int = option(0, "no stage is longer than this; 0: no such limit", low=0)
    start_steps: int = option(64, "the first halving's teacher takes this many steps", low=1,
                              high=1000)
    end_steps: int = option(8, "halve down to this many steps; start_steps: stage one only", low=1,
                            high=1000)
    batch: int = option(32, "images an update, those of all processes together", low=1, high=65536)
    optimizer: str = option("", "default: what suits this base and guide",
                            choices=("adamw", "muon"))
    lr: float = option(0.0, "learning rate of stage one; 0: what suits this base and guide",
                       low=0, below=1)
    halving_lr: float = option(0.0, "learning rate of the halving stages; 0: what suits",
                               low=0, below=1)
    loss: str = option("eps", "weigh the ε error plainly, as the paper does, or by the root of "
                              "truncated SNR", choices=("eps", "root-snr"))
    grad_clip: float = option(1.0, "gradients are clipped to this norm", above=0)
    seed: int = option(0, "seed of everything", low=0, high=2**31 - 1)

    init: str = option("", "begin with this guide and skip stage one")
    further: bool = option(False, "with --init: train stage one on, with a schedule and updates of "
                                  "its own")
    resume: bool = option(False, "go on where the run in this folder stopped")
    out: str = option("guides", "finished guides go to OUT/BASE")
    run: str = option("", "folder of checkpoints, log and images; default: runs/BASE/GUIDE")
    save_every: int = option(500, "updates between checkpoints", low=1)
    keep: int = option(2, "how many checkpoints to keep", low=1)
    grid_every: int = option(1000, "updates between images of CFG beside the guide; 0: none", low=0)

    device: str = option("", "cuda or cpu; default: cuda where there is one")
    dtype: str = option("auto", "of the base, and of the guide's arithmetic; auto: bf16 on a GPU "
                                "that has it, else fp32", choices=("auto", "fp32", "bf16"))
    accumulate: int = option(1, "split each batch into so many parts, one by one, to save memory",
                             low=1)
    checkpointing: bool = option(False, "recompute the decoder's blocks backwards, for memory")
    compile: bool = option(False, "torch.compile the base; needs a C++ compiler on a CPU")


class Defaults(NamedTuple):
    """What suits a base and a guide where a setting was left open."""

    optimizer: str
    lr: float
    updates: int
    halving_lr: float
    halving_updates: int


# The miniature's made the bundled guides (RESULTS.md says how they were chosen). SD 1.5's are
# starting points that nobody has tried: ControlNet's usual rate for the full guide, ten times that
# for the tiny one, whose layers are few and start from nothing. Halving changes a guide that is
# good already, so it takes a fraction of stage one's rate.
DEFAULTS = {
    ("mini", "tiny"): Defaults("adamw", 5e-3, 6000, 1e-3, 500),
    ("mini", "full"): Defaults("muon", 6e-3, 9000, 1.5e-3, 500),
    ("sd", "tiny"): Defaults("adamw", 1e-3, 20_000, 3e-4, 5_000),
    ("sd", "full"): Defaults("adamw", 1e-4, 20_000, 3e-5, 5_000),
}
POSTCARDS = 6000                # of the miniature, to train on
WEIGHTS = {"eps": None, "root-snr": ppdd.root_snr}
OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon}
# Settings that a resumed run may change: they change no draw, or are checked by what they hold.
MAY_CHANGE = {"resume", "save_every", "keep", "grid_every", "device", "dtype", "compile",
              "accumulate", "checkpointing", "max_updates", "updates", "halving_updates", "lr",
              "halving_lr", "out", "run", "init", "further", "cache", "images", "weights", "lora",
              "data"}
# A gradient so many times its usual norm stops the run: the guide would not recover.
EXPLODED = 1000


def check(config: Config) -> None:
    """Raises BadInput for settings that don't go together, before anything is loaded."""
    low, high = config.g_range
    halvings = config.start_steps / config.end_steps
    require(
        (low > high or high == 0, f"--g-range {low:g} {high:g}: give LOW <= HIGH, and not both 0"),
        (config.accumulate * world_size() > config.batch,
         f"--accumulate {config.accumulate}: at most --batch {config.batch} over the number of "
         "processes"),
        (config.size % 64, f"--size {config.size}: a multiple of 64 pixels"),
        (not halvings.is_integer() or int(halvings).bit_count() != 1,
         "--start-steps must be --end-steps times a power of two: 64 and 8, for example"),
        (config.further and not config.init, "--further is for a guide given with --init"),
        (config.init and not config.further and config.start_steps == config.end_steps,
         "--init skips stage one, and --start-steps is --end-steps: nothing is left to train"),
        (config.cache and not config.data, "--cache is for images of --data: give some"),
        (config.uncond != config.uncond.encode(errors="ignore").decode(),
         "--uncond holds bytes that are not text"))


def resolve_defaults(config: Config, base: Base) -> Config:
    """The configuration with every 0, "" and ~ replaced by what it stands for."""
    suits = DEFAULTS["mini" if base.is_miniature else "sd", config.guide]
    limit = config.max_updates or math.inf
    images = min(POSTCARDS, 40 * config.batch) if config.max_updates else POSTCARDS
    low, high = config.g_range
    name = config.guide + (f"-g{low:g}" if low == high else "")
    paths = {k: getattr(config, k) for k in ("out", "init", "cache")}
    paths["run"] = config.run or f"runs/{base.name}/{name}"
    return replace(
        config, optimizer=config.optimizer or suits.optimizer, lr=config.lr or suits.lr,
        halving_lr=config.halving_lr or suits.halving_lr,
        updates=int(min(config.updates or suits.updates, limit)),
        halving_updates=int(min(config.halving_updates or suits.halving_updates, limit)),
        images=config.images or images,
        **{k: str(expand(path)) if path else "" for k, path in paths.items()})


# ------------------------------------------------------------------------------- stages


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


def stages(config: Config) -> list[Stage]:
    """Stage one, then a halving each from start_steps down to end_steps."""
    result, steps = [Stage(0, config.updates, config.lr)], config.start_steps
    while steps > config.end_steps:
        steps //= 2
        result.append(Stage(steps, config.halving_updates, config.halving_lr))
    return result


@functools.cache
def next_timestep(steps: int, device: torch.device) -> Tensor:
    """(1000,) the timestep that follows t in a run of so many steps; −1 for t outside its grid."""
    grid, following = torch.tensor(ppdd.step_grid(steps)), torch.full((ppdd.TIMESTEPS,), -1)
    following[grid[:-1]] = grid[1:]
    return following.to(device)


def lr_schedule(update: int, total: int, warmup: int = 50) -> float:
    """Share of the learning rate: a short warmup, then a cosine down to a twentieth.

    Without the warmup Adam's first steps, whose second moments are of one batch, are too long.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * update / max(total, 1)))
    return min(1.0, (update + 1) / warmup) * (0.05 + 0.95 * cosine)


# ------------------------------------------------------------------------------- a run

METRICS = ("loss", "error", "correction", "row", "stop")   # of each sample, shared by processes


class Batch(NamedTuple):
    """What chance decides of a whole batch, whatever the number of processes."""

    noise: Tensor       # (2, n, Z, H, W) of the n noised images: for x from its moments, for z_t
    t: Tensor           # (B,) timesteps, of those images and then of the rollouts
    g: Tensor           # (B,)


class Part(NamedTuple):
    """What the loss of b samples of a batch is computed from, m of them noised images."""

    moments: Tensor     # (m, 2 Z, H, W)
    noise: Tensor       # (2, m, Z, H, W)
    rollouts: Tensor    # (b − m, Z, H, W)
    t: Tensor           # (b,)
    g: Tensor           # (b,)
    c: Tensor           # (b, L, D)
    rows: Tensor        # (b,) of the data


class Trainer:
    """A guide in training: what it needs, and where it stands."""

    def __init__(self, config: Config, base: Base, data: Postcards | CaptionedImages):
        self.config, self.base, self.data = config, base, data
        self.device = base.device
        self.captures = self.device.type == "cuda" and world_size() == 1
        self.folder = RunFolder(config.run)
        self.guide_config = GuideConfig(kind=config.guide, form=config.form)
        torch.manual_seed(config.seed)
        self.guide = self.new_guide()
        # Of the halvings: the guide of the stage before.
        self.teacher = self.new_guide().to(base.unet.dtype).requires_grad_(False)
        self.guide.start_from(base.unet)
        self.empty = base.embed([config.uncond]).to(base.unet.dtype)
        self.base_hash = base.sha256
        self.stages, self.stage, self.update = stages(config), 0, 0
        self.init_info: dict = {}               # what the guide of --init says of itself
        self.signalled, self.stopping = 0, False    # a signal here; one to any process
        # The samples of a batch that are this process's, in the parts that --accumulate makes.
        slots = torch.arange(config.batch)[rank()::world_size()]
        parts = [slots[k::config.accumulate] for k in range(config.accumulate)]
        self.parts = [part for part in parts if len(part)]
        self.noised = config.batch - math.ceil(config.trajectories * config.batch)
        # Where results of a part go, on the device: in the metrics, and in the rollouts' targets.
        self.places = [(part.to(self.device),
                        (part[part >= self.noised] - self.noised).to(self.device))
                       for part in self.parts]
        self.begin_stage()

    def new_guide(self) -> nn.Module:
        guide = ppdd.build_guide(self.base.unet.config, self.guide_config)
        return to_channels_last(guide.to(self.device))

    def begin_stage(self) -> None:
        self.rollout: dict[str, Tensor] = {}                    # see `refill_rollout`
        self.recent: list[tuple[float, float, float]] = []      # metrics of the last 50 updates
        self.unread: list[Tensor] = []                          # metrics still on the device
        self.images: Iterator | None = None                     # see `load_images`
        optimizer = OPTIMIZERS[self.config.optimizer]
        # On a GPU an update is recorded once and replayed; what changes in it must be a tensor.
        on_gpu = self.device.type == "cuda"
        options = {"lr": torch.zeros((), device=self.device), "capturable": on_gpu}
        # No weight decay: a guide's weights start at or near 0 and stay small.
        self.optimizer = optimizer(self.guide.parameters(), weight_decay=0.0,
                                   **options if self.captures else {})
        self.captured_update = CapturedUpdate(self.update_guide)

    # -- the whole run

    def train(self) -> None:
        """To the end, or until Ctrl-C or SIGTERM: then KeyboardInterrupt, once all is saved."""
        handlers = {number: signal.signal(number, self.handle_signal)
                    for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.stage < len(self.stages):
                stage = self.stages[self.stage]
                self.train_stage(stage)
                self.save_guide(stage)
                self.teacher.load_state_dict(self.guide.state_dict())
                self.stage, self.update = self.stage + 1, 0
                self.begin_stage()
                self.save()
            self.finish()
        except (OSError, SafetensorError) as error:
            raise BadInput(f"reading or writing failed ({error}): make room, or give back the "
                           "permission, and --resume goes on from the last checkpoint") from error
        finally:
            self.images = None                  # ends the processes that load images
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def train_stage(self, stage: Stage) -> None:
        """Update after update; between them the log, images and checkpoints."""
        config, shown = self.config, 0.0
        with tqdm(total=stage.updates, initial=self.update, desc=stage.title,
                  disable=rank() > 0) as bar:
            while self.update < stage.updates:
                self.train_step(stage)
                bar.update()
                last = self.update == stage.updates
                log_now = self.update % 50 == 0 or last
                save_now = self.update % config.save_every == 0
                show_now = log_now or time.monotonic() > shown + 10
                if show_now or save_now or self.signalled or not self.captures:
                    self.read_metrics(stage)                # waits for the GPU
                if show_now:
                    shown = time.monotonic()
                    means = np.mean(self.recent[-(self.update % 50 or 50):], axis=0)
                    bar.set_postfix(loss=f"{means[0]:.4g}", unexplained=f"{means[1]:.1%}",
                                    skipped=len(self.data.skipped))
                if log_now:
                    self.log(stage, *means)
                if config.grid_every and (self.update % config.grid_every == 0 or last):
                    self.draw_grid(stage)
                if save_now or self.stopping:
                    self.save()
                if self.stopping:
                    raise KeyboardInterrupt

    def train_step(self, stage: Stage) -> None:
        """One update: draw a batch, the loss and its gradient, the optimiser's step."""
        generator = self.generator(self.stage, self.update)
        batch = self.draw(stage, generator)
        with math_attention(self.device):
            parts = self.gather(stage, batch)
            self.set_lr(stage)
            if self.captures:
                metrics, target, norm = self.captured_update(parts)     # `update_guide`, replayed
            else:
                metrics, target, norm = self.backward(parts)
                self.check_update(stage, metrics, norm, batch)
                self.optimizer.step()
        self.advance_rollout(stage, target, generator)
        self.unread.append(torch.cat([metrics.sum(0), norm.view(1)]))
        self.update += 1

    def backward(self, parts: list[Part]) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the whole batch's loss, clipped. Returns metrics (B, len(METRICS)), the
        rollouts' targets, and the gradient's norm before clipping."""
        metrics = torch.zeros(self.config.batch, len(METRICS), dtype=torch.float64,
                              device=self.device)
        target = torch.zeros_like(self.rollout["z"])
        self.optimizer.zero_grad(set_to_none=True)
        for (slots, rollouts), part in zip(self.places, parts):
            x = self.base.vae.sample(part.moments, part.noise[0])             # (m, Z, H, W)
            z = ppdd.add_noise(x, part.noise[1], part.t[:len(x)])
            z = torch.cat([z, part.rollouts])                                 # (b, Z, H, W)
            result = self.distill(z, part.t, part.c, part.g)
            (result.loss * (len(slots) / self.config.batch)).backward()
            target[rollouts] = result.target[len(x):]
            columns = (result.loss.detach() / self.config.batch, result.error, result.correction,
                       part.rows, torch.full_like(part.rows, self.signalled))
            for k, column in enumerate(columns):
                metrics[slots, k] = column.to(metrics)
        gradients = [p.grad for p in self.guide.parameters() if p.grad is not None]
        all_reduce(metrics, target, *gradients)
        norm = nn.utils.clip_grad_norm_(self.guide.parameters(), self.config.grad_clip)
        return metrics, target, norm

    def distill(self, z: Tensor, t: Tensor, c: Tensor, g: Tensor) -> Distilled:
        """The loss of a batch: Algorithm 1, or a halving on the grid of the teacher's steps."""
        stage, unet = self.stages[self.stage], self.base.unet
        weight = WEIGHTS[self.config.loss]
        if not stage.steps:
            empty = self.empty.expand(len(z), -1, -1)
            return ppdd.cfg_distillation(unet, self.run_guide, z, t, c, empty, g, weight)
        following = next_timestep(2 * stage.steps, self.device)
        t_mid = following[t]
        return ppdd.halving(unet, self.run_guide, self.teacher, z, t, t_mid, following[t_mid], c, g,
                            weight)

    def update_guide(self, parts: list[Part]) -> tuple[Tensor, Tensor, Tensor]:
        result = self.backward(parts)
        self.optimizer.step()
        return result

    def set_lr(self, stage: Stage) -> None:
        lr = stage.lr * lr_schedule(self.update, stage.updates)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def run_guide(self, *args: Tensor) -> list[Tensor]:
        """The guide, in the dtype of the base. Its own weights stay in float32: an update moves
        them by less than bf16 can tell."""
        dtype = self.base.unet.dtype
        if dtype == torch.float32:
            return self.guide(*args)
        weights = {k: p.to(dtype) for k, p in self.guide.named_parameters()}
        return torch.func.functional_call(self.guide, weights, args)

    # -- a batch

    def updates_before(self, stage: int) -> int:
        """Updates of this stage that the guide had already when --further began."""
        return 0 if stage else self.init_info.get("updates", 0)

    def generator(self, stage: int, update: int) -> torch.Generator:
        """Of everything that chance decides in one update."""
        update += self.updates_before(stage)
        seed = ((self.config.seed * 31 + stage) * 1_000_003 + update) % 2**63
        return torch.Generator().manual_seed(seed)

    def draw_rows(self, generator: torch.Generator) -> Tensor:
        """(n,) rows of the data: the images to noise. The first that a generator draws."""
        return torch.randint(max(self.data.image_count, 1), (self.noised,), generator=generator)

    def load_images(self, stage: Stage) -> Iterator:
        """Rows and images of every part of the batch; those of later updates are loaded ahead."""
        if self.images is None:
            self.images = self.data.batches(
                rows[part[part < len(rows)]].tolist()
                for update in range(self.update, stage.updates)
                for rows in [self.draw_rows(self.generator(self.stage, update))]
                for part in self.parts)
            if self.config.compile:
                barrier()                       # compiling may take longer than a collective waits
        return self.images

    def draw(self, stage: Stage, generator: torch.Generator) -> Batch:
        """A batch: one t and one g a sample, t on the grid of the student's steps in a halving.

        On the CPU, so that a seed means the same on every device.
        """
        n, side = len(self.draw_rows(generator)), self.data.side
        noise = torch.randn(2, n, self.base.unet.config.in_channels, side, side,
                            generator=generator)
        g = self.draw_g(n, generator)
        if stage.steps:
            grid = torch.tensor(ppdd.step_grid(stage.steps))
            t = grid[torch.randint(stage.steps, (n,), generator=generator)]
        else:
            t = torch.randint(ppdd.TIMESTEPS, (n,), generator=generator)
        self.refill_rollout(self.config.batch - n, generator)
        return Batch(noise, torch.cat([t, self.rollout["t"]]), torch.cat([g, self.rollout["g"]]))

    def draw_g(self, n: int, generator: torch.Generator) -> Tensor:
        low, high = self.config.g_range
        return low + (high - low) * torch.rand(n, generator=generator)

    def gather(self, stage: Stage, batch: Batch) -> list[Part]:
        """This process's share of a batch, part by part, on the device: noised images, then
        rollouts."""
        parts = []
        for slots, (_, rollouts), (rows, images) in zip(self.parts, self.places,
                                                        self.load_images(stage)):
            noise = batch.noise[:, slots[slots < self.noised]]
            on_host = slots[slots >= self.noised] - self.noised
            moments = (self.data.moments(images) if noise.shape[1] else
                       noise.new_zeros(0, 2 * noise.shape[2], *noise.shape[3:]))
            rows = rows + self.rollout["row"][on_host].tolist()
            c = self.data.prompt_states(rows).to(self.base.unet.dtype)
            parts.append(Part(
                moments.to(self.device), self.to_device(noise),
                self.rollout["z"][rollouts], self.to_device(batch.t[slots]),
                self.to_device(batch.g[slots]), c, self.to_device(torch.tensor(rows))))
        return parts

    def to_device(self, x: Tensor) -> Tensor:
        """The tensor on the device; a pinned copy, so that the host need not wait for a GPU."""
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def refill_rollout(self, n: int, generator: torch.Generator) -> None:
        """`rollout` is where n of the teacher's samplings stand (Jensen & Sadat, 2025); those that
        have arrived begin anew, with other noise, prompt and g."""
        shape = (n, self.base.unet.config.in_channels, self.data.side, self.data.side)
        new = {"z": self.to_device(torch.randn(shape, generator=generator)),
               "t": torch.full((n,), ppdd.TIMESTEPS - 1),
               "g": self.draw_g(n, generator),
               "row": torch.randint(len(self.data), (n,), generator=generator)}
        old = self.rollout or new
        arrived = old["t"] < 0
        self.rollout = {k: torch.where(arrived, new[k], old[k]) for k in ("t", "g", "row")}
        arrived = self.to_device(arrived).view(-1, 1, 1, 1)
        self.rollout["z"] = torch.where(arrived, new["z"], old["z"])

    def advance_rollout(self, stage: Stage, target: Tensor, generator: torch.Generator) -> None:
        """Takes the teacher's next step, with the prediction that the loss needed anyway."""
        steps = stage.steps or self.config.start_steps
        t = self.rollout["t"]
        s = next_timestep(steps, t.device)[t]
        if self.update == 0:
            # Each goes to a place of its own first, or all would be at the same t for ever.
            grid = torch.tensor(ppdd.step_grid(steps))
            s = grid[torch.randint(steps, t.shape, generator=generator)]
        z = ppdd.ddim_step(self.rollout["z"], target, self.to_device(t), self.to_device(s))
        self.rollout |= {"z": z, "t": s}

    # -- what goes wrong

    def read_metrics(self, stage: Stage) -> None:
        """Brings the metrics of the last updates to the host, and looks at them."""
        for loss, error, correction, _, stop, norm in torch.stack(self.unread).tolist():
            if self.captures and self.is_bad(loss, norm):
                raise BadInput(
                    f"the loss is {loss:.4g} and the gradient's norm {norm:.4g} at update "
                    f"{self.update} ({stage.title}) or shortly before: go on from the last "
                    f"checkpoint with --resume and {self.lower_lr(stage)}")
            self.recent = [*self.recent[-49:], (loss, error / max(correction, 1e-30), norm)]
            self.stopping = bool(self.signalled if self.captures else stop)
        self.unread = []

    def is_bad(self, loss: float, norm: float) -> bool:
        """Whether an update would spoil the guide."""
        return not (math.isfinite(loss) and math.isfinite(norm)
                    and norm <= EXPLODED * self.usual_norm())

    def usual_norm(self) -> float:
        """Mean norm of the gradient lately; infinite while there is too little to tell."""
        norms = [norm for _, _, norm in self.recent]
        return float(np.mean(norms)) if len(norms) >= 10 else math.inf

    def lower_lr(self, stage: Stage) -> str:
        return f"a lower --{'halving-' * bool(stage.steps)}lr (now {stage.lr:g})"

    def check_update(self, stage: Stage, metrics: Tensor, norm: Tensor, batch: Batch) -> None:
        """Stops before an update that would spoil the guide, and keeps the state before it."""
        loss, norm, usual = metrics[:, 0].sum().item(), norm.item(), self.usual_norm()
        if not self.is_bad(loss, norm):
            return
        self.save(keep=0)
        error = metrics[:, METRICS.index("error")]
        broken = (~error.isfinite()).nonzero().flatten()
        worst = broken if len(broken) else error.argsort(descending=True)[:1]
        samples = "; ".join(self.describe_sample(i, batch, metrics) for i in worst[:3].tolist())
        before = f" (before, {usual:.4g})" if math.isfinite(usual) else ""
        has_older = len(self.folder.checkpoints()) > 1
        older = "delete that file and go on from the one before with " if has_older else ""
        raise BadInput(
            f"the loss is {loss:.4g} and the gradient's norm {norm:.4g}{before} at update "
            f"{self.update + 1} ({stage.title}), where {samples}. The state before it is kept "
            f"in {self.folder.checkpoint_path(self.stage, self.update)}: try --resume --dtype "
            f"fp32, or {older}--resume and {self.lower_lr(stage)}")

    def describe_sample(self, i: int, batch: Batch, metrics: Tensor) -> str:
        row = int(metrics[i, METRICS.index("row")])
        return f"t {batch.t[i]}, g {batch.g[i]:.3g}, {self.data.captions([row])[0]!r}"

    def handle_signal(self, number: int, frame: object) -> None:
        """Ctrl-C or SIGTERM: the update at hand is ended first; a second one does not wait."""
        self.signalled = number
        signal.signal(number, signal.default_int_handler)

    # -- log, images, files

    @rank_zero_only
    def log(self, stage: Stage, loss: float, unexplained: float, norm: float) -> None:
        self.folder.log({"stage": self.stage, "steps": stage.steps, "update": self.update,
                         "loss": loss, "unexplained": unexplained, "norm": norm,
                         "lr": float(self.optimizer.param_groups[0]["lr"]),
                         "time": round(time.time(), 1)})

    @rank_zero_only
    def draw_grid(self, stage: Stage) -> None:
        """CFG above, the guide below, from the same noise, at this stage's number of steps."""
        unet, prompts, side = self.base.unet, self.data.example_prompts(4), self.data.side
        z = ppdd.noise(range(len(prompts)), (4, side, side)).to(self.device)
        c, g = self.base.embed(prompts).to(unet.dtype), min(8.0, self.config.g_range[1])
        empty, steps = self.empty.expand(len(prompts), -1, -1), stage.steps or 25
        rows = [ppdd.sample(unet, z, c, g, steps, empty=empty),
                ppdd.sample(unet, z, c, g, steps, guide=self.run_guide)]
        images = [torch.cat(list(self.base.decode(row).cpu()), dim=2) for row in rows]
        grid = torch.cat(images, dim=1).permute(1, 2, 0)                      # (2 · 8H, 4 · 8W, 3)
        name = f"{self.config.guide}{stage.suffix}-{self.update:06d}.png"
        with atomic_write(self.folder.path / name) as temporary:
            Image.fromarray(grid.numpy()).save(temporary, format="png")

    @rank_zero_only
    def save_guide(self, stage: Stage) -> None:
        low, high = self.config.g_range
        name = self.config.guide + stage.suffix + (f"-g{low:g}" if low == high else "")
        path = Path(self.config.out) / self.base.name / f"{name}.safetensors"
        about = {"base": self.base.name, "base_hash": self.base_hash,
                 "stage": self.stage, "steps": stage.steps, "g_range": [low, high],
                 "uncond": self.config.uncond,
                 "updates": self.updates_before(self.stage) + self.update,
                 "seed": self.config.seed, "settings": asdict(self.config), "init": self.init_info}
        aside = set_aside(path, about)
        save_guide(path, self.guide, self.guide_config, about)
        sync(path)
        tqdm.write(f"saved {path}{f'; the one before it is {aside.name}' if aside else ''}")

    @rank_zero_only
    def finish(self) -> None:
        self.folder.remove_checkpoints()
        if skipped := self.data.skipped_summary():
            tqdm.write(f"images{skipped}")

    @rank_zero_only
    def save(self, keep: int | None = None) -> None:
        """The whole state as a checkpoint; keep: how many stay, 0 all, default --keep."""
        tensors = {f"rollout.{k}": v for k, v in self.rollout.items()}
        for prefix, guide in (("guide.", self.guide), ("teacher.", self.teacher)):
            tensors |= {prefix + k: v for k, v in guide.state_dict().items()}
        state = {"stage": self.stage, "update": self.update, "recent": self.recent,
                 "base_hash": self.base_hash, "config": asdict(self.config),
                 "data": self.data.identity, "init": self.init_info}
        self.folder.save(tensors | optimizer_tensors(self.optimizer), state,
                         self.config.keep if keep is None else keep)

    def load(self) -> None:
        """Goes on from the last checkpoint that is whole."""
        tensors, state = self.folder.load()
        self.refuse_other_settings(state)
        self.stage, self.update, self.init_info = state["stage"], state["update"], state["init"]
        self.recent = [tuple(metrics) for metrics in state["recent"]]
        for prefix, guide in (("guide.", self.guide), ("teacher.", self.teacher)):
            guide.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items()
                                   if k.startswith(prefix)})
        load_optimizer(self.optimizer, tensors)
        self.rollout = {k.removeprefix("rollout."): v for k, v in tensors.items()
                        if k.startswith("rollout.")}
        if self.rollout:
            self.rollout["z"] = self.rollout["z"].to(self.device)
            self.rollout["row"] %= len(self.data)       # the data may have shrunk since
        if rank() == 0:
            self.folder.trim_log(self.stage, self.update)
        barrier()

    def refuse_other_settings(self, state: dict) -> None:
        """Raises BadInput where a checkpoint is of another run than the one asked for."""
        now, before = json.loads(json.dumps(asdict(self.config))), state["config"]
        changed = [k for k in now if k not in MAY_CHANGE and before.get(k) != now[k]]
        other_data = state["data"] != self.data.identity
        folder = self.folder.path
        require(
            (changed, f"{folder} was begun with another {', '.join(changed)}: give the same, or "
                      "another --run"),
            (state["base_hash"] != self.base_hash,
             f"{folder} was begun on another base than {self.base.path}: give the same --weights, "
             "or another --run"),
            (other_data and now["data"] != before["data"],
             f"{folder} was begun with other --data: give the same, or another --run"),
            (other_data and not self.config.data,
             f"{folder} was begun with other postcards ({state['data']}): give --images and "
             "--max-updates as then"))
        if other_data:
            tqdm.write("the data is not what it was: the run goes on with what is there now")

    def start_from(self, path: Path) -> None:
        """Takes the guide of --init: one of stage one to train it on, or any to halve it."""
        file = read_guide(path)
        steps = file.about.get("steps") or self.config.start_steps
        require(
            (file.config != self.guide_config,
             f"--init {path} is a guide of other settings ({file.config}): give the --guide and "
             "--form that it was trained with"),
            (self.config.further and file.about.get("steps"),
             f"--init {path} was halved to {file.about.get('steps')} steps: --further takes a "
             "guide of stage one; leave it out to halve this one"),
            (steps != self.config.start_steps,
             f"--init {path} takes {steps} steps, and --start-steps is {self.config.start_steps}: "
             f"halve it on with --start-steps {steps} and --end-steps below that"))
        self.init_info = {"sha256": sha256(path), "steps": file.about.get("steps", 0),
                          "updates": file.about.get("updates", 0)}
        weights = load_guide(path, self.base.unet.config).state_dict()
        self.guide.load_state_dict(weights)
        self.teacher.load_state_dict(weights)
        self.stage = 0 if self.config.further else 1


# ------------------------------------------------------------------------------- the command


def prepare(config: Config) -> Trainer:
    """Loads the base and the data, and stands where the run stopped, or at its beginning."""
    check(config)
    path = find_weights(config.weights)
    base = load_base(path, device=find_device(config.device))
    merged = merge_loras(base, config.lora)
    base.unet.to(resolve_dtype(config.dtype, base.device))
    config = resolve_defaults(config, base)
    print_once(describe_base(path, config.weights), *merged)
    folder = RunFolder(config.run)
    unfinished = bool(folder.checkpoints())
    require(
        (config.resume and not unfinished,
         f"{config.run} holds no unfinished run: leave out --resume"),
        (unfinished and not config.resume,
         f"{config.run} holds an unfinished run: go on with --resume, or give another --run"))
    for path in (config.run, config.out, config.cache):
        if path:
            check_writable(Path(path))
    if rank() == 0:
        folder.lock()
    try:
        trainer = begin(config, base)
    except BaseException:
        folder.unlock()
        raise
    trainer.folder = folder
    return trainer


def begin(config: Config, base: Base) -> Trainer:
    """The run itself, once its folder is this process's own."""
    data = load_data(config, base)
    if not data.image_count:
        config = replace(config, trajectories=1.0)
        print_once(f"{len(data)} prompts without images: training on what the base itself paints")
    if config.checkpointing:
        for block in base.unet.output_blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                              preserve_rng_state=False)     # nothing is random
    if config.compile:
        base.unet.encode = torch.compile(base.unet.encode)
        base.unet.decode = torch.compile(base.unet.decode)
    trainer = Trainer(config, base, data)
    if config.resume:
        trainer.load()
    elif config.init:
        trainer.start_from(Path(config.init))
    if rank() == 0 and not config.resume:
        trainer.folder.set_log_aside()
    barrier()                           # some processes take longer than a collective waits
    return trainer


def load_data(config: Config, base: Base) -> Postcards | CaptionedImages:
    """What --data gives, else the miniature's postcards."""
    if not config.data:
        require((not base.is_miniature,
                 f"--data is needed with {base.name}: {DATA_FORMS}; or train on the miniature with "
                 "--weights mini"))
        return Postcards(base, config.images, config.seed)
    size = postcards.SIZE if base.is_miniature else config.size
    data = (CachedImages(base, config.data, size, config.cache) if config.cache else
            CaptionedImages(base, config.data, size))
    require((0 < data.image_count < len(data) and not config.trajectories,
             "--data holds prompts without images beside images: give --trajectories above 0, or "
             "those prompts would never be used"))
    return data


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, "train.py", __doc__.splitlines()[0], argv)
    trainer: Trainer | None = None

    def command() -> None:
        nonlocal trainer
        with init_distributed(find_device(config.device), timedelta(seconds=60),
                              "; --resume goes on from the last checkpoint") as device:
            trainer = prepare(replace(config, device=device))
            trainer.train()

    try:
        run_command(
            f"train.py, process {rank()}" if world_size() > 1 else "train.py", command,
            f"lower --batch (now {config.batch}) or --size, raise --accumulate (now "
            f"{config.accumulate}), or add --checkpointing, --cache or --dtype bf16",
            lambda: how_to_go_on(trainer, argv) if rank() == 0 else "")
    finally:
        if trainer:
            trainer.folder.unlock()


def how_to_go_on(trainer: Trainer | None, argv: list[str] | None) -> str:
    """What to say on Ctrl-C: where the run stands, and the command that goes on."""
    checkpoints = trainer.folder.checkpoints() if trainer else []
    given = sys.argv[1:] if argv is None else argv
    words = [w for w in given if w != "--resume"]
    words += ["--resume"] * bool(checkpoints or "--resume" in given)
    # Without -- torchrun takes --run for an abbreviation of a flag of its own.
    torchrun = ["torchrun", f"--nproc_per_node={processes_here()}", "--"]
    start = torchrun if world_size() > 1 else ["python"]
    nodes = " (and torchrun's other flags as before, on every node)"
    saved = f", saved in {checkpoints[-1]}" if checkpoints else ""
    return (f"stopped{saved}; go on with: {shlex.join([*start, 'train.py', *words])}"
            f"{nodes * (processes_here() < world_size())}")


if __name__ == "__main__":
    main()
