"""Folders of images: which files there are, in which order, and their pixels in batches."""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from support.cli import BadInput
from support.files import expand
from support.images import to_rgb

DECODERS = 4                    # threads: decoding a 512 × 512 PNG takes longer than its features
BATCHES_AHEAD = 3               # decoded before they are asked for; more would only cost memory
CONTACT_SHEET = re.compile(r"(grid|compare)(-\d+)?\.png")


def image_files(folder: str | Path) -> list[Path]:
    """The images below a folder, in natural order: "9.png" before "10.png".

    Contact sheets of sample.py are left out: they hold every image a second time. Raises BadInput
    where there is no image, and OSError for a folder that can't be listed.
    """
    folder = expand(folder)
    readable = {suffix for suffix, kind in Image.registered_extensions().items()
                if kind in Image.OPEN}
    files = [path for path in _files_below(folder)
             if path.suffix.lower() in readable and path.is_file()
             and not path.name.startswith(".") and not _is_contact_sheet(path)]
    if not files:
        raise BadInput(f"{folder}: there are no images in it")
    return sorted(files, key=lambda path: _natural_key(str(path.relative_to(folder))))


def _files_below(folder: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error

    try:
        for root, _, names in os.walk(folder, onerror=stop):
            yield from (Path(root, name) for name in names)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{folder}: there is no such folder") from None


def _natural_key(name: str) -> tuple:
    """A sort key by which numbers in names count as numbers, and come before letters."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], name


def _is_contact_sheet(path: Path) -> bool:
    # The name alone decides nothing: somebody's own image may be called grid.png.
    if not CONTACT_SHEET.fullmatch(path.name):
        return False
    try:
        with Image.open(path) as image:
            return "ppdd" in image.info and "sheet" in image.info
    except OSError:
        return False


def read_image(path: Path) -> Tensor | None:
    """(3, H, W) uint8, as it is seen; None for a file that can't be read."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
    except Exception:           # Pillow's decoders raise anything for a damaged file
        return None


def images_in(folder: str | Path, batch: int, skip_bad: bool = False,
              advice: str = "take them out, or pass --skip-bad"
              ) -> Iterator[tuple[list[Path], Tensor]]:
    """Paths and images (B, 3, H, W) uint8 of a folder, in natural order, B at most `batch`.

    Neighbours of one size share a batch. Files that can't be read are named and counted at the
    end: on stderr with skip_bad, else in a BadInput that ends in `advice`. After the first of
    them nothing is yielded any more, but the rest is still checked, so that one run names all.
    """
    files = image_files(folder)
    bad: list[Path] = []
    for decoded in _decoded(files, batch):
        bad += [path for path, image in decoded if image is None]
        if bad and not skip_bad:
            continue
        good = [(path, image) for path, image in decoded if image is not None]
        for _, same_size in groupby(good, key=lambda item: item[1].shape):
            paths, images = zip(*same_size)
            yield list(paths), torch.stack(images)
    _report_bad(bad, len(files), skip_bad, advice)


def _decoded(files: list[Path], batch: int) -> Iterator[list[tuple[Path, Tensor | None]]]:
    """Batches of files with their images, while the next few are being decoded."""
    ahead: deque = deque()
    with ThreadPoolExecutor(DECODERS) as pool:
        for start in range(0, len(files), batch):
            part = files[start:start + batch]
            ahead.append(zip(part, pool.map(read_image, part)))        # map starts at once
            if len(ahead) > BATCHES_AHEAD:
                yield list(ahead.popleft())
        while ahead:
            yield list(ahead.popleft())


def _report_bad(bad: list[Path], total: int, skip_bad: bool, advice: str) -> None:
    if not bad:
        return
    message = f"{len(bad)} of {total} images can't be read: {_names(bad)}"
    if not skip_bad or len(bad) == total:
        raise BadInput(f"{message}; {advice}")
    print(f"warning: {message}; left out", file=sys.stderr)


def _names(files: list[Path]) -> str:
    denied = " (permission denied)"
    names = [f"{path}{'' if os.access(path, os.R_OK) else denied}" for path in files[:10]]
    return ", ".join(names + ["…"] * (len(files) > 10))


def has_miniature_size(folder: str | Path) -> bool:
    """Whether a folder's first image is 64 × 64, as the miniature's are; its CLIP then reads them.

    Raises BadInput where no image can be read.
    """
    files = image_files(folder)
    first = next((image for image in map(read_image, files) if image is not None), None)
    if first is None:
        raise BadInput(f"{folder}: none of its {len(files)} images can be read: {_names(files)}")
    return first.shape[1:] == (64, 64)
