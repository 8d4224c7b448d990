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
import csv
import fcntl
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import BinaryIO, TextIO

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import ppdd
from mini import postcards
from ppdd import Base, Distilled, GuideConfig, rank, world
from unet import CheckpointError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTIONS, METADATA = (".txt", ".caption"), ("metadata.jsonl", "metadata.csv")
LONGEST = 2000                           # characters of a caption that are read; 77 tokens are used
DATA = ("give a folder of pictures with .txt captions or with metadata.jsonl, tar shards, "
        "COCO's captions.json:FOLDER, or a text file of prompts")


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
    lora: tuple[str, ...] = option((), "LoRA files to merge into the base: FILE or FILE:scale")
    data: tuple[str, ...] = option((), "a folder of pictures with .txt or .caption files, or with "
                                       "metadata.jsonl or .csv (file_name, text); img2dataset's "
                                       "shards: a .tar, a folder, 'shards/{00000..00012}.tar'; "
                                       "COCO's captions.json:FOLDER; a text file of prompts, one a "
                                       "line. May be given again (the miniature draws its own)")
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
    batch: int = option(32, "pictures an update, those of all processes together")
    optimizer: str = option("", "default: what suits this base and guide",
                            choices=("adamw", "muon"))
    lr: float = option(0.0, "learning rate of stage one; 0: what suits this base and guide")
    halving_lr: float = option(0.0, "learning rate of the halving stages; 0: what suits")
    loss: str = option("eps", "weigh the ε error plainly as the paper does, by truncated SNR, or "
                              "by the root of that", choices=("eps", "root-snr", "snr"))
    pool: str = option("attention", "tiny: how text becomes a vector",
                       choices=("attention", "mean", "end"))
    form: str = option("sum", "tiny: Eq. 5's sum; g times what time and text say; or the text "
                              "times what g and time say", choices=("sum", "product", "gated"))
    pictures: int = option(0, "the miniature's training pictures; 0: 6000, or with --max-updates "
                              "at most 40 batches")
    accumulate: int = option(1, "split each batch into so many parts, one by one, to save memory")
    checkpointing: bool = option(False, "recompute the decoder's blocks backwards, for memory")
    cache: str = option("", "keep moments and text states of --data in this folder, fp16")
    clip: float = option(1.0, "gradients are clipped to this norm")
    ema: float = option(0.0, "a stage's guide is the running mean of its weights with this decay; "
                             "0: its last weights")
    seed: int = option(0, "seed of everything")
    device: str = option("", "cuda or cpu; default: cuda where there is one")
    dtype: str = option("auto", "autocast; auto: bf16 on GPUs that have it, else none",
                        choices=("auto", "fp32", "bf16"))
    compile: bool = option(False, "torch.compile the base; needs a C++ compiler on a CPU")
    out: str = option("guides", "finished guides go to OUT/BASE")
    run: str = option("", "folder of checkpoint, log and pictures; default runs/BASE/GUIDE")
    init: str = option("", "begin with this guide and skip stage one")
    further: bool = option(False, "with --init: train stage one on, with a schedule and updates of "
                                  "its own")
    resume: bool = option(False, "go on where the run in this folder stopped")
    save_every: int = option(500, "updates between checkpoints")
    keep: int = option(2, "how many checkpoints to keep")
    grid_every: int = option(1000, "updates between pictures of CFG beside guide; 0: none")


# Optimiser, then learning rate and updates of stage one and of each halving, by size of base and
# kind of guide. The miniature's made the bundled guides, as the README's "Results" says; SD's are
# starting points, not tried.
LENGTHS = {
    ("mini", "tiny"): ("adamw", 5e-3, 6000, 1e-3, 500),
    ("mini", "full"): ("muon", 6e-3, 9000, 1.5e-3, 500),
    ("sd", "tiny"): ("adamw", 1e-3, 20_000, 3e-4, 5_000),
    ("sd", "full"): ("adamw", 1e-4, 20_000, 3e-5, 5_000),
}

PICTURES = 6000                         # of the miniature, to train on

WEIGHTS = {"eps": None, "root-snr": ppdd.root_snr, "snr": ppdd.truncated_snr}


def complete(config: Config, base: Base) -> Config:
    """The configuration with every 0, "auto" and ~ replaced by what it stands for."""
    size = "sd" if base.unet.config.model_channels >= 256 else "mini"
    optimizer, lr, updates, halving_lr, halving_updates = LENGTHS[size, config.guide]
    limit = config.max_updates or math.inf
    pictures = min(PICTURES, 40 * config.batch) if config.max_updates else PICTURES
    fixed = config.g_range[0] == config.g_range[1]
    name = config.guide + (f"-g{config.g_range[0]:g}" if fixed else "")
    return replace(
        config, optimizer=config.optimizer or optimizer, lr=config.lr or lr,
        pictures=config.pictures or pictures,
        halving_lr=config.halving_lr or halving_lr,
        updates=int(min(config.updates or updates, limit)),
        halving_updates=int(min(config.halving_updates or halving_updates, limit)),
        run=os.path.expanduser(config.run or f"runs/{base.name}/{name}"),
        **{k: os.path.expanduser(getattr(config, k)) for k in ("out", "init", "cache")})


def check(config: Config) -> None:
    """Raises BadInput for settings that cannot work, before anything is loaded."""
    low, high = config.g_range
    device = re.fullmatch(r"cpu|(cuda)(:([0-9]{1,3}))?|", config.device)
    for wrong, sentence in (
        (not (0 <= low <= high < 100 and high > 0),
         f"--g-range {low:g} {high:g}: give LOW <= HIGH, from 0 to 100, and not both 0"),
        (not 1 <= config.batch <= 65536, f"--batch {config.batch}: from 1 to 65536"),
        (not 1 <= config.accumulate * world() <= config.batch,
         f"--accumulate {config.accumulate}: at least 1, and at most --batch {config.batch} "
         "over the number of processes"),
        (config.size % 64 or not 64 <= config.size <= 2048,
         f"--size {config.size}: a multiple of 64 pixels, at most 2048"),
        (config.further and not config.init, "--further is for a guide given with --init"),
        (config.init and not config.further and config.start_steps == config.end_steps,
         "--init skips stage one, and --start-steps is --end-steps: nothing is left to train"),
        (config.keep < 1, f"--keep {config.keep}: at least 1"),
        (config.cache != "" and not config.data, "--cache is for pictures of --data: give some"),
        (min(config.updates, config.halving_updates, config.max_updates, config.grid_every) < 0,
         "a number of updates can't be negative"),
        (config.save_every < 1, f"--save-every {config.save_every}: at least 1"),
        (not 0 <= config.pictures <= 10**6, f"--pictures {config.pictures}: at most 1000000"),
        (not (0 <= config.lr < 1 and 0 <= config.halving_lr < 1), "a learning rate is from 0 to 1"),
        (not config.clip > 0, f"--clip {config.clip}: a norm above 0"),
        (not 0 <= config.trajectories <= 1, f"--trajectories {config.trajectories}: from 0 to 1"),
        (not 0 <= config.ema < 1, f"--ema {config.ema}: from 0 to below 1"),
        (not 0 <= config.seed < 2**31, f"--seed {config.seed}: from 0 to 2147483647"),
        (not _halves(config.start_steps, config.end_steps), "--start-steps must be --end-steps "
         "times a power of two, at most 1000: 64 and 8, for example"),
        (config.uncond != config.uncond.encode(errors="ignore").decode(),
         "--uncond holds bytes that are not text"),
        (not device, f"--device {config.device}: cpu, cuda or cuda:0, cuda:1, …"),
        (device and device[1] and int(device[3] or 0) >= torch.cuda.device_count(),
         f"--device {config.device}: no such CUDA device here; leave it out or pass cpu"),
    ):
        if wrong:
            raise BadInput(sentence)


def _halves(start: int, end: int) -> bool:
    return 1 <= end <= start <= 1000 and start % end == 0 and (start // end).bit_count() == 1


# ------------------------------------------------------------------------------- processes

@contextmanager
def together(config: Config) -> Iterator[Config]:
    """Meets torchrun's other processes, each on a GPU of its own where there are GPUs. One that
    is not heard of for a minute ends them all."""
    if world() == 1:
        yield config
        return
    cuda = torch.cuda.is_available() and config.device != "cpu"
    local = int(os.environ.get("LOCAL_RANK", -1))
    if local < 0 or (cuda and local >= torch.cuda.device_count()):
        raise BadInput("start several processes with torchrun, and at most one a GPU")
    if cuda:
        config = replace(config, device=f"cuda:{local}")
        torch.cuda.set_device(config.device)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")      # else NCCL kills, and says nothing
    try:
        distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=60))
        patient()
        yield config
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise BadInput(f"another process ended, or was silent for a minute ({error}): its own "
                       "message says why; --resume goes on from the last checkpoint") from error
    finally:
        patient.cache_clear()
        if distributed.is_initialized():
            distributed.destroy_process_group()


@functools.cache
def patient() -> distributed.ProcessGroup:
    """Where processes wait for what one of them does alone: for hours, if need be."""
    return distributed.new_group(backend="gloo", timeout=timedelta(hours=12))


def wait() -> None:
    """Until every process has come here."""
    if world() > 1:
        distributed.barrier(group=patient())


def by_the_first(method: Callable) -> Callable:
    """Only the first process does it, while the others wait."""
    @functools.wraps(method)
    def alone(*args) -> None:
        if rank() == 0:
            method(*args)
        wait()
    return alone


def gather(*tensors: Tensor) -> None:
    """Sums each over the processes, in place: what one has, all have, if the others have 0."""
    for tensor in tensors if world() > 1 else ():
        distributed.all_reduce(tensor)


# ------------------------------------------------------------------------------- data

class Postcards:
    """The miniature's own pictures and captions, drawn and encoded once, kept in memory."""

    skipped = ()

    def __init__(self, base: Base, count: int, seed: int):
        generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        device, moments, states = next(base.unet.parameters()).device, [], []
        self.texts: list[str] = []
        attributes = postcards.sample_attributes(count, generator)
        for part in tqdm(attributes.split(250), desc="drawing postcards", leave=False):
            pictures = postcards.draw(part, generator=generator).to(device)
            moments.append(base.vae.encode(pictures * 2 - 1))
            self.texts += [postcards.caption(a, rng) for a in part]
            states.append(base.embed(self.texts[-len(part):]).half())
        self.encoded, self.states = torch.cat(moments), torch.cat(states)
        self.side, self.pictured = self.encoded.shape[-1], count
        self.identity = f"postcards {count} {seed}"

    def examples(self, count: int) -> list[str]:
        """Prompts for the pictures that show how far the guide is."""
        rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        return [postcards.caption(a, rng, left_out=False)
                for a in postcards.sample_attributes(count, generator)]

    def __len__(self) -> int:
        return self.pictured

    def load(self, rows: list[int]) -> tuple[list[int], Tensor]:
        """Rows, and what `moments` makes moments (B, 2 Z, H, W) of."""
        return rows, torch.tensor(rows)

    def moments(self, rows: Tensor) -> Tensor:
        return self.encoded[rows]

    def prompts(self, rows: list[int]) -> Tensor:
        """Prompt states (B, L, D)."""
        return self.states[rows].float()

    def captions(self, rows: list[int]) -> list[str]:
        return [self.texts[row] for row in rows]

    def told(self) -> str:
        return ""


# An example is (file, first byte, number of bytes, caption); −1 bytes: the whole file. A prompt
# without a picture has no file.
Example = tuple[str, int, int, str]


def in_folder(folder: str, skip: Callable) -> Iterator[Example]:
    """Pictures with .txt or .caption beside them, what a metadata file lists, and tar shards."""
    seen: set[str] = set()
    for root, inside, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:                          # a link in a circle
            inside.clear()
            continue
        seen.add(real)
        inside.sort()
        there, table = set(names), [n for n in METADATA if n in names]
        if table:
            inside.clear()
            yield from in_table(f"{root}/{table[0]}", skip)
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            beside = [stem + s for s in CAPTIONS if stem + s in there]
            if suffix == ".tar":
                yield from in_tar(f"{root}/{name}", skip)
            elif suffix.lower() in IMAGES and beside and not table:
                with open(f"{root}/{beside[0]}", "rb") as opened:
                    text = opened.read(LONGEST).decode("utf-8-sig", errors="replace")
                yield f"{root}/{name}", 0, -1, text


def in_table(file: str, skip: Callable) -> Iterator[Example]:
    """A .jsonl or .csv with `file_name`, from the table's folder on, and `text`."""
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = (csv.DictReader(lines) if file.lower().endswith(".csv") else
                (json.loads(line) for line in lines if line.strip()))
        try:
            for row in rows:
                yield str(Path(file).parent / row["file_name"]), 0, -1, "" + row["text"]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise BadInput(f"--data {file}: a row is not as it should be ({error!r}): "
                           "each needs file_name and text") from error


def in_tar(file: str, skip: Callable) -> Iterator[Example]:
    """key.jpg and key.txt of a shard, as img2dataset writes them: only headers and captions are
    read now. A damaged shard gives what is whole before the damage."""
    halves: dict[str, dict[str, tuple]] = {}
    try:
        with tarfile.open(file, "r:") as shard:
            while member := shard.next():
                shard.members.clear()                              # else it keeps them all
                key, suffix = os.path.splitext(member.name if member.isfile() else "")
                half = halves.setdefault(key, {})
                if suffix.lower() in IMAGES:
                    half["picture"] = member.offset_data, member.size
                elif suffix in CAPTIONS:
                    text = shard.extractfile(member).read(LONGEST)
                    half["caption"] = text.decode("utf-8-sig", errors="replace")
                if len(half) == 2:
                    yield file, *half["picture"], half["caption"]
                    del halves[key]
                elif not half:
                    del halves[key]
    except (tarfile.TarError, OSError) as error:
        skip(file, error)


def in_shards(pattern: str, skip: Callable) -> Iterator[Example]:
    """Every shard of a pattern: shards/{00000..00012}.tar, shards/*.tar."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces:
        low, high = braces.groups()
        numbers = (f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1))
        files = (pattern[:braces.start()] + n + pattern[braces.end():] for n in numbers)
    else:
        files = sorted(glob.glob(pattern, recursive=True))
    for file in files:
        yield from in_tar(file, skip)


def in_coco(given: str, skip: Callable) -> Iterator[Example]:
    """COCO's captions_SPLIT.json, an example a caption; pictures in FOLDER of FILE.json:FOLDER,
    else in a folder SPLIT beside the file or beside its folder."""
    name, _, folder = given.partition(".json:")
    file = Path(given if not folder else name + ".json")
    split = file.stem.split("_")[-1]
    try:
        told = json.loads(file.read_bytes())
        names = {image["id"]: image["file_name"] for image in told["images"]}
        captions = [(names[a["image_id"]], "" + a["caption"]) for a in told["annotations"]]
        places = [Path(folder)] if folder else [file.parent, file.parent / split,
                                                file.parent.parent / split]
        root = next((p for p in places for n, _ in captions[:9] if (p / n).is_file()), None)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"--data {file} has no captions as in COCO's captions_val2014.json "
                       f"({error!r})") from error
    if root is None:
        raise BadInput(f"--data {file}: its pictures are not in {places[-1]}: "
                       f"give --data {file}:FOLDER")
    for name, caption in captions:
        yield str(root / name), 0, -1, caption


def in_prompts(file: str, skip: Callable) -> Iterator[Example]:
    """Prompts, one a line, without pictures: for the teacher's own sampling."""
    if Path(file).suffix.lower() in (".tsv", ".parquet"):
        raise BadInput(f"--data {file} is a table, not a list of prompts: {DATA}")
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            if "\0" in line:
                raise BadInput(f"--data {file} is not text: {DATA}")
            if line.strip():
                yield "", 0, 0, line.strip()


def reader(given: str) -> Callable[[str, Callable], Iterator[Example]]:
    """The one of the readers above that understands this --data."""
    path = Path(given)
    if path.is_dir():
        return in_folder
    if path.suffix.lower() in (".jsonl", ".csv") and path.is_file():
        return in_table
    if path.suffix == ".json" or ".json:" in given:
        return in_coco
    if path.is_file():
        return in_tar if path.suffix == ".tar" else in_prompts
    if re.search(r"\{\d+\.\.\d+\}|[*?\[]", given):
        return in_shards
    raise BadInput(f"--data {given} does not exist: {DATA}")


def stamp(file: str) -> tuple:
    """A file's name, size and time: what tells that it is still the same."""
    try:
        stat = os.stat(file)
    except OSError:
        return (file,)
    except ValueError as error:
        raise BadInput(f"--data: no file can be called {file!r} ({error})") from error
    return os.path.basename(file), stat.st_size, stat.st_mtime_ns


def stand_ins(row: int, count: int) -> Iterator[int]:
    """A row, then those that stand in for it, in turn, where its picture can't be used: the row
    alone decides which, so neither a resume nor the number of processes changes them."""
    yield row
    rng = random.Random(row)
    yield from (rng.randrange(count) for _ in range(100))


def square(file: BinaryIO, size: int) -> Tensor:
    """(3, size, size) uint8: upright, on white, the middle cut out and resized."""
    image = Image.open(file)
    image.draft(None, (2 * size, 2 * size))               # a large JPEG need not be read in full
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                                             # 16 bits, grey
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("a picture of floating-point numbers")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Pictures:
    """Captioned pictures, and prompts after them, of every --data: read as they are needed.

    The index of the examples lies in a temporary database of SQLite's, on disk, so memory does
    not grow with the set.
    """

    def __init__(self, base: Base, given: Sequence[str], size: int):
        self.base, self.size, self.side = base, size, size // 8
        self.device = next(base.unet.parameters()).device
        self.skipped: dict[int | str, str] = {}                       # row or file: what is wrong
        self.lock, self.pool = Lock(), ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self.index, digest = sqlite3.connect("", check_same_thread=False), hashlib.sha256()
        known = functools.lru_cache(64)(stamp)                # a shard's is asked for often
        self.index.execute("CREATE TABLE example (id INTEGER PRIMARY KEY, file, first, size, text)")
        for row, example in enumerate(self.examples_of(given)):
            digest.update(repr((known(example[0]), *example[1:])).encode())
            self.index.execute("INSERT INTO example VALUES (?, ?, ?, ?, ?)",
                               (row, os.fsencode(example[0]), *example[1:]))
        self.identity = digest.hexdigest()
        count = "SELECT count(*), count(nullif(file, x'')) FROM example"
        self.count, self.pictured = self.index.execute(count).fetchone()
        if not self.count:
            raise BadInput(f"--data {' '.join(given)} holds no picture with a caption and no "
                           f"prompt{self.told()}: {DATA}")
        if self.pictured:
            Pictures.usable(self, 0)                    # where none can be used, it says so now

    def examples_of(self, given: Sequence[str]) -> Iterator[Example]:
        paths = [os.path.expanduser(g) for g in given]
        paths.sort(key=lambda path: reader(path) is in_prompts)                  # these go last
        examples = itertools.chain.from_iterable(reader(p)(p, self.skip) for p in paths)
        for *place, text in tqdm(examples, "reading names", unit="", leave=False):
            yield *place, text.strip()[:LONGEST].encode(errors="replace").decode()

    def skip(self, what: int | str, error: Exception) -> None:
        name = what if isinstance(what, str) else self.example(what)[0]
        self.skipped[what] = f"{name} ({str(error) or type(error).__name__})"

    def told(self) -> str:
        """What was skipped: how many, and the first few by name."""
        few = "; ".join([*self.skipped.values()][:3])
        return f" ({len(self.skipped)} skipped: {few})" if few else ""

    def __len__(self) -> int:
        return self.count

    def example(self, row: int) -> Example:
        with self.lock:
            found = self.index.execute("SELECT * FROM example WHERE id = ?", (row,)).fetchone()
        return os.fsdecode(found[1]), *found[2:]

    def captions(self, rows: list[int]) -> list[str]:
        return [self.example(row)[3] for row in rows]

    def examples(self, count: int) -> list[str]:
        """Prompts for the pictures that show how far the guide is."""
        return self.captions(list(range(min(count, len(self)))))

    def prompts(self, rows: list[int]) -> Tensor:
        """Prompt states (B, L, D)."""
        with torch.autocast(self.device.type, enabled=False):
            return self.base.embed(self.captions(rows)).float()

    def picture(self, row: int) -> Tensor | None:
        """(3, size, size) uint8; None, and noted, where it can't be used."""
        if row in self.skipped:
            return None
        try:
            file, first, length, _ = self.example(row)
            with open(file, "rb") as opened:
                length = os.fstat(opened.fileno()).st_size if length < 0 else length
                if length > 2**28:
                    raise ValueError(f"{length:,} bytes are too many")
                opened.seek(first)
                return square(io.BytesIO(opened.read(length)), self.size)
        except Exception as error:                      # on damaged files decoders raise anything
            self.skip(row, error)
            return None

    def usable(self, row: int) -> tuple[int, Tensor]:
        """A row and its picture, or those of the first stand-in whose picture can be used."""
        for stand_in in stand_ins(row, self.pictured):
            if (picture := self.picture(stand_in)) is not None:
                return stand_in, picture
        raise BadInput(f"--data: no picture could be used{self.told()}")

    def load(self, rows: list[int]) -> tuple[list[int], Tensor]:
        """The rows, stand-ins where needed, and what `moments` makes moments of."""
        found = list(self.pool.map(self.usable, rows))
        pictures = [picture for _, picture in found]
        return [row for row, _ in found], torch.stack(pictures) if found else torch.empty(0)

    def moments(self, pictures: Tensor) -> Tensor:
        """(B, 2 Z, H, W), unscaled, of pictures (B, 3, 8 H, 8 W) uint8."""
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self.base.vae.encode(part.to(self.device).float() / 127.5 - 1)
                              for part in pictures.split(8)]).float()


def sync(path: Path) -> None:
    """Returns once a file just renamed, and its name, would outlast a power cut."""
    for part in (path, path.parent):
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if part == path:
                raise
            warnings.warn(f"{part} can't be synced ({error.strerror})", stacklevel=1)
        finally:
            os.close(descriptor)


class Cached(Pictures):
    """Pictures whose moments and text states lie on disk in fp16, in shards of 512 rows.

    Encoded once, in float32: a folder of its own for each VAE, text encoder, size and set of
    files. A shard is written whole or not at all, so a run that is killed goes on with the next.
    """

    SHARD = 512

    def __init__(self, base: Base, given: Sequence[str], size: int, cache: str):
        super().__init__(base, given, size)
        if not self.pictured:
            raise BadInput("--cache is for pictures, and --data holds prompts only: leave it out")
        weights, digest = (base.vae.state_dict(), base.text.state_dict()), hashlib.sha256()
        for name, tensor in itertools.chain(*(w.items() for w in weights)):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        digest.update(f"1 {self.SHARD} {size} {self.identity}".encode())  # 1: raise with `square`
        self.folder = Path(cache) / digest.hexdigest()[:16]
        self.shard = functools.lru_cache(64)(self.open)
        shards = range(math.ceil(self.pictured / self.SHARD))
        for number in tqdm(shards[rank()::world()], f"caching in {self.folder}", leave=False,
                           disable=rank() > 0):
            try:
                self.open(number)
            except (SafetensorError, OSError):
                self.make(number)
        wait()
        self.good = torch.cat([self.open(i).get_tensor("good") for i in shards])
        for row in (~self.good).nonzero().flatten().tolist():
            self.skipped.setdefault(row, f"{self.example(row)[0]} (not usable when cached)")

    def open(self, number: int) -> safe_open:
        return safe_open(self.folder / f"{number:06d}.safetensors", framework="pt")

    @torch.no_grad()
    def make(self, number: int) -> None:
        """One shard: moments and states, and whether the picture could be used."""
        tensors: list[tuple[Tensor, ...]] = []
        first, end = number * self.SHARD, min((number + 1) * self.SHARD, self.pictured)
        for start in range(first, end, 8):
            rows = list(range(start, min(start + 8, end)))
            found = list(self.pool.map(self.picture, rows))
            blank = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            pictures = torch.stack([blank if f is None else f for f in found])
            good = torch.tensor([f is not None for f in found])
            tensors.append((super().moments(pictures), super().prompts(rows), good))
        moments, states, good = (torch.cat(parts).cpu() for parts in zip(*tensors))
        path = self.folder / f"{number:06d}.safetensors"
        ppdd.save_tensors(path, {"moments": moments.half(), "states": states.half(), "good": good})
        sync(path)

    def read(self, name: str, row: int) -> Tensor:
        number, place = divmod(row, self.SHARD)
        return self.shard(number).get_slice(name)[place:place + 1].float()

    def usable(self, row: int) -> tuple[int, Tensor]:
        for stand_in in stand_ins(row, self.pictured):
            if self.good[stand_in]:
                return stand_in, self.read("moments", stand_in)[0]
        raise BadInput(f"--data: no picture could be used{self.told()}")

    def moments(self, pictures: Tensor) -> Tensor:
        return pictures.to(self.device)

    def prompts(self, rows: list[int]) -> Tensor:
        return torch.cat([self.read("states", row).to(self.device) if row < self.pictured else
                          super(Cached, self).prompts([row]) for row in rows])


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

EXPLODED = 1000              # so many times the gradient's usual norm, and the run stops
TOLD = ("loss", "error", "correction", "row", "stop")       # what processes tell of each example


def lock(folder: Path) -> TextIO:
    """Holds the folder for this run until the file is closed, or the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise BadInput(f"{folder} is in use by another run: wait for its end, or give another "
                       "--run") from error
    except OSError as error:
        warnings.warn(f"{folder} can't be locked ({error.strerror}): one run only", stacklevel=1)
    for left in folder.glob(".*.tmp"):                           # by a run that was killed
        left.unlink(missing_ok=True)
    return file


def check_writable(folder: Path) -> None:
    """Raises BadInput where the folder could not be made or written to; makes nothing."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise BadInput(f"{folder} can't be written to: {nearest} is read-only or no folder")


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


@functools.cache
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

    def __init__(self, config: Config, base: Base, data: Postcards | Pictures):
        self.config, self.base, self.data = config, base, data
        self.device = next(base.unet.parameters()).device
        self.folder = Path(config.run)
        self.guide_config = GuideConfig(kind=config.guide, pool=config.pool, form=config.form)
        torch.manual_seed(config.seed)
        self.guide, self.teacher = self.new_guide(), self.new_guide().requires_grad_(False)
        self.guide.start_from(base.unet)
        self.empty = base.embed([config.uncond]).float()
        self.base_hash = ppdd.fingerprint(base.path, base.loras)
        self.stages, self.stage, self.update = stages(config), 0, 0
        self.origin: dict = {}                                   # what --init says of itself
        self.stopped, self.stopping = 0, False                   # a signal here; one to any process
        slots = torch.arange(config.batch)[rank()::world()]
        self.parts = [slots[k::config.accumulate] for k in range(config.accumulate)
                      if k < len(slots)]
        self.ahead = ThreadPoolExecutor(1)
        self.held: TextIO | None = None                          # the locked file of the folder
        self.average = copy.deepcopy(self.guide).requires_grad_(False) if config.ema else None
        self.begin_stage()

    def start_from(self, path: Path) -> None:
        """Takes a finished guide: one of stage one to train it on, or any to halve it."""
        made, about = ppdd.read_about(path)
        if made != self.guide_config:
            raise BadInput(f"--init {path} is a guide of other settings ({made}): give the "
                           "--guide, --pool and --form that it was trained with")
        if self.config.further and about.get("steps"):
            raise BadInput(f"--init {path} was halved to {about['steps']} steps: --further takes a "
                           "guide of stage one; leave it out to halve this one")
        made_for = about.get("steps") or self.config.start_steps
        if made_for != self.config.start_steps:
            raise BadInput(f"--init {path} takes {made_for} steps, and --start-steps is "
                           f"{self.config.start_steps}: halve it on with --start-steps {made_for} "
                           "and --end-steps below that")
        self.origin = {"sha256": ppdd.fingerprint(path), "steps": about.get("steps", 0),
                       "updates": about.get("updates", 0)}
        guide = ppdd.load_guide(path, self.base.unet.config).state_dict()
        for _, module in self.modules():
            module.load_state_dict(guide)
        self.stage = 0 if self.config.further else 1

    def new_guide(self) -> nn.Module:
        guide = ppdd.build_guide(self.base.unet.config, self.guide_config)
        return ppdd.laid_out(guide.to(self.device))

    def begin_stage(self) -> None:
        self.walk: dict[str, Tensor] = {}                              # see `on_the_way`
        self.recent: list[tuple[float, float, float]] = []             # of the last 50 updates
        self.loading: dict[tuple[int, int], Future] = {}               # see `pictures`
        kind = {"adamw": torch.optim.AdamW, "muon": Muon}[self.config.optimizer]
        self.optimizer = kind(self.guide.parameters(), weight_decay=0.0)

    # -- one update

    def before(self, stage: int) -> int:
        """Updates of this stage that the guide had when --further began."""
        return 0 if stage else self.origin.get("updates", 0)

    def generator(self, stage: int, update: int) -> torch.Generator:
        """Of everything that chance decides in one update."""
        update += self.before(stage)
        seed = ((self.config.seed * 31 + stage) * 1_000_003 + update) % 2**63
        return torch.Generator().manual_seed(seed)

    def rows(self, generator: torch.Generator) -> Tensor:
        """(n,) of the data: those of a batch whose pictures are noised. A generator's first."""
        n = self.config.batch - math.ceil(self.config.trajectories * self.config.batch)
        return torch.randint(max(self.data.pictured, 1), (n,), generator=generator)

    def load_pictures(self, stage: int, update: int) -> list[tuple[list[int], Tensor]]:
        rows = self.rows(self.generator(stage, update))
        return [self.data.load(rows[part[part < len(rows)]].tolist()) for part in self.parts]

    def pictures(self, stage: Stage) -> list[tuple[list[int], Tensor]]:
        """Rows and pictures of every part; those of the next update are made ready meanwhile."""
        now, then = (self.stage, self.update), (self.stage, self.update + 1)
        loading = self.loading.pop(now, None) or self.ahead.submit(self.load_pictures, *now)
        more = self.update + 1 < stage.updates
        self.loading = {then: self.ahead.submit(self.load_pictures, *then)} if more else {}
        return loading.result()

    def draw(self, stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """What chance decides of a whole batch: noise (2, n, Z, H, W) of the n pictures, and
        timesteps t (B,) and g (B,) of those and of the samplings of `on_the_way` after them."""
        n, side = len(self.rows(generator)), self.data.side
        noise = torch.randn(2, n, self.base.unet.config.in_channels, side, side,
                            generator=generator)
        g = self.draw_g(n, generator)
        if stage.steps:
            grid = torch.tensor(ppdd.step_grid(stage.steps))
            t = grid[torch.randint(stage.steps, (n,), generator=generator)]
        else:
            t = torch.randint(ppdd.TIMESTEPS, (n,), generator=generator)
        self.on_the_way(self.config.batch - n, generator)
        return noise, torch.cat([t.to(self.device), self.walk["t"]]), torch.cat([g, self.walk["g"]])

    def latents(self, noise: Tensor, t: Tensor, pictures: Tensor, slots: Tensor) -> Tensor:
        """(B, Z, H, W) at these slots of the batch: pictures with noise, then the samplings'."""
        n = noise.shape[1]
        noised, walking = slots[slots < n], slots[slots >= n] - n
        z = [self.walk["z"][walking]]
        if len(noised):
            noise = noise[:, noised].to(self.device)
            x = self.base.vae.sample(self.data.moments(pictures), noise[0])
            z.insert(0, ppdd.add_noise(x, noise[1], t[noised]))
        return torch.cat(z)

    def draw_g(self, n: int, generator: torch.Generator) -> Tensor:
        low, high = self.config.g_range
        return (low + (high - low) * torch.rand(n, generator=generator)).to(self.device)

    def on_the_way(self, n: int, generator: torch.Generator) -> None:
        """`walk` is where n samplings of the teacher stand (Jensen & Sadat, 2025); those that have
        arrived begin anew, with other noise, prompt and g."""
        shape = (n, self.base.unet.config.in_channels, self.data.side, self.data.side)
        new = {"z": torch.randn(shape, generator=generator).to(self.device),
               "t": torch.full((n,), ppdd.TIMESTEPS - 1, device=self.device),
               "g": self.draw_g(n, generator),
               "row": torch.randint(len(self.data), (n,), generator=generator).to(self.device)}
        walk = self.walk or new
        arrived = walk["t"] < 0
        self.walk = {k: torch.where(arrived.view(-1, *[1] * (v.ndim - 1)), new[k], v)
                     for k, v in walk.items()}

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

    def distill(self, stage: Stage, z: Tensor, t: Tensor, c: Tensor, g: Tensor) -> Distilled:
        """The loss of a batch: Algorithm 1, or a halving on the grid of the teacher's steps."""
        unet, guide, weight = self.base.unet, self.guide, WEIGHTS[self.config.loss]
        if not stage.steps:
            empty = self.empty.expand(len(z), -1, -1)
            return ppdd.cfg_distillation(unet, guide, z, t, c, empty, g, weight)
        after = following(2 * stage.steps).to(self.device)
        return ppdd.halving(unet, guide, self.teacher, z, t, after[t], after[after[t]], c, g,
                            weight)

    def step(self, stage: Stage) -> tuple[float, float, float]:
        """One update, part by part; returns loss, unexplained share and norm of the gradient."""
        generator, first = self.generator(self.stage, self.update), not self.loading
        noise, t, g = self.draw(stage, generator)
        target = torch.zeros_like(self.walk["z"])
        told = torch.zeros(len(t), len(TOLD), dtype=torch.float64, device=self.device)
        wanted = self.config.dtype
        bf16 = (ppdd.auto_dtype(self.device) if wanted == "auto" else wanted) == "bf16"
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.optimizer.zero_grad(set_to_none=True)
        for slots, (rows, pictures) in zip(self.parts, self.pictures(stage)):
            walking = slots[slots >= noise.shape[1]] - noise.shape[1]
            rows = rows + self.walk["row"][walking].tolist()
            with ppdd.quick_attention(self.device):
                with autocast:
                    z = self.latents(noise, t, pictures, slots)
                    c = self.data.prompts(rows)
                    result = self.distill(stage, z, t[slots], c, g[slots])
                (result.loss * (len(slots) / len(t))).backward()
            target[walking] = result.target[len(slots) - len(walking):]
            columns = (result.loss.detach() / len(t), result.error, result.correction,
                       torch.tensor(rows), torch.tensor(self.stopped))
            for k, column in enumerate(columns):
                told[slots, k] = column.to(told)
        if self.config.compile and first:
            wait()                                          # compiling may take over a minute
        gather(told, target, *(p.grad for p in self.guide.parameters() if p.grad is not None))
        norm = nn.utils.clip_grad_norm_(self.guide.parameters(), self.config.clip)
        loss, error, correction, _, stop = told.sum(0).tolist()
        self.refuse(stage, loss, norm.item(), t, g, told)
        self.move(stage)
        self.walk_on(stage, target, generator)
        self.update, self.stopping = self.update + 1, bool(stop)
        return loss, error / max(correction, 1e-30), norm.item()

    def move(self, stage: Stage) -> None:
        """The optimiser's step, and the running mean's."""
        for group in self.optimizer.param_groups:
            group["lr"] = stage.lr * rate(self.update, stage.updates)
        self.optimizer.step()
        if self.average:
            keep = min(self.config.ema, (self.update + 1) / (self.update + 11))
            with torch.no_grad():
                for mean, weight in zip(self.average.parameters(), self.guide.parameters()):
                    mean.lerp_(weight, 1 - keep)

    def refuse(self, stage: Stage, loss: float, norm: float, t: Tensor, g: Tensor,
               told: Tensor) -> None:
        """Stops before an update that would spoil the guide, and keeps the state before it."""
        usual = np.mean([n for _, _, n in self.recent]) if len(self.recent) >= 10 else math.inf
        if math.isfinite(loss) and math.isfinite(norm) and norm <= EXPLODED * usual:
            return
        self.save(False)
        error = told[:, TOLD.index("error")]
        worst = (~error.isfinite()).nonzero().flatten() if not error.isfinite().all() else (
            error.argsort(descending=True)[:1])
        named = "; ".join(
            f"t {t[i]}, g {g[i]:.3g}, {self.data.captions([int(told[i, TOLD.index('row')])])[0]!r}"
            for i in worst[:3].tolist())
        before = f" (before, {usual:.4g})" * math.isfinite(usual)
        older = "delete that file and go on from the one before with " * (len(self.states()) > 1)
        raise BadInput(
            f"the loss is {loss:.4g} and the gradient's norm {norm:.4g}{before} at update "
            f"{self.update + 1} ({stage.title}), where {named}. The state before it is kept "
            f"in {self.folder / self.state_name()}: try --resume --dtype fp32, or {older}--resume "
            f"and a lower --{'halving-' * bool(stage.steps)}lr (now {stage.lr:g})")

    # -- the whole run

    def train(self) -> None:
        """To the end, or until Ctrl-C or SIGTERM: then KeyboardInterrupt, once all is saved."""
        before = {number: signal.signal(number, self.stop)
                  for number in (signal.SIGINT, signal.SIGTERM)}
        try:
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
            self.finish()
        except (OSError, SafetensorError) as error:
            raise BadInput(f"reading or writing failed ({error}): make room, or give back the "
                           "permission, and --resume goes on from the last checkpoint") from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, number: int, frame: object) -> None:
        """Ctrl-C or SIGTERM: the update at hand is ended first; a second one does not wait."""
        self.stopped = number
        signal.signal(number, signal.default_int_handler)

    @by_the_first
    def finish(self) -> None:
        for path in self.states():
            path.unlink()
        if said := self.data.told():
            tqdm.write(f"pictures{said}")

    def train_stage(self, stage: Stage) -> None:
        with tqdm(total=stage.updates, initial=self.update, desc=stage.title,
                  disable=rank() > 0) as bar:
            shown = 0.0
            while self.update < stage.updates:
                self.recent = [*self.recent[-49:], self.step(stage)]
                bar.update()
                last = self.update == stage.updates
                due = self.update % 50 == 0 or last
                if due or time.monotonic() > shown + 10:
                    told = np.mean(self.recent[-(self.update % 50 or 50):], axis=0)
                    shown = time.monotonic()
                    bar.set_postfix(loss=f"{told[0]:.4g}", unexplained=f"{told[1]:.1%}",
                                    skipped=len(self.data.skipped))
                if due:
                    self.log(stage, *told)
                if self.config.grid_every and (self.update % self.config.grid_every == 0 or last):
                    self.draw_grid(stage)
                if self.update % self.config.save_every == 0 or self.stopping:
                    self.save()
                if self.stopping:
                    raise KeyboardInterrupt

    @by_the_first
    def log(self, stage: Stage, loss: float, unexplained: float, norm: float) -> None:
        entry = {"stage": self.stage, "steps": stage.steps, "update": self.update, "loss": loss,
                 "unexplained": unexplained, "norm": norm,
                 "lr": self.optimizer.param_groups[0]["lr"],
                 "time": round(time.time(), 1)}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    @by_the_first
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
        name = f"{self.config.guide}{stage.suffix}-{self.update:06d}.png"
        with ppdd.written(self.folder / name) as temporary:
            image.save(temporary, format="png")

    # -- on disk

    @by_the_first
    def save_guide(self, stage: Stage) -> None:
        low, high = self.config.g_range
        name = self.config.guide + stage.suffix + (f"-g{low:g}" if low == high else "")
        path = Path(self.config.out) / self.base.name / f"{name}.safetensors"
        about = {"base": self.base.name, "base_hash": self.base_hash,
                 "stage": self.stage, "steps": stage.steps, "g_range": [low, high],
                 "uncond": self.config.uncond, "updates": self.before(self.stage) + self.update,
                 "seed": self.config.seed, "settings": asdict(self.config), "init": self.origin}
        aside = self.set_aside(path, about)
        ppdd.save_guide(path, self.guide, self.guide_config, about)
        sync(path)
        tqdm.write(f"saved {path}{f'; the one before it is {aside.name}' if aside else ''}")

    def set_aside(self, path: Path, about: dict) -> Path | None:
        """Keeps a guide that another run has left in this place; where this run's own lies there,
        saved just before it was killed, there is nothing to keep."""
        def run(about: dict) -> str:
            told = about | {"settings": {k: v for k, v in about.get("settings", {}).items()
                                         if k not in ("resume", "device")}}
            return json.dumps(told, sort_keys=True)

        with suppress(CheckpointError):                      # something else that lies there
            if not path.exists() or run(ppdd.read_about(path)[1]) == run(about):
                return None
        with ppdd.written(aside := path.with_name(f"{path.name}.old")) as temporary:
            shutil.copyfile(path, temporary)
        return aside

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """What a checkpoint keeps, by the prefix of its tensors."""
        yield from (("guide.", self.guide), ("teacher.", self.teacher))
        if self.average:
            yield "average.", self.average

    def state_name(self) -> str:
        return f"state-{self.stage:02d}-{self.update:08d}.safetensors"

    def states(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.folder.glob("state-*.safetensors"))

    @by_the_first
    def save(self, prune: bool = True) -> None:
        """The whole state in one safetensors file; older ones go once it is safely on disk."""
        tensors = {f"walk.{k}": v for k, v in self.walk.items()}
        for name, module in self.modules():
            tensors |= {name + k: v for k, v in module.state_dict().items()}
        state = {"stage": self.stage, "update": self.update, "recent": self.recent,
                 "base_hash": self.base_hash, "config": asdict(self.config),
                 "data": self.data.identity, "origin": self.origin}
        path = self.folder / self.state_name()
        ppdd.save_tensors(path, tensors | ppdd.optimizer_tensors(self.optimizer),
                          {"state": json.dumps(state)})
        sync(path)
        for old in self.states()[:-self.config.keep] if prune else ():
            old.unlink()

    def load(self) -> None:
        """Go on from the last checkpoint that is whole."""
        for path in reversed(self.states()):
            try:
                with safe_open(path, framework="pt") as opened:
                    state = json.loads(opened.metadata()["state"])
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}
                break
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                print(f"{path} is damaged ({error}): going back to the one before")
                wait()                                           # until the others have read it too
                if rank() == 0:
                    path.rename(path.with_suffix(".damaged"))
        else:
            raise BadInput(f"no checkpoint in {self.folder} is whole, all are damaged: "
                           "begin anew without --resume")
        self.refuse_other_settings(state)
        self.stage, self.update = state["stage"], state["update"]
        self.origin = state.get("origin", {})
        self.recent = [tuple(entry) for entry in state["recent"]]
        self.walk = {k.removeprefix("walk."): v.to(self.device) for k, v in tensors.items()
                     if k.startswith("walk.")}
        if self.walk:
            self.walk["row"] %= len(self.data)                          # it may have shrunk since
        for name, module in self.modules():
            module.load_state_dict({k.removeprefix(name): v for k, v in tensors.items()
                                    if k.startswith(name)})
        ppdd.load_optimizer(self.optimizer, tensors)
        self.trim_log()

    @by_the_first
    def trim_log(self) -> None:
        """Drops log lines written after the state that the run goes on from."""
        log = self.folder / "log.jsonl"
        if log.exists():
            entries = [json.loads(line) for line in log.read_text().splitlines()
                       if line.endswith("}")]                          # the last may be half a line
            kept = [e for e in entries if (e["stage"], e["update"]) <= (self.stage, self.update)]
            with ppdd.written(log) as temporary:
                temporary.write_text("".join(json.dumps(e) + "\n" for e in kept))

    def refuse_other_settings(self, state: dict) -> None:
        free = {"resume", "save_every", "grid_every", "device", "compile", "max_updates", "lr",
                "halving_lr", "updates", "halving_updates", "dtype", "out", "init", "further",
                "weights", "keep", "accumulate", "cache", "checkpointing", "pictures", "run",
                "lora", "data"}                           # what these hold is looked at below
        now, before = json.loads(json.dumps(asdict(self.config))), state["config"]
        changed = [k for k in now if k not in free and before.get(k) != now[k]]
        if changed:
            raise BadInput(f"{self.folder} was begun with another {', '.join(changed)}: "
                           "give the same, or another --run")
        if state["base_hash"] != self.base_hash:
            raise BadInput(f"{self.folder} was begun on another base than {self.base.path}: "
                           "give the same --weights, or another --run")
        other = state["data"] != self.data.identity
        if other and now["data"] != before["data"]:
            raise BadInput(f"{self.folder} was begun with other --data: give the same, or another "
                           "--run")
        if other and not self.config.data:
            raise BadInput(f"{self.folder} was begun with other postcards ({state['data']}): give "
                           "--pictures and --max-updates as then")
        if other:
            tqdm.write("the data is not what it was: the run goes on with what is there now")


# ------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """Answers bad input with one sentence, without its usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def parse(argv: list[str] | None = None) -> Config:
    """The command line, one flag a field of `Config`."""
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0])
    for f in fields(Config):
        flag, more = "--" + f.name.replace("_", "-"), dict(f.metadata)
        more["help"] += "" if f.default in ("", False, ()) else " (%(default)s)"
        if isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true", **more)
        elif f.default == ():
            parser.add_argument(flag, nargs="+", action="extend", default=[], **more)
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, type=float, nargs=2, metavar=("LOW", "HIGH"),
                                default=f.default, **more)
        else:
            parser.add_argument(flag, type=type(f.default), default=f.default, **more)
    given = vars(parser.parse_args(argv))
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def prepare(config: Config) -> Run:
    """Load the base and the data, and stand where the run stopped, or at its beginning."""
    check(config)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = ppdd.find_weights(config.weights)
    base = ppdd.load_base(path, device=device)
    merged = ppdd.merge_loras(base, config.lora)
    config = complete(config, base)
    if rank() == 0:
        print(ppdd.say_base(path, config.weights), *merged, sep="\n")
    unfinished = any(Path(config.run).glob("state-*.safetensors"))
    if config.resume and not unfinished:
        raise BadInput(f"{config.run} holds no unfinished run: leave out --resume")
    if unfinished and not config.resume:
        raise BadInput(f"{config.run} holds an unfinished run: go on with --resume, "
                       "or give another --run")
    for folder in (config.run, config.out, *[config.cache] * bool(config.cache)):
        check_writable(Path(folder))
    held = lock(Path(config.run)) if rank() == 0 else None
    try:
        run = begin(config, base)
    except BaseException:
        if held:
            held.close()
        raise
    run.held = held
    return run


def begin(config: Config, base: Base) -> Run:
    """The run itself, its folder being this process's own."""
    data = load_data(config, base)
    if not data.pictured:
        config = replace(config, trajectories=1.0)
        if rank() == 0:
            print(f"{len(data)} prompts without pictures: training on what the base itself paints")
    if config.checkpointing:
        for block in base.unet.output_blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if config.compile:
        base.unet.encode = torch.compile(base.unet.encode)
        base.unet.decode = torch.compile(base.unet.decode)
    run = Run(config, base, data)
    if config.resume:
        run.load()
    elif config.init:
        run.start_from(Path(config.init))
    if rank() == 0 and not config.resume:
        with suppress(FileNotFoundError):
            (run.folder / "log.jsonl").replace(run.folder / "log.old.jsonl")
    wait()                             # some take longer to come here than a gather's minute
    return run


def load_data(config: Config, base: Base) -> Postcards | Pictures:
    mini = base.unet.config.model_channels < 256
    if not config.data and not mini:
        raise BadInput(f"--data is needed with {base.name}: {DATA}; or train on the miniature with "
                       "--weights mini")
    if not config.data:
        return Postcards(base, config.pictures, config.seed)
    size = postcards.SIZE if mini else config.size
    data = (Cached(base, config.data, size, config.cache) if config.cache else
            Pictures(base, config.data, size))
    if data.pictured < len(data) and data.pictured and not config.trajectories:
        raise BadInput("--data holds prompts without pictures beside pictures: give "
                       "--trajectories above 0, or those prompts would never be used")
    return data


def main(argv: list[str] | None = None) -> None:
    ppdd.print_any_name()
    config, run = parse(argv), None
    warnings.simplefilter("error", Image.DecompressionBombWarning)       # such a picture is skipped
    try:
        with together(config) as config:
            run = prepare(config)
            run.train()
    except KeyboardInterrupt:
        if rank() == 0:
            print(f"train.py: {stopped(run, argv)}", file=sys.stderr)
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as error:
        if not ppdd.out_of_memory(error):
            raise
        print(f"train.py: out of memory: lower --batch (now {config.batch}) or --size, raise "
              f"--accumulate (now {config.accumulate}), or add --checkpointing, --cache or "
              "--dtype bf16", file=sys.stderr)
        raise SystemExit(2) from None
    except (BadInput, CheckpointError, ImportError, OSError, SafetensorError,
            sqlite3.Error) as error:
        where = f"train.py, process {rank()}" if world() > 1 else "train.py"
        room = " in the index of --data: make room for temporary files, or set SQLITE_TMPDIR"
        print(f"{where}: {error}{room * isinstance(error, sqlite3.Error)}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if run and run.held:
            run.held.close()


def stopped(run: Run | None, argv: list[str] | None) -> str:
    """What to say on Ctrl-C: where the run stands, and how to go on."""
    states = run.states() if run else []
    given = sys.argv[1:] if argv is None else argv
    words = [w for w in given if w != "--resume"]
    words += ["--resume"] * bool(states or "--resume" in given)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    # Without -- torchrun takes --run for an abbreviation of a flag of its own.
    start = ["torchrun", f"--nproc_per_node={here}", "--"] if world() > 1 else ["python"]
    more = " (and torchrun's other flags as before, on every node)" * (here < world())
    return (f"stopped{f', saved in {states[-1]}' if states else ''}; go on with: "
            f"{shlex.join([*start, 'train.py', *words])}{more}")


if __name__ == "__main__":
    main()
