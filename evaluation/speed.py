"""The benchmark, `eval.py speed`: what passes, steps, images and training updates take.

Weights are random, as they don't change what anything takes. Guides are measured beside CFG and,
with --baseline, beside diffusers with the same weights. Every row is printed and saved as soon as
it is measured.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from clip_text import Tokenizer
from evaluation import speed_report, timing
from evaluation.baseline import build_baseline
from evaluation.cost import build_networks
from evaluation.report import result_file, write_result
from evaluation.workload import METHODS, PASSES, G, Models, Work
from support import fast
from support.base import Base, to_channels_last
from support.cli import option, require
from support.distributed import world_size
from support.files import write_json, write_text
from support.machine import DTYPES, resolve_dtype, use_few_threads

AGREEMENT = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}      # see disagreements
CFG_IMAGE = "CFG image, 2 steps"
COMPILING = 60                                              # seconds, of ours and the baseline's
UPDATE_BATCH = 8                                            # on a GPU
GROWTH_SIDES = {"sd15": (32, 96), "mini": (16, 24)}         # on a GPU, beside --side


@dataclass(frozen=True)
class SpeedConfig:
    """Settings of `eval.py speed`; its command line is generated from them."""

    command: str = option("speed", "what to measure")
    size: str = option("sd15", "which networks: Stable Diffusion 1.5's or the miniature's",
                       choices=("sd15", "mini"))
    side: tuple[int, ...] = option((), "sides of the latents, an eighth of the images'; default: "
                                       "64; on a CPU 32 64, with --quick 16; mini: 8",
                                   low=8, high=512, type=int)
    batch: tuple[int, ...] = option((), "images at a time, in this order; default: 1 16 4; on a "
                                        "CPU or with --quick 1", low=1, high=4096, type=int)
    steps: tuple[int, ...] = option((), "numbers of steps of whole images, all but the first only "
                                        "at the first batch; default: 8 50, with --quick 8; on a "
                                        "CPU 8, with --quick 2", low=1, high=1000, type=int)
    rounds: int = option(0, "how often everything is measured; 0: 5, with --quick 3; on a CPU 3, "
                            "with --quick 1", low=0, high=10**6)
    minutes: float = option(0.0, "what has not begun by then is left out; 0: 4.5, with --quick "
                                 "0.75, to end within 5 and 1; on a CPU no limit",
                            low=0, high=10_000)
    device: str = option("", "cuda or cpu; default: cuda where there is one")
    dtype: str = option("auto", "dtype of all networks; auto: bf16 on CUDA, fp16 if it is old, "
                                "else fp32", choices=("auto", *DTYPES))
    compile: bool = option(False, "also passes and steps compiled, ours and the baseline's; takes "
                                  "minutes")
    baseline: bool = option(False, "diffusers beside it, with the same weights")
    quick: bool = option(False, "small and once, in a result file of its own")
    out: str = option("", "the file; default: speed-SIZE-DEVICE.json in runs/eval")
    update_results: bool = option(False, "write to results/, over the project's own")


def resolve_defaults(config):
    """The configuration with what suits the machine in place of what was not given."""
    gpu, quick = timing.is_gpu(config.device), config.quick
    sides = (8,) if config.size == "mini" else (64,) if gpu else (16,) if quick else (32, 64)
    steps = ((8,) if quick else (8, 50)) if gpu else (2,) if quick else (8,)
    rounds = (3 if quick else 5) if gpu else 1 if quick else 3
    config = replace(
        config, side=config.side or sides,
        batch=config.batch or ((1,) if quick or not gpu else (1, 16, 4)),
        steps=config.steps or steps, rounds=config.rounds or rounds,
        minutes=config.minutes or ((0.75 if quick else 4.5) if gpu else 0))
    require((any(side % 8 for side in config.side), "--side: multiples of 8"),
            (config.device == "mps", "--device mps: speed is measured on cpu or cuda"),
            (world_size() > 1, "speed runs in one process: leave out torchrun"))
    return config


def speed(config) -> None:
    """`speed`: what a step, an image and an update take, beside CFG and the baseline."""
    start = time.monotonic()
    config = resolve_defaults(config)
    deadline = start + 60 * (config.minutes or math.inf)
    if config.size == "mini" or timing.is_gpu(config.device):
        use_few_threads()                                   # as `load_base` does
    report = Report(config)
    models = build_models(config)
    if models.pipe:
        differences = disagreements(config, models)
        report.result["differences from diffusers"] = differences
        if why := too_different(differences, resolve_dtype(config.dtype, config.device)):
            report.leave_out(why)
            models = models._replace(pipe=None)
    if config.device == "cpu" and config.size != "mini":
        for side in config.side[1:]:
            report.leave_out(
                f"whole images and updates at {side} × {side}: minutes each on a CPU; they are "
                "measured at the side that --side names first")
    for group in plan(config, models):
        if time.monotonic() + group.seconds > deadline:
            report.leave_out(f"{group.where}: {config.minutes:g} minutes (--minutes) are over")
        else:
            measure(config, group, report, deadline)
    write_result(report.file, report.result, speed_report.speed_page(report.result))


class Report:
    """The result so far, in its file and on the screen."""

    def __init__(self, config):
        kind = torch.device(config.device).type
        self.file = result_file(config, f"speed-{config.size}-{kind}")
        self.config = config
        n = 8192 if timing.is_gpu(config.device) else 2048 if config.size == "sd15" else 1024
        dtype = resolve_dtype(config.dtype, config.device)
        rate = timing.matrix_rate(config.device, dtype, n, 1 if config.quick else 5)
        self.result = {"size": config.size, "protocol": speed_report.protocol(config, G),
                       "matrix rate, TFLOP/s": rate, "differences from diffusers": {},
                       "rows": [], "ratios": [], "left out": []}
        self.macs: dict[int, dict[str, int]] = {}       # by side

    def add(self, side: int, batch: int, timings: dict[str, dict]) -> None:
        """Saves and prints rows."""
        if side not in self.macs:
            nets = build_networks(self.config.size)._replace(side=side)
            self.macs[side] = (speed_report.macs_per_image(nets, self.config.steps)
                               if side in self.config.side else speed_report.unet_macs(nets))
        rows = [speed_report.make_row(name, side, batch, measured, self.macs[side],
                                      self.result["matrix rate, TFLOP/s"])
                for name, measured in timings.items()]
        self.result["rows"] += rows
        self.result["ratios"] = speed_report.ratios(self.result["rows"])
        self.save()
        for row in rows:
            print(*filter(None, speed_report.row_cells(row)), sep="  ", flush=True)

    def leave_out(self, what: str) -> None:
        self.result["left out"].append(what)
        print(f"left out: {what}", flush=True)

    def save(self) -> None:
        write_json(self.file, self.result)
        write_text(self.file.with_suffix(".md"), speed_report.speed_page(self.result))


# ------------------------------------------------------------------------------- the networks

def build_models(config) -> Models:
    base, guides = random_base(config)
    pipe = build_baseline(base) if config.baseline else None
    plain = share_weights({"unet": base.unet, "vae": base.vae, "text": base.text} | guides)
    fast.prepack(base.unet, base.vae, *guides.values())
    return Models(base, guides, pipe, plain)


def random_base(config) -> tuple[Base, dict[str, nn.Module]]:
    """Networks and guides of random weights, no layer of them zero: the same at every call."""
    *nets, _ = build_networks(config.size)
    generator = torch.Generator(config.device).manual_seed(0)
    dtype = resolve_dtype(config.dtype, config.device)
    for k, module in enumerate(nets):
        module = module.to(dtype).to_empty(device=config.device)
        for name, p in module.named_parameters():
            bound = (3 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1     # of variance 1 / inputs
            p.data.uniform_(-bound, bound, generator=generator)
            if p.ndim == 1 and name.endswith("weight"):
                p.data.add_(1)                                           # of norms
        nets[k] = to_channels_last(module.eval().requires_grad_(False))
    unet, vae, text, *guides = nets
    return (Base(unet, vae, text, Tokenizer(), Path("random")),
            dict(zip(("full", "tiny", "seeing"), guides)))


def share_weights(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of modules that hold the very same tensors."""
    shared = {id(p): p for module in modules.values() for p in module.parameters()}
    return copy.deepcopy(modules, shared)


def disagreements(config, models: Models) -> dict[str, float | None]:
    """By how much the baseline's outputs differ from ours, of the largest value."""
    work = Work(config, models, min(config.side), 1)
    theirs = {name: call() for name, call in work.calls_of_baseline().items()}
    ours = {name: call() for name, call in work.calls_of_ours().items()}
    ours[CFG_IMAGE] = work.sample(fast.predict_step, "CFG", 2, work.c, work.empty)
    theirs[CFG_IMAGE] = work.baseline_image(2, "latent")
    differences = {}
    for name, output in ours.items():
        other = theirs[name].float()
        differences[name] = ((output.float() - other).abs().max() / other.abs().max()).item()
    # JSON has no numbers that are not finite.
    return {name: x if math.isfinite(x) else None for name, x in differences.items()}


def too_different(differences: dict[str, float | None], dtype: torch.dtype) -> str:
    """A sentence where the baseline computes something else: timing it would mean nothing."""
    limit = next(AGREEMENT[name] for name, kind in DTYPES.items() if kind == dtype)
    for name, difference in differences.items():
        # Guidance multiplies the rounding of its two passes: 0.043 in bf16 on an H100, where a
        # single pass is off by less than 0.02.
        allowed = 2 * limit if name == CFG_IMAGE else limit
        if difference is None or difference > allowed:
            off = "not finite" if difference is None else f"off ours by {difference:.2g}"
            return (f"diffusers: {name} is {off}, more than {allowed:g} of the largest value: a "
                    "comparison would mean nothing")
    return ""


# ------------------------------------------------------------------------------- what is measured

class Group(NamedTuple):
    """Calls that are measured together, and so share the machine's slow minutes."""

    title: str
    side: int
    batch: int
    build: Callable[[], dict[str, Callable]]        # the calls by name
    warm_up: int = 1                                # calls of each beforehand, on a CPU
    long: bool = False                              # so two rounds are enough, on a CPU
    seconds: float = 0                              # that must be left to begin with it

    @property
    def where(self) -> str:
        return f"{self.title} at {self.side} × {self.side}, batch {self.batch}"


def plan(config, models: Models) -> Iterator[Group]:
    """All that is measured, what is worth most first: on a GPU time may run out."""
    gpu, first_side = timing.is_gpu(config.device), config.side[0]
    new_work = partial(Work, config, models)
    for side in config.side:
        whole = gpu or config.size == "mini" or side == first_side
        for batch in config.batch[:2]:
            yield from groups(new_work(side, batch), whole)
        if side == first_side:
            batch = UPDATE_BATCH if gpu else config.batch[0]
            yield from update_groups(new_work(side, batch))
            for other in GROWTH_SIDES[config.size] if gpu else ():
                if other not in config.side:
                    work = new_work(other, config.batch[0])
                    yield Group("UNet pass", other, work.batch, work.growth)
        for batch in config.batch[2:]:
            yield from groups(new_work(side, batch), whole)
    for side in config.side if config.compile else ():
        for batch in config.batch:
            yield from compiled_groups(new_work(side, batch))


def groups(work: Work, whole: bool) -> Iterator[Group]:
    """Passes, steps and, where `whole`, images at one side and batch."""
    place = work.side, work.batch
    for name in PASSES:
        yield Group(name, *place, partial(work.passes, name))
    yield Group("steps", *place, work.steps)
    first = work.batch == work.config.batch[0]
    for n in (work.config.steps if first else work.config.steps[:1]) if whole else ():
        yield Group(f"images, {n} steps", *place, partial(work.images, n), 0, long=True)


def update_groups(work: Work) -> Iterator[Group]:
    for name in work.models.guides:
        for stage in ("stage-one", "halving"):
            yield Group(f"{name} {stage} updates", work.side, work.batch,
                        partial(work.updates, name, stage), int(not work.config.quick), long=True)


def compiled_groups(work: Work) -> Iterator[Group]:
    for name in (*PASSES, *(f"{method} step" for method in METHODS)):
        build = work.compiled_pass if name in PASSES else work.compiled_step
        yield Group(f"{name}, compiled", work.side, work.batch, partial(build, name),
                    seconds=COMPILING)


def measure(config, group: Group, report: Report, deadline: float) -> None:
    """Measures a group, and reports it. What fails is left out, and the reason given."""
    gpu = timing.is_gpu(config.device)
    timing.free_memory(config.device)
    rounds = min(config.rounds, 2) if group.long and not gpu else config.rounds
    try:
        timings, failures = timing.benchmark(group.build(), config.device, rounds,
                                             2 if gpu else group.warm_up, deadline)
    except Exception as error:          # one failure must not cost the rest of a long run
        timings, failures = {}, {group.title: error}
    for name, error in failures.items():
        reason = (str(error).strip().splitlines() or [""])[0]
        report.leave_out(f"{group._replace(title=name).where}: {type(error).__name__}: {reason}")
    report.add(group.side, group.batch, timings)
