"""Training data: captioned images, read while the network trains or encoded once into a cache.

Shapes: B images, H and W the sides of their latents, Z latent channels, L tokens, D their width.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import math
import os
import random
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.base import Base
from support.captions import (
    DATA_FORMS,
    Example,
    ExampleIndex,
    LeftOut,
    notes_on,
    read_examples,
    why,
)
from support.cli import BadInput, one_line, require
from support.distributed import barrier, print_once, rank, world_size
from support.files import save_tensors, sync
from support.images import fit

WORKERS = 4             # processes that decode images for one GPU; 4 decode some 300 a second
MAX_BYTES = 2**28       # of an image's file; what is larger is no image that anyone trains on
ENCODE_BATCH = 8        # images the VAE encodes at once: each takes much memory at 512 pixels
LOOKED_AT = 1000        # captions that are tokenized at the start to see how many are cut


# ------------------------------------------------------------------------------- one image

def square(file: BinaryIO, size: int) -> Tensor:
    """(3, size, size) uint8: upright, on white, the middle cut out and resized."""
    image = Image.open(file)
    image.draft(None, (2 * size, 2 * size))               # a large JPEG need not be read in full
    return fit(image, size, size)


def read_image(example: Example, size: int) -> Tensor:
    """(3, size, size) uint8. Damaged files raise whatever their decoder does."""
    with open(example.file, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        length = os.fstat(file.fileno()).st_size if example.length < 0 else example.length
        if length > MAX_BYTES:
            raise ValueError(f"{length:,} bytes are too many")
        file.seek(example.start)
        return square(io.BytesIO(file.read(length)), size)


def stand_ins(row: int, count: int) -> Iterator[int]:
    """A row, then those that stand in for it, in turn, where its image can't be used.

    The row alone decides which: neither a resumed run nor the number of processes changes them.
    """
    yield row
    rng = random.Random(row)
    yield from (rng.randrange(count) for _ in range(100))


def file_stamp(file: str) -> tuple:
    """A file's name, size and time of change, which tell that it is still the same. Raises OSError
    where there is none, and ValueError for a name that no file can have."""
    stat = os.stat(file)
    return os.path.basename(file), stat.st_size, stat.st_mtime_ns


# ------------------------------------------------------------------------------- images as they are

class CaptionedImages(Dataset):
    """The captioned images of every --data, and after them prompts without an image.

    base: its VAE and text encoder encode them. size: side in pixels, to which images are cut.
    Row r has an image where r < image_count. `side` is the latents' side, `identity` a hash of all
    names, captions, sizes and times of files. `left_out` counts what was no example; `skipped` has
    the name of an image that was one but can't be used, and what is wrong, by row. Prints how many
    examples there are. Raises BadInput where there is nothing to train on.
    """

    def __init__(self, base: Base, given: Sequence[str], size: int):
        self.base = base
        self.size = size
        self.side = size // 8
        self.image_count = self.empty = 0
        self.skipped: dict[int, tuple[str, str]] = {}
        self.left_out = LeftOut()
        self.index = ExampleIndex()
        self.identity = self._fill_index(given)
        left = self.left_out.summary("left out")
        require((not len(self), f"--data {' '.join(given)} holds no image with a caption and no "
                                f"prompt{f' ({left})' * bool(left)}: {DATA_FORMS}"))
        if self.image_count:
            self.usable(0)                      # where no image can be used, it says so now
        print_once(*self.notes())

    def notes(self) -> list[str]:
        """How many examples are used, what was left out, and what the captions lose: of a sample,
        since tokenizing a million would take many minutes."""
        left = self.left_out.summary("left out") or "none left out"
        empty = f"; {self.empty:,} of them with an empty caption" if self.empty else ""
        rows = range(0, len(self), math.ceil(len(self) / LOOKED_AT))
        noun = "caption" if len(rows) == len(self) else "sampled caption"
        return [one_line(f"--data: {len(self):,} used{empty}; {left}"),
                *notes_on(self.captions(rows), self.base.tokenizer, noun)]

    def _fill_index(self, given: Sequence[str]) -> str:
        digest = hashlib.sha256()
        stamp = functools.lru_cache(64)(file_stamp)           # a shard's is wanted for each image
        examples = read_examples(given, self.left_out.add)
        for example in tqdm(examples, "reading names", leave=False):
            try:
                stamped = stamp(example.file) if example.file else ("",)
            except (OSError, ValueError) as error:
                self.left_out.add(example.file, f"without a file: {why(error)}")
                continue
            digest.update(repr((stamped, *example[1:])).encode())
            self.index.append(example)
            self.image_count += example.file != ""
            self.empty += not example.caption
        self.index.flush()
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.index)

    # -- captions

    def captions(self, rows: Iterable[int]) -> list[str]:
        """The captions, or prompts, of these rows."""
        return [self.index[row].caption for row in rows]

    def example_prompts(self, count: int) -> list[str]:
        """Prompts for the images that show how far the guide is."""
        return self.captions(range(min(count, len(self))))

    def prompt_states(self, rows: Iterable[int]) -> Tensor:
        """(B, L, D) float32: what the text encoder says of these rows' captions."""
        return self.base.embed(self.captions(rows))

    # -- images

    def batches(self, row_lists: Iterable[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """For each list, in order: the rows used and, stacked, what `moments` encodes of them.

        A row whose image can't be used is replaced by its stand-in. An empty list gives an empty
        tensor. With a GPU, processes load some lists ahead, so `row_lists` is read ahead too.
        Raises BadInput where no image can be used.
        """
        workers = worker_count(self.base.device)
        loader = DataLoader(
            self, batch_sampler=row_lists, collate_fn=_unchanged, worker_init_fn=_begin_worker,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # they share the index's files
            pin_memory=self.base.device.type == "cuda",  # its thread receives while the GPU works
            generator=torch.Generator())        # else a draw of torch's own generator is used up
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            rows, images, skipped = batch
            self.skipped |= skipped
            yield rows, torch.from_numpy(images)

    def __getitems__(self, rows: list[int]) -> tuple[list[int], np.ndarray, dict] | Exception:
        """A batch as a worker process sends it: rows used, images, and what it had to skip.

        An array, not a tensor: those go through /dev/shm, of which a container has 64 MB. An error
        is returned, since DataLoader would raise it with a traceback in its message.
        """
        known = len(self.skipped)
        try:
            found = [self.usable(row) for row in rows]
        except (BadInput, OSError, SafetensorError) as error:
            return error
        images = torch.stack([image for _, image in found]) if found else torch.empty(0)
        skipped = dict(itertools.islice(self.skipped.items(), known, None))
        return [row for row, _ in found], images.numpy(), skipped

    def usable(self, row: int) -> tuple[int, Tensor]:
        """A row and its image, or those of the first stand-in whose image can be used."""
        for stand_in in stand_ins(row, self.image_count):
            if (image := self.load(stand_in)) is not None:
                return stand_in, image
        raise BadInput(f"--data: no image could be used{self.skipped_summary()}")

    def load(self, row: int) -> Tensor | None:
        """(3, size, size) uint8; None, and noted in `skipped`, where it can't be used."""
        if row in self.skipped:
            return None
        example = self.index[row]
        try:
            return read_image(example, self.size)
        except UnidentifiedImageError:                  # names a buffer, not the file
            self.skipped[row] = example.file, "not an image that Pillow reads"
        except Exception as error:                      # on damaged files decoders raise anything
            self.skipped[row] = example.file, why(error)
        return None

    def moments(self, images: Tensor) -> Tensor:
        """(B, 2 Z, H, W) float32, mean and log-variance of the latents, unscaled, of images (B, 3,
        8 H, 8 W) uint8 from `batches`. Sampling and scaling them is left to `VAE.sample`."""
        parts = [self.base.vae.encode(part.to(self.base.device).float() / 127.5 - 1)
                 for part in images.split(ENCODE_BATCH)]
        return torch.cat(parts)

    def skipped_summary(self) -> str:
        """" (3 skipped: …)": images that can't be used, by what is wrong; "" where none are."""
        summary = LeftOut(self.skipped.values()).summary("skipped")
        return f" ({summary})" * bool(summary)


def worker_count(device: torch.device) -> int:
    """How many processes load images ahead: none on a CPU, where the network needs every core."""
    return min(WORKERS, len(os.sched_getaffinity(0))) if device.type == "cuda" else 0


def _unchanged(batch):
    return batch


def _begin_worker(number: int) -> None:
    # A terminal sends Ctrl-C, and a cluster SIGTERM, to every process. The main one then ends its
    # update, needs images for that, and has the workers end; they end by themselves if it is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ------------------------------------------------------------------------------- encoded once

class CachedImages(CaptionedImages):
    """Captioned images whose moments and text states lie on disk, fp16, in shards of 512 rows.

    They are encoded once, in float32, into a folder of their own in `cache` for each VAE, text
    encoder, size and set of files. A shard is written whole or not at all, so a run that was
    killed goes on with the next one.
    """

    SHARD = 512
    good: Tensor | None = None                  # (image_count,) whether a row's image can be used

    def __init__(self, base: Base, given: Sequence[str], size: int, cache: str | Path):
        super().__init__(base, given, size)
        require((not self.image_count,
                 "--cache is for images, and --data holds prompts only: leave it out"))
        self.folder = Path(cache) / self._key()[:16]
        self.shard = functools.lru_cache(64)(self.open_shard)
        numbers = range(math.ceil(self.image_count / self.SHARD))
        self._encode_missing(numbers[rank()::world_size()])
        barrier()
        self.good = torch.cat([self.open_shard(i).get_tensor("good") for i in numbers])
        for row in (~self.good).nonzero().flatten().tolist():
            self.skipped.setdefault(row, (self.index[row].file, "not usable when cached"))
        if self.skipped:
            print_once(f"--cache: {self.good.sum():,} images cached{self.skipped_summary()}")

    def _key(self) -> str:
        """A hash of all that decides what the cache holds."""
        digest = hashlib.sha256()
        weights = self.base.vae.state_dict(), self.base.text.state_dict()
        for name, tensor in itertools.chain(*(state.items() for state in weights)):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        # 1: the version of `square`, to be raised when it gives other pixels
        digest.update(f"1 {self.SHARD} {self.size} {self.identity}".encode())
        return digest.hexdigest()

    def open_shard(self, number: int) -> safe_open:
        return safe_open(self.folder / f"{number:06d}.safetensors", framework="pt")

    def _is_missing(self, number: int) -> bool:
        try:
            self.open_shard(number)
        except (SafetensorError, OSError):
            return True
        return False

    def _row_lists(self, number: int) -> list[list[int]]:
        rows = range(number * self.SHARD, min((number + 1) * self.SHARD, self.image_count))
        return [list(rows[i:i + ENCODE_BATCH]) for i in range(0, len(rows), ENCODE_BATCH)]

    def _encode_missing(self, numbers: Sequence[int]) -> None:
        missing = [number for number in numbers if self._is_missing(number)]
        loaded = self.batches(rows for number in missing for rows in self._row_lists(number))
        for number in tqdm(missing, f"caching in {self.folder}", leave=False, disable=rank() > 0):
            self.encode_shard(number, loaded)

    @torch.no_grad()
    def encode_shard(self, number: int, loaded: Iterator[tuple[list[int], Tensor]]) -> None:
        """Writes one shard: moments, text states, and whether the row's own image was used."""
        parts: list[tuple[Tensor, ...]] = []
        for rows, (used, images) in zip(self._row_lists(number), loaded):
            good = torch.tensor(rows) == torch.tensor(used)
            parts.append((super().moments(images), super().prompt_states(rows), good))
        moments, states, good = (torch.cat(column).cpu() for column in zip(*parts))
        path = self.folder / f"{number:06d}.safetensors"
        save_tensors(path, {"moments": moments.half(), "states": states.half(), "good": good})
        sync(path)

    def _read(self, name: str, row: int) -> Tensor:
        number, place = divmod(row, self.SHARD)
        return self.shard(number).get_slice(name)[place:place + 1].float()

    def load(self, row: int) -> Tensor | None:
        """A row's moments (2 Z, H, W), float32; its image while the cache is being made."""
        if self.good is None:
            return super().load(row)
        return self._read("moments", row)[0] if self.good[row] else None

    def moments(self, images: Tensor) -> Tensor:
        """(B, 2 Z, H, W) float32 from `batches`, which gives moments already."""
        return images.to(self.base.device)

    def prompt_states(self, rows: Iterable[int]) -> Tensor:
        """(B, L, D) float32, from the cache; those of prompts without an image are not in it."""
        return torch.cat([
            self._read("states", row).to(self.base.device) if row < self.image_count
            else super(CachedImages, self).prompt_states([row]) for row in rows])
