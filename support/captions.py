"""Captioned images and prompts, in the layouts people keep them in.

    FOLDER              x.jpg beside x.txt or x.caption, at any depth; or a metadata file; or shards
    metadata.jsonl      or .csv: a row an image, with `file_name` and `text`
    00000.tar           img2dataset's shards, key.jpg and key.txt; also shards/{00000..00012}.tar
    captions.json       COCO's; its images are in a folder beside it, or captions.json:FOLDER
    prompts.txt         a prompt a line, without images

`read_examples` reads any of them for training, into an `ExampleIndex`; `read_prompts` reads prompts
alone, for sampling and for scores.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import random
import re
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from support.cli import BadInput, require
from support.files import expand

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")             # {00000..00012} in the name of shards
LONGEST = 2000                           # characters of a caption that are read; 77 tokens are used
DATA_FORMS = ("give a folder of images with .txt captions or with metadata.jsonl, tar shards, "
              "COCO's captions.json:FOLDER, or a text file of prompts")


class Example(NamedTuple):
    """An image and its caption. A prompt without an image has no file."""

    file: str
    start: int                  # the image's first byte in the file: a shard holds many
    length: int                 # its number of bytes; -1: the whole file
    caption: str


Skip = Callable[[str, Exception], None]      # called with a file that can't be read, and the reason
Reader = Callable[[str, Skip], Iterator[Example]]


# ------------------------------------------------------------------------------- for training

def read_examples(given: Sequence[str], skip: Skip) -> Iterator[Example]:
    """Every example of every --data, one at a time; prompts without images come last.

    Only names and captions are read, not the images. Raises BadInput where a --data is none of
    the layouts above.
    """
    sources = [(_find_reader(path), path) for path in map(os.path.expanduser, given)]
    sources.sort(key=lambda source: source[0] is _read_prompt_lines)
    for read, path in sources:
        for example in read(path, skip):
            caption = example.caption.strip()[:LONGEST]
            yield example._replace(caption=caption.encode(errors="replace").decode())


def _find_reader(given: str) -> Reader:
    """The one of the readers below that understands this --data."""
    path = Path(given)
    if path.is_dir():
        return _read_folder
    if path.suffix.lower() in (".jsonl", ".csv") and path.is_file():
        return _read_metadata
    if path.suffix == ".json" or ".json:" in given:
        return _read_coco_images
    if path.is_file():
        return _read_shard if path.suffix == ".tar" else _read_prompt_lines
    if NUMBERS.search(given) or re.search(r"[*?\[]", given):
        return _read_shards
    raise BadInput(f"--data {given} does not exist: {DATA_FORMS}")


def _read_folder(folder: str, skip: Skip) -> Iterator[Example]:
    seen: set[str] = set()
    for root, subfolders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:                   # links may form a circle
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        metadata = next((name for name in METADATA_NAMES if name in names), None)
        if metadata:                                   # it names the images of its subfolders too
            subfolders.clear()
            yield from _read_metadata(f"{root}/{metadata}", skip)
        present = set(names)
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            captions = [stem + s for s in CAPTION_SUFFIXES if stem + s in present]
            if suffix == ".tar":
                yield from _read_shard(f"{root}/{name}", skip)
            elif suffix.lower() in IMAGE_SUFFIXES and captions and not metadata:
                with open(f"{root}/{captions[0]}", "rb") as file:
                    yield Example(f"{root}/{name}", 0, -1, _decode(file.read(LONGEST)))


def _decode(caption: bytes) -> str:
    return caption.decode("utf-8-sig", errors="replace")


def _read_metadata(file: str, skip: Skip) -> Iterator[Example]:
    """A .jsonl or .csv; its file names start at its own folder."""
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        try:
            rows = (_csv_rows(lines, file) if file.lower().endswith(".csv") else
                    (json.loads(line) for line in lines if line.strip()))
            for row in rows:
                yield Example(str(Path(file).parent / row["file_name"]), 0, -1, "" + row["text"])
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise BadInput(f"--data {file}: a row can't be used ({error!r}): each needs file_name "
                           "and text") from error


def _read_shard(file: str, skip: Skip) -> Iterator[Example]:
    """Reads headers and captions only. A damaged shard gives what is whole before the damage."""
    halves: dict[str, dict[str, object]] = {}           # of examples whose other half is to come
    try:
        with tarfile.open(file, "r:") as shard:
            while member := shard.next():
                shard.members.clear()                   # tarfile would keep every header in memory
                key, suffix = os.path.splitext(member.name if member.isfile() else "")
                half = halves.setdefault(key, {})
                if suffix.lower() in IMAGE_SUFFIXES:
                    half["image"] = member.offset_data, member.size
                elif suffix in CAPTION_SUFFIXES:
                    half["caption"] = _decode(shard.extractfile(member).read(LONGEST))
                if len(half) == 2:
                    yield Example(file, *half["image"], half["caption"])
                if len(half) != 1:
                    del halves[key]
    except (tarfile.TarError, OSError) as error:
        skip(file, error)


def _read_shards(pattern: str, skip: Skip) -> Iterator[Example]:
    """Every shard of a pattern: shards/{00000..00012}.tar, shards/*.tar."""
    if numbers := NUMBERS.search(pattern):
        first, last = numbers.groups()
        files = (f"{pattern[:numbers.start()]}{i:0{len(first)}d}{pattern[numbers.end():]}"
                 for i in range(int(first), int(last) + 1))
    else:
        files = sorted(glob.glob(pattern, recursive=True))
    for file in files:
        yield from _read_shard(file, skip)


def _read_coco_images(given: str, skip: Skip) -> Iterator[Example]:
    """An example a caption. The images of captions_SPLIT.json are in the FOLDER given, else beside
    the file, in a folder SPLIT there, or in one beside the file's folder, as COCO unpacks."""
    name, _, folder = given.partition(".json:")
    path = Path(name + ".json" if folder else given)
    captions = _read_coco(path, "--data", _file_names)
    split = path.stem.split("_")[-1]
    places = [Path(folder)] if folder else [path.parent, path.parent / split,
                                            path.parent.parent / split]
    root = next((place for place in places
                 for name, _ in captions[:9] if (place / name).is_file()), None)
    require((root is None, f"--data {path}: its images are not in {places[-1]}: "
                           f"give --data {path}:FOLDER"))
    for name, caption in captions:
        yield Example(str(root / name), 0, -1, caption)


def _read_prompt_lines(file: str, skip: Skip) -> Iterator[Example]:
    """Prompts without images: training then follows the base's own sampling."""
    if Path(file).suffix.lower() in (".tsv", ".parquet"):
        raise BadInput(f"--data {file} is a table, not a list of prompts: {DATA_FORMS}")
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            require(("\0" in line, f"--data {file} is not text: {DATA_FORMS}"))
            if line.strip():
                yield Example("", 0, 0, line)


# ------------------------------------------------------------------------------- the index

class ExampleIndex:
    """Examples by row, on disk: one temporary file of JSON lines, one of their int64 offsets.

    So memory does not grow with the data. The files have no names and vanish with the process,
    however that ends. Worker processes share them: pread leaves the position of a file alone.
    """

    def __init__(self):
        with _writing_index():
            self._lines = tempfile.TemporaryFile()
            self._offsets = tempfile.TemporaryFile()
            self._offsets.write(struct.pack("q", 0))
        self._count = self._end = 0

    def append(self, example: Example) -> None:
        with _writing_index():
            self._end += self._lines.write(json.dumps(example).encode() + b"\n")
            self._offsets.write(struct.pack("q", self._end))
        self._count += 1

    def flush(self) -> None:
        """Must follow the last `append`: until then, rows can't be read."""
        with _writing_index():
            self._lines.flush()
            self._offsets.flush()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Example:
        start, end = struct.unpack("qq", os.pread(self._offsets.fileno(), 16, 8 * row))
        return Example(*json.loads(os.pread(self._lines.fileno(), end - start, start)))


@contextmanager
def _writing_index() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"the index of --data can't be written ({error}): make room for temporary "
                       "files, or set TMPDIR to a folder with room") from error


# ------------------------------------------------------------------------------- prompts alone

def read_prompts(path: str | Path, count: int = 0, seed: int = 0) -> list[str]:
    """The prompts of a file, or `count` of them drawn by seed, in the file's order.

    A text has one a line. COCO's captions .json give one caption an image, chosen by seed, in the
    order of image ids. The first line of a .tsv or .csv names a column `caption`, `text` or
    `prompt`. Blank prompts are left out, and white space becomes single spaces. Raises BadInput.
    """
    path = expand(path)
    require((path.is_char_device(), f"--prompts {path}: a device, not a file"))
    try:
        texts = _prompt_texts(path, random.Random(seed))
    except UnicodeDecodeError:
        raise BadInput(f"--prompts {path}: not a UTF-8 text") from None
    except FileNotFoundError:
        raise BadInput(f"--prompts {path}: there is no such file") from None
    prompts = [prompt for prompt in (" ".join(text.split()) for text in texts) if prompt]
    require(
        (not prompts, f"--prompts {path}: there is no prompt in it; write one a line"),
        (count > len(prompts), f"--count {count}: {path} holds {len(prompts)} prompts only"))
    rows = sorted(random.Random(seed).sample(range(len(prompts)), count or len(prompts)))
    return [prompts[row] for row in rows]


def _prompt_texts(path: Path, rng: random.Random) -> list[str]:
    if path.suffix.lower() == ".json":
        by_image: dict[object, list[str]] = {}
        for image, caption in _read_coco(path, "--prompts", _image_ids):
            by_image.setdefault(image, []).append(caption)
        return [rng.choice(captions) for captions in by_image.values()]
    with path.open(encoding="utf-8-sig") as lines:
        if path.suffix.lower() in (".csv", ".tsv"):
            return _caption_column(lines, path)
        return list(lines)


def _caption_column(lines: Iterable[str], path: Path) -> list[str]:
    try:
        rows = _csv_rows(lines, path.name)
        column = next((c for c in ("caption", "text", "prompt") if c in rows.fieldnames), None)
        require((column is None, f"--prompts {path}: no column is called caption, text or prompt; "
                                 "name the one that is in the first line"))
        return [row[column] or "" for row in rows]
    except csv.Error as error:
        raise BadInput(f"--prompts {path}: a table that can't be read ({error})") from None


# ------------------------------------------------------------------------------- tables, COCO

def _csv_rows(lines: Iterable[str], name: str) -> csv.DictReader:
    """Rows of a .csv or .tsv by column, its name in lower case."""
    if name.lower().endswith(".tsv"):            # where quotation marks are part of the text
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.DictReader(lines)
    rows.fieldnames = [column.strip().lower() for column in rows.fieldnames or ()]
    return rows


def _read_coco(path: Path, flag: str, pairs: Callable[[dict], list]) -> list[tuple]:
    """(image, caption) of each of COCO's captions, as one of the two functions below pairs them."""
    try:
        return pairs(json.loads(path.read_bytes()))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{flag} {path}: no captions as in COCO's captions_val2014.json "
                       f"({type(error).__name__}: {error})") from None


def _file_names(coco: dict) -> list[tuple[str, str]]:
    """(file name, caption), in the file's order."""
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    return [(names[a["image_id"]], "" + a["caption"]) for a in coco["annotations"]]


def _image_ids(coco: dict) -> list[tuple[int, str]]:
    """(image id, caption), in the order of image ids, then of caption ids."""
    annotations = sorted(coco["annotations"], key=itemgetter("image_id", "id"))
    return [(a["image_id"], "" + a["caption"]) for a in annotations]
