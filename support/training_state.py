"""The folder of a training run: its lock, its checkpoints and its log; and how its updates went.

A checkpoint is one safetensors file with every tensor that the run goes on from, and the rest as
JSON in its metadata. Older ones go only once a newer one is safely on disk.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from support.checkpoint import CheckpointError
from support.cli import BadInput, flag_of, require
from support.distributed import barrier, print_once, rank
from support.files import atomic_write, save_tensors, sync
from support.guides import read_guide


class RunFolder:
    """What a run keeps on disk, apart from its finished guides."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.held: TextIO | None = None                 # the open lock file, while it is ours

    # -- the lock

    def lock(self) -> None:
        """Makes the folder and holds it until `unlock`, or the end of the process.

        Raises BadInput where another run holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / "lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise BadInput(f"{self.path} is in use by another run: wait for its end, or give "
                           "another --run") from error
        except OSError as error:                        # some network file systems have no locks
            warnings.warn(f"{self.path} can't be locked ({error.strerror}): start one run only",
                          stacklevel=1)
        for temporary in self.path.glob(".*.tmp"):      # left by a run that was killed
            temporary.unlink(missing_ok=True)
        self.held = file

    def unlock(self) -> None:
        if self.held:
            self.held.close()

    # -- checkpoints

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.path.glob("state-*.safetensors"))

    def checkpoint_path(self, stage: int, update: int) -> Path:
        return self.path / f"state-{stage:02d}-{update:08d}.safetensors"

    def save(self, tensors: dict[str, Tensor], state: dict, keep: int) -> None:
        """Writes a checkpoint of state["stage"] and ["update"]; keep: how many stay, 0 all."""
        path = self.checkpoint_path(state["stage"], state["update"])
        save_tensors(path, tensors, {"state": json.dumps(state)})
        sync(path)
        for old in self.checkpoints()[:-keep] if keep else ():
            old.unlink()

    def load(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and state of the last checkpoint that is whole.

        Damaged ones are set aside with a message. Raises BadInput where none is whole.
        """
        for path in reversed(self.checkpoints()):
            try:
                with safe_open(path, framework="pt") as opened:
                    state = json.loads(opened.metadata()["state"])
                    return {name: opened.get_tensor(name) for name in opened.keys()}, state
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                print(f"{path} is damaged ({error}): going back to the one before")
                barrier()                               # until all processes have seen it
                if rank() == 0:
                    path.rename(path.with_suffix(".damaged"))
        raise BadInput(f"no checkpoint in {self.path} is whole, all are damaged: begin anew "
                       "without --resume")

    def remove_checkpoints(self) -> None:
        for path in self.checkpoints():
            path.unlink()

    # -- the log

    @property
    def log_file(self) -> Path:
        return self.path / "log.jsonl"

    def log(self, entry: dict) -> None:
        with self.log_file.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def set_log_aside(self) -> None:
        """Keeps the log of the run before, as log.old.jsonl."""
        with suppress(FileNotFoundError):
            self.log_file.replace(self.path / "log.old.jsonl")

    def trim_log(self, stage: int, update: int) -> None:
        """Drops entries written after the checkpoint that the run goes on from."""
        if not self.log_file.exists():
            return
        # A killed run may have left half a line at the end.
        lines = [line for line in self.log_file.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines
                if (json.loads(line)["stage"], json.loads(line)["update"]) <= (stage, update)]
        with atomic_write(self.log_file) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))


def refuse_other_run(folder: Path, before: dict, now: dict, may_change: set[str]) -> None:
    """Raises BadInput where a checkpoint is of another run than the one asked for.

    before and now are what a checkpoint notes: `config`, `base_hash`, `data` (its identity) and the
    guide's `stage`.
    """
    then, settings = before["config"], json.loads(json.dumps(now["config"]))
    changed = [f"{flag_of(k)} {_as_flag(then.get(k))}" for k in settings
               if k not in may_change and then.get(k) != settings[k]]
    other_data = before["data"] != now["data"]
    limit = then.get("max_updates")
    require(
        (changed, f"{folder} was begun with {', '.join(changed)}: give the same, or another --run"),
        (before["base_hash"] != now["base_hash"],
         f"{folder} was begun on another base: give the same --weights "
         "and --vae, or another --run"),
        (other_data and settings["data"] != then["data"],
         f"{folder} was begun with other --data: give the same, or another --run"),
        (other_data and not settings["data"],
         f"{folder} was begun with other postcards: give --images {then['images']} as then"),
        (before["stage"] and limit and not settings["max_updates"],
         f"{folder} ended stage one after at most {limit} updates: give --max-updates {limit} as "
         "then, or another --run"))
    if other_data:
        print_once("the data is not what it was: the run goes on with what is there now")


def _as_flag(value) -> str:
    """A setting as it is written behind its flag."""
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value!s}" or "''"


# ------------------------------------------------------------------------------- how updates went

# A gradient so many times its usual norm stops the run: the guide would not recover.
EXPLODED = 1000
# Without guidance to explain, a correction is 0 but for rounding; a real one is about 0.01 or more.
NO_CORRECTION = 1e-6


class History:
    """Loss, unexplained share and gradient norm of the last 50 updates."""

    def __init__(self):
        self.recent: list[tuple[float, float, float]] = []
        self.corrected = False              # whether any update yet had a correction to learn

    def add(self, loss: float, error: float, correction: float, norm: float) -> None:
        there = correction > NO_CORRECTION
        self.corrected |= there
        share = error / correction if there else 1.0
        self.recent = [*self.recent[-49:], (loss, share, norm)]

    def means(self, count: int) -> tuple[float, float, float]:
        """Of the last so many updates."""
        return tuple(np.mean(self.recent[-count:], axis=0))

    def usual_norm(self) -> float:
        """Mean norm of the gradient lately; infinite while there is too little to tell."""
        norms = [norm for _, _, norm in self.recent]
        return float(np.mean(norms)) if len(norms) >= 10 else math.inf

    def is_bad(self, loss: float, norm: float) -> bool:
        """Whether an update with this loss and gradient would spoil the guide."""
        return not (math.isfinite(loss) and math.isfinite(norm)
                    and norm <= EXPLODED * self.usual_norm())


class Pace:
    """Seconds that an update takes, measured once, without the first ones, which take longer."""

    SECONDS = 5                 # to measure for

    def __init__(self, warm_up: int):
        self.warm_up, self.done = warm_up, False
        self.first = self.last = math.inf           # update of this stage: seen first, seen last
        self.start: tuple[int, float] | None = None

    def measure(self, update: int) -> float | None:
        """To be called now and then, with the updates made in this stage; None but for once."""
        now = time.monotonic()
        if update <= self.last:                     # a stage begins
            self.first, self.start = update, None
        self.last = update
        if self.start is None and update - self.first >= self.warm_up:
            self.start = update, now
        made, seconds = (update - self.start[0], now - self.start[1]) if self.start else (0, 0)
        if self.done or not made or seconds < self.SECONDS:
            return None
        self.done = True
        return seconds / made


def duration(seconds: float) -> str:
    """In words: "2 h 10 min", "12 min", "40 s"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


# ------------------------------------------------------------------------------- an optimiser's


def lr_schedule(update: int, total: int, warmup: int = 50) -> float:
    """Share of the learning rate: a short warmup, then a cosine down to a twentieth.

    Without the warmup Adam's first steps, whose second moments are of one batch, are too long. It
    takes at most a fifth of the updates.
    """
    warmup = max(1, min(warmup, total // 5))
    cosine = 0.5 * (1 + math.cos(math.pi * update / max(total, 1)))
    return min(1.0, (update + 1) / warmup) * (0.05 + 0.95 * cosine)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as named tensors, so that a checkpoint is plain safetensors."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{k}": v for i, entry in state.items() for k, v in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; tensors of other names are passed over."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, k = name.split(".", 2)
            state.setdefault(int(i), {})[k] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # A file has lost the memory layout of moments; updates are slower where it is not the weight's.
    for p, entry in optimizer.state.items():
        entry |= {k: torch.empty_like(p).copy_(v) for k, v in entry.items() if v.shape == p.shape}


# ------------------------------------------------------------------------------- finished guides


def set_aside(path: Path, about: dict) -> Path | None:
    """Keeps a guide that another run left at `path`, as NAME.safetensors.old; returns that path.

    A run that was killed right after it saved its guide finds its own there: nothing to keep.
    """
    def identity(about: dict) -> str:
        settings = {k: v for k, v in about.get("settings", {}).items()
                    if k not in ("resume", "device")}
        return json.dumps(about | {"settings": settings}, sort_keys=True)

    with suppress(CheckpointError):                     # another kind of file that lies there
        if not path.exists() or identity(read_guide(path).about) == identity(about):
            return None
    aside = path.with_name(f"{path.name}.old")
    with atomic_write(aside) as temporary:
        shutil.copyfile(path, temporary)
    return aside
