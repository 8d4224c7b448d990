"""Train a guide: `python train.py --guide tiny`.

Stage one is Algorithm 1: the guide learns to give in one pass what classifier-free guidance gives
in two. Then, from 64 steps to 32, 16 and 8, the guide learns to do two of its own steps in one
(Section 4.4). The base is never changed. Each stage's guide is saved as it ends:

    guides/BASE/tiny.safetensors, tiny-32.safetensors, tiny-16.safetensors, tiny-8.safetensors

A run cut short by --max-updates is a trial: its guides stay in the run's folder. `--guide whole`
trains no guide but a copy of the UNet, the student of Meng et al. (2023), in the same stages.

Every update draws from a random generator of its own (seed, stage, update). So a run that was
killed and resumed is, on a CPU, equal to an uninterrupted one, bit for bit.

Shapes: B batch, n of it noised images and the rest rollouts, Z latent channels, H and W sides of
the latent, L tokens, D width of a token.
"""

from __future__ import annotations

from support import startup

if __name__ == "__main__":
    startup.begin()

import copy
import functools
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import meng
import ppdd
from mini import postcards
from mini.dataset import Postcards
from ppdd import Distilled, GuideConfig
from support import fast
from support.base import Base, describe_base, find_weights, load_base, merge_loras, to_channels_last
from support.batches import Batch, Batches, Part, next_timestep
from support.captions import DATA_FORMS
from support.capture import CapturedUpdate
from support.cli import BadInput, option, parse, require, run_command
from support.data import CachedImages, CaptionedImages
from support.distributed import (
    all_reduce,
    barrier,
    command_line,
    init_distributed,
    print_once,
    rank,
    rank_zero_only,
    world_size,
)
from support.files import atomic_write, check_writable, expand, sha256, sync
from support.guides import build_guide, load_guide, read_guide, save_guide
from support.machine import find_device, math_attention, resolve_dtype
from support.muon import Muon
from support.training_state import (
    History,
    Pace,
    RunFolder,
    duration,
    load_optimizer,
    lr_schedule,
    optimizer_tensors,
    refuse_other_run,
    set_aside,
)
from unet import Block

# ------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Config:
    """Settings of a run. The command line is generated from them; they are saved in every file."""

    weights: str = option("", "Stable Diffusion 1.5 to guide; default: looked for, else the "
                              "miniature", group="data")
    vae: str = option("", "a VAE in place of the checkpoint's: a file, a folder, or a checkpoint")
    lora: tuple[str, ...] = option((), "LoRA files to merge into the base: FILE or FILE:scale")
    data: tuple[str, ...] = option((), "a folder of images with .txt or .caption files, or with "
                                       "metadata.jsonl or .csv (file_name; text, caption or "
                                       "prompt); img2dataset's shards: a .tar, a folder, "
                                       "'shards/{00000..00012}.tar'; "
                                       "COCO's captions.json:FOLDER; a text file of prompts, one a "
                                       "line. May be given again (the miniature draws its own)")
    images: int = option(0, "the miniature's training images; 0: what suits, or with "
                            "--max-updates at most 40 batches", low=0, high=10**6)
    size: int = option(512, "side of the training images, pixels (small bases: always 64)",
                       low=64, high=2048)
    cache: str = option("", "encode the images of --data once, and keep that in this folder, fp16")

    guide: str = option("tiny", "which guide to train; whole: none, but a copy of the UNet (Meng "
                                "et al.)", group="guide", choices=("tiny", "full", "whole"))
    form: str = option("sum", "of the tiny guide: Eq. 5's sum; gated: the text scales what g and "
                              "the time say; seeing: so do the image's features",
                       choices=ppdd.FORMS)
    prediction: str = option("eps", "of the whole UNet: the noise, or v = α ε − σ x",
                             choices=("eps", "v"))
    g_range: tuple[float, float] = option((2.0, 9.0), "g is uniform in LOW HIGH; 8 8 fixes it",
                                          metavar=("LOW", "HIGH"), low=0, below=100)
    uncond: str = option("", "a negative prompt to bake into the guide in place of ∅")
    init: str = option("", "begin with this guide and skip stage one")
    further: bool = option(False, "with --init: train stage one on, with a schedule and updates of "
                                  "its own")

    updates: int = option(0, "updates of stage one; 0: what suits this base, guide and device",
                          group="training", low=0)
    halving_updates: int = option(0, "updates of each halving stage; 0: what suits", low=0)
    max_updates: int = option(0, "a trial: no stage is longer than this; 0: no such limit", low=0)
    start_steps: int = option(64, "the first halving's teacher takes this many steps", low=1,
                              high=1000)
    end_steps: int = option(8, "halve down to this many steps; start_steps: stage one only", low=1,
                            high=1000)
    stochastic: bool = option(False, "halvings also train on the odd points of the teacher's grid, "
                                     "which --sampler stochastic visits")
    batch: int = option(0, "images an update, those of all processes together; 0: what "
                           "suits", low=0, high=65536)
    trajectories: float = option(0.0, "share of a batch taken not from noised images but from the "
                                      "teacher's own sampling; 1 where there are only prompts",
                                 low=0, high=1)
    optimizer: str = option("", "default: what suits", choices=("adamw", "muon"))
    lr: float = option(0.0, "learning rate of stage one; 0: what suits", low=0, below=1)
    halving_lr: float = option(0.0, "learning rate of the halving stages; 0: what suits",
                               low=0, below=1)
    loss: str = option("", "weight of the ε error. eps: none, as in the paper; snr: truncated SNR "
                           "on x̂; root-snr: its root. Default: eps; with --prediction v, snr",
                       choices=("eps", "root-snr", "snr"))
    grad_clip: float = option(1.0, "gradients are clipped to this norm", above=0)
    seed: int = option(0, "seed of everything", low=0, high=2**31 - 1)

    resume: bool = option(False, "go on where the run in this folder stopped", group="files")
    out: str = option("", "finished guides go to OUT/BASE; default: guides, and with --max-updates "
                          "the folder of --run itself")
    run: str = option("", "folder of checkpoints, log and images; default: runs/BASE/GUIDE")
    save_every: int = option(500, "updates between checkpoints", low=1)
    keep: int = option(2, "how many checkpoints to keep", low=1)
    grid_every: int = option(-1, "updates between images of CFG beside the guide; 0: none; -1: "
                                 "1000, none for Stable Diffusion 1.5 on a CPU", low=-1)

    device: str = option("", "cuda or cpu; default: cuda where there is one", group="machine")
    dtype: str = option("auto", "of the base, and of the guide's arithmetic; auto: bf16 on a GPU "
                                "that has it, else fp32", choices=("auto", "fp32", "bf16"))
    accumulate: int = option(1, "split each batch into so many parts, one by one, to save memory",
                             low=1)
    checkpointing: bool = option(False, "recompute the decoder's blocks in the backward pass, to "
                                        "save memory; with --guide whole, all of the student's")
    compile: bool = option(False, "torch.compile the base; needs a C++ compiler on a CPU")


class Defaults(NamedTuple):
    """What suits a base, a guide and a device where a setting was left open."""

    optimizer: str
    lr: float
    updates: int
    halving_lr: float
    halving_updates: int
    batch: int = 32
    images: int = 6000          # of the miniature


# A halving changes a guide that is good already, so its rate is a fraction of stage one's.
DEFAULTS = {
    # For every form of tiny guide: batch and rate did best of those tried for the gated and the
    # seeing form. The bundled ones had other settings (RESULTS.md, "How the guides were trained").
    ("mini", "tiny", "cpu"): Defaults("muon", 1e-2, 3000, 2e-3, 240, 32, 12_000),
    ("mini", "full", "cpu"): Defaults("muon", 6e-3, 9000, 1.5e-3, 500),
    # On a GPU an update of 1,024 images takes hardly longer than one of 32. All stages should end
    # in 2 minutes of an H100 for "tiny" and 5 for "full". Only stage one of "full" was tried there.
    ("mini", "tiny", "cuda"): Defaults("muon", 3e-2, 1500, 5e-3, 150, 1024, 40_000),
    ("mini", "full", "cuda"): Defaults("muon", 6e-3, 4000, 1.5e-3, 300, 1024, 40_000),
    # As many updates as the full guide. Only the miniature's rate in stage one was tried, on a CPU.
    ("mini", "whole", "cpu"): Defaults("adamw", 1e-3, 9000, 3e-4, 500),
    ("mini", "whole", "cuda"): Defaults("adamw", 1e-3, 4000, 3e-4, 300, 1024, 40_000),
    # Starting points that nobody has tried: ControlNet's usual rate for the full guide, and ten
    # times that for the tiny one, whose layers are few and start from nothing.
    ("sd", "tiny", "cpu"): Defaults("adamw", 1e-3, 20_000, 3e-4, 5_000),
    ("sd", "full", "cpu"): Defaults("adamw", 1e-4, 20_000, 3e-5, 5_000),
    ("sd", "tiny", "cuda"): Defaults("adamw", 1e-3, 20_000, 3e-4, 5_000),
    ("sd", "full", "cuda"): Defaults("adamw", 1e-4, 20_000, 3e-5, 5_000),
    # A usual rate of fine-tuning. Meng et al. train 3,000 updates of batch 512, then 2,000 a
    # halving, and 20,000 each at 4, 2 and 1 steps.
    ("sd", "whole", "cpu"): Defaults("adamw", 1e-5, 20_000, 1e-5, 5_000),
    ("sd", "whole", "cuda"): Defaults("adamw", 1e-5, 20_000, 1e-5, 5_000),
}
WEIGHTS = {"eps": None, "root-snr": ppdd.root_snr, "snr": meng.truncated_snr}
OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon}
# Settings that a resumed run may change: they change no draw, or are checked by what they hold.
MAY_CHANGE = {"resume", "save_every", "keep", "grid_every", "device", "dtype", "compile",
              "accumulate", "checkpointing", "max_updates", "updates", "halving_updates", "lr",
              "halving_lr", "out", "run", "init", "further", "cache", "images", "weights", "lora",
              "data", "vae"}


def check(config: Config) -> None:
    """Raises BadInput for settings that don't go together, before anything is loaded."""
    low, high = config.g_range
    halvings = config.start_steps / config.end_steps
    require(
        (low > high or high == 0, f"--g-range {low:g} {high:g}: give LOW <= HIGH, and not both 0"),
        (config.size % 64, f"--size {config.size}: a multiple of 64 pixels"),
        (not halvings.is_integer() or int(halvings).bit_count() != 1,
         "--start-steps must be --end-steps times a power of two: 64 and 8, for example"),
        (config.further and not config.init, "--further is for a guide given with --init"),
        (config.init and not config.further and config.start_steps == config.end_steps,
         "--init skips stage one, and --start-steps is --end-steps: nothing is left to train"),
        (config.cache and not config.data, "--cache is for images of --data: give some"),
        (config.prediction == "v" and config.guide != "whole",
         "--prediction v is for --guide whole: the base of other guides predicts ε"),
        (config.form != "sum" and config.guide != "tiny", "--form is of the tiny guide: leave it "
         f"out with --guide {config.guide}"),
        (config.stochastic and config.start_steps == config.end_steps, "--stochastic is for the "
         "halvings: --start-steps must be above --end-steps"),
        (config.uncond != config.uncond.encode(errors="ignore").decode(),
         "--uncond holds bytes that are not text"))


def guide_name(config: Config) -> str:
    """Stem of a guide's files: its kind, and its form where that is not the paper's."""
    v = "-v" * (config.prediction == "v")
    return config.guide + (f"-{config.form}" if config.form != "sum" else "") + v


def resolve_defaults(config: Config, base: Base) -> Config:
    """The configuration with every 0, "", -1 and ~ replaced by what it stands for."""
    device = "cuda" if base.device.type == "cuda" else "cpu"
    size = "mini" if base.is_miniature else "sd"
    suits = DEFAULTS[size, config.guide, device]
    limit = config.max_updates or math.inf
    batch = config.batch or suits.batch
    low, high = config.g_range
    name = guide_name(config) + (f"-g{low:g}" if low == high else "")
    paths = {k: getattr(config, k) for k in ("init", "cache")}
    paths["run"] = config.run or f"runs/{base.name}/{name}"
    # A trial's guides are used only where they are named, so they don't go where guides are found.
    paths["out"] = config.out or ("" if config.max_updates else "guides")
    grids = 1000 if base.is_miniature or device == "cuda" else 0    # on a CPU one takes minutes
    require((config.accumulate * world_size() > batch,
             f"--accumulate {config.accumulate}: at most --batch {batch} over the number of "
             "processes"))
    return replace(
        config, optimizer=config.optimizer or suits.optimizer, lr=config.lr or suits.lr,
        halving_lr=config.halving_lr or suits.halving_lr, batch=batch,
        loss=config.loss or ("snr" if config.prediction == "v" else "eps"),
        updates=int(min(config.updates or suits.updates, limit)),
        halving_updates=int(min(config.halving_updates or suits.halving_updates, limit)),
        images=config.images or min(suits.images, 40 * batch if config.max_updates else 10**6),
        grid_every=grids if config.grid_every < 0 else config.grid_every,
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


# ------------------------------------------------------------------------------- a run

METRICS = ("loss", "error", "correction", "row", "stop")   # of each sample, shared by processes


class Trainer:
    """A guide in training: what it needs, and where it stands.

    command(resume=…) is what a shell starts the run with again.
    """

    def __init__(self, config: Config, base: Base, data: Postcards | CaptionedImages,
                 folder: RunFolder, command: Callable[..., str]):
        self.config, self.base, self.data = config, base, data
        self.folder, self.command = folder, command
        self.device = base.device
        self.captures = self.device.type == "cuda" and world_size() == 1
        # A student's losses are the guides', with another student in them.
        self.paper = meng if config.guide == "whole" else ppdd
        self.guide_config = (meng.StudentConfig(prediction=config.prediction)
                             if self.paper is meng else
                             GuideConfig(kind=config.guide, form=config.form))
        torch.manual_seed(config.seed)
        self.guide = self.new_guide()
        self.guide.start_from(base.unet)        # in float32, before the base is rounded
        base.unet.to(resolve_dtype(config.dtype, self.device))
        # Of the halvings: the guide of the stage before.
        self.teacher = self.new_guide().to(base.unet.dtype).requires_grad_(False)
        self.empty = base.embed([config.uncond]).to(base.unet.dtype)
        self.base_hash = base.sha256
        self.stages, self.stage, self.update = stages(config), 0, 0
        self.init_info: dict = {}               # what the guide of --init says of itself
        self.signalled, self.stopping = 0, False    # a signal here; one to any process
        self.pace = Pace(warm_up=3 if self.captures else 1)
        self.batches: Batches | None = None
        self.begin_stage()

    @property
    def current_stage(self) -> Stage:
        """The stage at hand; an empty one once all are done."""
        return self.stages[self.stage] if self.stage < len(self.stages) else Stage(0, 0, 0.0)

    def new_guide(self) -> nn.Module:
        guide = build_guide(self.base.unet.config, self.guide_config)
        return to_channels_last(guide.to(self.device))

    def begin_stage(self) -> None:
        stage = self.current_stage
        if self.batches:
            self.batches.images = None          # ends the processes that load images
        self.batches = Batches(self.config, self.base, self.data, self.stage, stage.steps,
                               stage.updates, self.updates_before(self.stage))
        self.history = History()
        self.unread: list[Tensor] = []                          # metrics still on the device
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
                self.leave_if_asked()
                self.train_stage()
                self.save_guide()
                self.teacher.load_state_dict(self.guide.state_dict())
                ended, updates = self.current_stage, self.update
                self.stage, self.update = self.stage + 1, 0
                self.begin_stage()
                self.save()
                if self.config.grid_every:              # last, as it may take minutes
                    self.draw_grid(ended, updates)
            self.finish()
        except (OSError, SafetensorError) as error:
            raise BadInput(f"reading or writing failed ({error}): make room, or give back the "
                           "permission, and --resume goes on from the last checkpoint") from error
        finally:
            self.batches.images = None          # ends the processes that load images
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def train_stage(self) -> None:
        """Update after update; between them the log, images and checkpoints."""
        config, stage, shown = self.config, self.current_stage, 0.0
        with tqdm(total=stage.updates, initial=self.update, desc=stage.title,
                  disable=rank() > 0) as bar:
            while self.update < stage.updates:
                self.train_step()
                bar.update()
                last = self.update == stage.updates
                log_now = self.update % 50 == 0 or last
                grid_now = config.grid_every and self.update % config.grid_every == 0 and not last
                save_now = self.update % config.save_every == 0 or grid_now
                show_now = log_now or time.monotonic() > shown + 1
                if show_now or save_now or self.signalled or not self.captures:
                    self.read_metrics()                     # waits for the GPU
                    self.say_how_long()
                if show_now:
                    shown = time.monotonic()
                    means = self.history.means(self.update % 50 or 50)
                    bar.set_postfix(loss=f"{means[0]:.4g}", unexplained=f"{means[1]:.1%}",
                                    skipped=len(self.data.skipped))
                if log_now:
                    self.require_correction()
                    self.log(*means)
                if save_now or self.stopping:
                    self.save()
                if self.stopping:
                    raise KeyboardInterrupt
                if grid_now:
                    self.draw_grid(stage, self.update)
                    self.leave_if_asked()

    def train_step(self) -> None:
        """One update: draw a batch, the loss and its gradient, the optimiser's step."""
        generator = self.batches.generator(self.update)
        batch = self.batches.draw(generator)
        with math_attention(self.device):
            parts = self.batches.gather(batch, self.update)
            self.set_lr()
            if self.captures:
                metrics, target, norm = self.captured_update(parts)     # `update_guide`, replayed
            else:
                metrics, target, norm = self.backward(parts)
                self.check_update(metrics, norm, batch)
                self.optimizer.step()
        self.batches.rollouts.advance(self.current_stage.steps or self.config.start_steps, target,
                                      scatter=None if self.update else generator)
        self.unread.append(torch.cat([metrics.sum(0), norm.view(1)]))
        self.update += 1

    def backward(self, parts: list[Part]) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the whole batch's loss, clipped. Returns metrics (B, len(METRICS)), the
        rollouts' targets, and the gradient's norm before clipping."""
        metrics = torch.zeros(self.config.batch, len(METRICS), dtype=torch.float64,
                              device=self.device)
        target = torch.zeros_like(self.batches.rollouts.state["z"])
        self.optimizer.zero_grad(set_to_none=True)
        for part in parts:
            x = self.base.vae.sample(part.moments, part.noise[0])             # (m, Z, H, W)
            z = ppdd.add_noise(x, part.noise[1], part.t[:len(x)])
            z = torch.cat([z, part.rollouts])                                 # (b, Z, H, W)
            result = self.distill(z, part.t, part.c, part.g, part.beside)
            (result.loss * (len(part.slots) / self.config.batch)).backward()
            target[part.places] = result.target[len(x):]
            columns = (result.loss.detach() / self.config.batch, result.error, result.correction,
                       part.rows, torch.full_like(part.rows, self.signalled))
            for k, column in enumerate(columns):
                metrics[part.slots, k] = column.to(metrics)
        gradients = [p.grad for p in self.guide.parameters() if p.grad is not None]
        all_reduce(metrics, target, *gradients)
        norm = nn.utils.clip_grad_norm_(self.guide.parameters(), self.config.grad_clip)
        return metrics, target, norm

    def distill(self, z: Tensor, t: Tensor, c: Tensor, g: Tensor, beside: Tensor | None = None
                ) -> Distilled:
        """The loss of a batch: Algorithm 1, or a halving on the grid of the teacher's steps."""
        stage, weight = self.current_stage, WEIGHTS[self.config.loss]
        unet, guide, teacher = self.base.unet, self.run_guide, self.teacher
        if self.base.inpaints:
            unet, guide, teacher = (meng.BesideMask(x, beside) for x in (unet, guide, teacher))
        if not stage.steps:
            empty = self.empty.expand(len(z), -1, -1)
            return self.paper.cfg_distillation(unet, guide, z, t, c, empty, g, weight)
        following = next_timestep(2 * stage.steps, self.device)
        t_mid = following[t]
        t_end = following[t_mid].where(t_mid >= 0, t_mid)   # the last of --stochastic: one step
        return self.paper.halving(unet, guide, teacher, z, t, t_mid, t_end, c, g, weight)

    def update_guide(self, parts: list[Part]) -> tuple[Tensor, Tensor, Tensor]:
        result = self.backward(parts)
        self.optimizer.step()
        return result

    def set_lr(self) -> None:
        stage = self.current_stage
        lr = stage.lr * lr_schedule(self.update, stage.updates)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def run_guide(self, *args: Tensor) -> list[Tensor] | Tensor:
        """The guide, in the dtype of the base. Its own weights stay in float32: an update moves
        them by less than bf16 can tell."""
        dtype = self.base.unet.dtype
        if dtype == torch.float32:
            return self.guide(*args)
        weights = {k: p.to(dtype) for k, p in self.guide.named_parameters()}
        return torch.func.functional_call(self.guide, weights, args)

    # -- what goes wrong
    #
    # An update that would spoil the guide is seen in one of two ways. Eager, before the optimiser's
    # step: the guide before it is kept, and the sample is named. Recorded as a CUDA graph, the step
    # is part of the replay, and looking at each would have the host wait for the GPU: the metrics
    # are read at least every 50 updates, and always before a checkpoint is written.

    def read_metrics(self) -> None:
        """Brings the metrics of the last updates to the host, and looks at them."""
        for loss, error, correction, _, stop, norm in torch.stack(self.unread).tolist():
            if self.captures and self.history.is_bad(loss, norm):
                raise BadInput(
                    f"the loss is {loss:.4g} and the gradient's norm {norm:.4g} at update "
                    f"{self.update} ({self.current_stage.title}) or shortly before: "
                    f"{self.go_on()} with {self.lower_lr()}")
            self.history.add(loss, error, correction, norm)
            self.stopping = bool(self.signalled if self.captures else stop)
        self.unread = []

    def check_update(self, metrics: Tensor, norm: Tensor, batch: Batch) -> None:
        """Stops before an update that would spoil the guide, and keeps the state before it."""
        loss, norm, usual = metrics[:, 0].sum().item(), norm.item(), self.history.usual_norm()
        if not self.history.is_bad(loss, norm):
            return
        self.save(keep=0)
        error = metrics[:, METRICS.index("error")]
        broken = (~error.isfinite()).nonzero().flatten()
        worst = broken if len(broken) else error.argsort(descending=True)[:1]
        samples = "; ".join(self.describe_sample(i, batch, metrics) for i in worst[:3].tolist())
        before = f" (before, {usual:.4g})" if math.isfinite(usual) else ""
        has_older = len(self.folder.checkpoints()) > 1
        older = "delete that file and go on from the one before" if has_older else "go on"
        fp32 = "" if self.base.unet.dtype == torch.float32 else "try --dtype fp32, or "
        raise BadInput(
            f"the loss is {loss:.4g} and the gradient's norm {norm:.4g}{before} at update "
            f"{self.update + 1} ({self.current_stage.title}), where {samples}. The state before it "
            f"is kept in {self.folder.checkpoint_path(self.stage, self.update)}: {fp32}{older} "
            f"with {self.lower_lr()}")

    def describe_sample(self, i: int, batch: Batch, metrics: Tensor) -> str:
        row = int(metrics[i, METRICS.index("row")])
        return f"t {batch.t[i]}, g {batch.g[i]:.3g}, {self.data.captions([row])[0]!r}"

    def go_on(self) -> str:
        return "go on from the last checkpoint" if self.folder.checkpoints() else "begin again"

    def lower_lr(self) -> str:
        stage = self.current_stage
        flag = f"--{'halving-' * bool(stage.steps)}lr"
        command = self.command(resume=bool(self.folder.checkpoints()))
        return f"a lower {flag} (now {stage.lr:g}): {command} {flag} {stage.lr / 2:g}"

    def require_correction(self) -> None:
        """Raises BadInput where, in stage one, guidance has changed nothing yet."""
        require((not self.current_stage.steps and not self.history.corrected,
                 "guidance changes nothing here, so there is nothing to learn: all captions seen "
                 f"are empty{' or --uncond itself' * bool(self.config.uncond)}; give captions "
                 "with --data"))

    def handle_signal(self, number: int, frame: object) -> None:
        """Ctrl-C or SIGTERM: the update at hand is ended first; a second one does not wait."""
        self.signalled = number
        signal.signal(number, signal.default_int_handler)

    def leave_if_asked(self) -> None:
        """Ends the run where a signal came after the last checkpoint was written. Several processes
        learn of it from each other in their next update."""
        if self.signalled and world_size() == 1:
            raise KeyboardInterrupt

    # -- log, images, files

    def updates_before(self, stage: int) -> int:
        """Updates of this stage that the guide had already when --further began."""
        return 0 if stage else self.init_info.get("updates", 0)

    def say_how_long(self) -> None:
        """Says once, after the first updates, how long the whole run will take."""
        left = self.current_stage.updates - self.update
        later = sum(stage.updates for stage in self.stages[self.stage + 1:])
        # A halving's update takes about 1.5 times as long: its teacher takes two steps.
        left += later if self.stage else 1.5 * later
        if (seconds := self.pace.measure(self.update)) and rank() == 0:
            tqdm.write(f"about {duration(seconds * left)} to go, {seconds:.2g} s an update")

    @rank_zero_only
    def log(self, loss: float, unexplained: float, norm: float) -> None:
        self.folder.log({"stage": self.stage, "steps": self.current_stage.steps,
                         "update": self.update, "loss": loss, "unexplained": unexplained,
                         "norm": norm, "lr": float(self.optimizer.param_groups[0]["lr"]),
                         "time": round(time.time(), 1)})

    @rank_zero_only
    def draw_grid(self, stage: Stage, update: int) -> None:
        """Writes CFG above, the guide below, from the same noise, at that stage's number of steps.

        A signal ends it: the images are left out then.
        """
        slow = self.device.type == "cpu" and not self.base.is_miniature
        steps = stage.steps or (8 if slow else 25)
        try:
            rows = self.sample_grid(self.data.example_prompts(4), steps)
        except KeyboardInterrupt:
            return
        grid = torch.cat(rows, dim=1).permute(1, 2, 0)                        # (2 · 8H, 4 · 8W, 3)
        name = f"{guide_name(self.config)}{stage.suffix}-{update:06d}.png"
        with atomic_write(self.folder.path / name) as temporary:
            Image.fromarray(grid.numpy()).save(temporary, format="png")

    def sample_grid(self, prompts: list[str], steps: int) -> list[Tensor]:
        """Images (3, 8H, 4 · 8W) of CFG and of the guide; KeyboardInterrupt once a signal came."""
        z = ppdd.noise(range(len(prompts)), self.batches.shape).to(self.device)
        c, g = self.base.embed(prompts).to(self.base.unet.dtype), min(8.0, self.config.g_range[1])
        guide = copy.deepcopy(self.guide).to(self.base.unet.dtype)
        ways = {"empty": self.empty.expand(len(prompts), -1, -1)}, {"guide": guide}
        if self.base.inpaints:                  # everything is masked
            grey = z.new_zeros(len(z), 3, *(8 * side for side in z.shape[2:]))
            sampler = functools.partial(meng.inpaint_by_channels, mask=torch.ones_like(z[:, :1]),
                                        masked=self.base.encode(grey, 0))
            ways = tuple(way | {"sampler": sampler} for way in ways)
        # fast.sample records its own steps; a student is not compiled.
        sample = ppdd.sample if self.config.compile else fast.sample
        samples = sample, fast.sample if self.paper is meng else sample
        rows = []
        with tqdm(total=2 * (steps + len(prompts)), desc="drawing", leave=False) as bar:
            def progress() -> None:
                if self.signalled:
                    raise KeyboardInterrupt
                bar.update()

            for sample, way in zip(samples, ways):
                latents = sample(self.base.unet, z, c, g, steps, progress=progress, **way)
                images = []
                for latent in latents.split(1):
                    progress()
                    images.append(self.base.decode(latent)[0].cpu())
                rows.append(torch.cat(images, dim=2))
        return rows

    def guide_path(self, stage: Stage) -> Path:
        low, high = self.config.g_range
        name = guide_name(self.config) + stage.suffix + (f"-g{low:g}" if low == high else "")
        out = self.config.out
        folder = Path(out) / self.base.name if out else self.folder.path
        return folder / f"{name}.safetensors"

    @rank_zero_only
    def save_guide(self) -> None:
        stage, path = self.current_stage, self.guide_path(self.current_stage)
        about = {"base": self.base.name, "base_hash": self.base_hash,
                 "stage": self.stage, "steps": stage.steps, "g_range": list(self.config.g_range),
                 "uncond": self.config.uncond,
                 "updates": self.updates_before(self.stage) + self.update,
                 "seed": self.config.seed, "settings": asdict(self.config), "init": self.init_info}
        aside = set_aside(path, about)
        save_guide(path, self.guide, self.guide_config, about)
        sync(path)
        tqdm.write(f"saved {path}{f'; the one before it is {aside.name}' if aside else ''}")

    @rank_zero_only
    def finish(self) -> None:
        """Tidies up, and says what was left out, where things are, and how to use a trial."""
        self.folder.remove_checkpoints()
        if skipped := self.data.skipped_summary():
            tqdm.write(f"images{skipped}")
        grids = f"; images of CFG above the guide: {self.folder.path / '*.png'}"
        tqdm.write(f"log: {self.folder.log_file}{grids * bool(self.config.grid_every)}")
        if limit := self.config.max_updates:
            tqdm.write(f"this was a trial of at most {limit} updates a stage; to sample with it: "
                       f"{self.sample_command()}")

    def sample_command(self) -> str:
        """The command that samples with the guide of the last stage, on the same base."""
        config, stage = self.config, self.stages[-1]
        words = ["--guide", str(self.guide_path(stage)), "--steps", str(stage.steps or 50),
                 "--g", f"{min(8.0, config.g_range[1]):g}"]
        for flag, values in (("--weights", config.weights), ("--vae", config.vae)):
            words += [flag, values] if values else []
        words += ["--lora", *config.lora] if config.lora else []
        if self.base.inpaints:
            words += ["--image", "FILE", "--mask", "FILE", "--prompt", "TEXT"]
        return shlex.join(["python", "sample.py", *words])

    @rank_zero_only
    def save(self, keep: int | None = None) -> None:
        """The whole state as a checkpoint; keep: how many stay, 0 all, default --keep."""
        tensors = {f"rollout.{k}": v for k, v in self.batches.rollouts.state.items()}
        for prefix, guide in (("guide.", self.guide), ("teacher.", self.teacher)):
            tensors |= {prefix + k: v for k, v in guide.state_dict().items()}
        self.folder.save(tensors | optimizer_tensors(self.optimizer), self.state(),
                         self.config.keep if keep is None else keep)

    def state(self) -> dict:
        """What a checkpoint says of the run, beside its tensors."""
        return {"stage": self.stage, "update": self.update, "recent": self.history.recent,
                "corrected": self.history.corrected, "base_hash": self.base_hash,
                "config": asdict(self.config), "data": self.data.identity, "init": self.init_info}

    def load(self) -> None:
        """Goes on from the last checkpoint that is whole."""
        tensors, state = self.folder.load()
        state["config"] = asdict(Config()) | state["config"]    # an older run lacks newer settings
        refuse_other_run(self.folder.path, state, self.state(), MAY_CHANGE)
        self.stage, self.update, self.init_info = state["stage"], state["update"], state["init"]
        self.begin_stage()
        self.history.recent = [tuple(metrics) for metrics in state["recent"]]
        self.history.corrected = state["corrected"]
        for prefix, guide in (("guide.", self.guide), ("teacher.", self.teacher)):
            guide.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items()
                                   if k.startswith(prefix)})
        load_optimizer(self.optimizer, tensors)
        self.batches.rollouts.load({k.removeprefix("rollout."): v for k, v in tensors.items()
                                    if k.startswith("rollout.")})
        if rank() == 0:
            self.folder.trim_log(self.stage, self.update)
        barrier()

    def start_from(self, path: Path) -> None:
        """Takes the guide of --init: one of stage one to train it on, or any to halve it."""
        file = read_guide(path)
        steps = file.about.get("steps") or self.config.start_steps
        require(
            (file.config != self.guide_config,
             f"--init {path} is a guide of other settings ({file.config}): give the --guide, "
             "--form and --prediction that it was trained with"),
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
        self.begin_stage()


class Recomputed(Block):
    """A student's block, computed again on the way back in place of keeping what is inside.

    Its weights are handed over for that: `run_guide` lends it copies in another dtype, and takes
    them back before.
    """

    def forward(self, *args: Tensor, again: bool = False) -> Tensor:
        if again:
            return super().forward(*args)
        weights = dict(self.named_parameters())
        return checkpoint(torch.func.functional_call, self, weights, args, {"again": True},
                          use_reentrant=False, preserve_rng_state=False)    # nothing is random


# ------------------------------------------------------------------------------- the command


def prepare(config: Config, argv: list[str] | None = None) -> Trainer:
    """Loads the base and the data, and stands where the run stopped, or at its beginning.

    argv is what was given on the command line, which messages repeat.
    """
    check(config)
    path = find_weights(config.weights)
    base = load_base(path, device=find_device(config.device), vae=config.vae, inpainting=True)
    merged = merge_loras(base, config.lora)
    config = resolve_defaults(config, base)
    print_once(describe_base(path, config.weights, config.vae), *merged)
    folder = RunFolder(config.run)
    unfinished = bool(folder.checkpoints())
    require(
        (config.resume and not unfinished,
         f"{config.run} holds no unfinished run: leave out --resume"),
        (unfinished and not config.resume,
         f"{config.run} holds an unfinished run: go on with {command(argv, resume=True)}, or give "
         "another --run"))
    for path in (config.run, config.out, config.cache):
        if path:
            check_writable(Path(path))
    if rank() == 0:
        folder.lock()
    try:
        return begin(config, base, folder, functools.partial(command, argv))
    except BaseException:
        folder.unlock()
        raise


def begin(config: Config, base: Base, folder: RunFolder,
          command: Callable[..., str]) -> Trainer:
    """The run itself, once its folder is this process's own."""
    give_images = (f"{base.name} is an inpainting model, and masks images anew in every update: "
                   "give images with --data, and neither --cache nor --trajectories")
    unfit = config.cache or config.trajectories or not config.data
    require((base.inpaints and unfit, give_images))                 # before hours of encoding
    data = load_data(config, base)
    require((base.inpaints and not data.image_count, give_images))
    if not data.image_count:
        config = replace(config, trajectories=1.0)
        print_once(f"{len(data)} prompts without images: training on what the base itself paints")
    require((config.stochastic and config.trajectories == 1, "--stochastic is for noised images: "
             "the teacher's own samples never stand at odd points of its grid"))
    if config.checkpointing:
        for block in base.unet.output_blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                              preserve_rng_state=False)     # nothing is random
    if config.compile:
        base.unet.encode = torch.compile(base.unet.encode)
        base.unet.decode = torch.compile(base.unet.decode)
    trainer = Trainer(config, base, data, folder, command)
    if config.checkpointing and trainer.paper is meng:
        for block in trainer.guide.modules():
            block.__class__ = Recomputed if type(block) is Block else block.__class__
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

    def run() -> None:
        nonlocal trainer
        with init_distributed(find_device(config.device), timedelta(seconds=60),
                              "; --resume goes on from the last checkpoint") as device:
            trainer = prepare(replace(config, device=device), argv)
            trainer.train()

    try:
        run_command(
            f"train.py, process {rank()}" if world_size() > 1 else "train.py", run,
            "lower --batch or --size, raise --accumulate, or add --checkpointing, --cache or "
            "--dtype bf16", lambda: how_to_go_on(trainer, argv) if rank() == 0 else "")
    finally:
        if trainer:
            trainer.folder.unlock()


def command(argv: list[str] | None, resume: bool) -> str:
    """The command that starts this run again, as for a shell."""
    given = sys.argv[1:] if argv is None else argv
    return command_line("train.py", [w for w in given if w != "--resume"] + ["--resume"] * resume)


def how_to_go_on(trainer: Trainer | None, argv: list[str] | None) -> str:
    """What to say on Ctrl-C: where the run stands, and the command that goes on."""
    checkpoints = trainer.folder.checkpoints() if trainer else []
    given = sys.argv[1:] if argv is None else argv
    saved = f", saved in {checkpoints[-1]}" if checkpoints else ""
    return f"stopped{saved}; go on with: {command(argv, bool(checkpoints) or '--resume' in given)}"


if __name__ == "__main__":
    startup.imported()
    main()
