"""Captioned images and prompts, in the layouts people keep them in.

    FOLDER              x.jpg beside x.txt or x.caption, at any depth; or a metadata file; or shards
    metadata.jsonl      or .csv, .tsv: a row an image, with `file_name`, and `text`, `caption` or
                        `prompt`; in .jsonl that may be a list
    00000.tar           img2dataset's shards, key.jpg and key.txt; also shards/{00000..00012}.tar
    captions.json       COCO's; its images are in a folder beside it, or captions.json:FOLDER
    prompts.txt         a prompt a line, without images

An image with several captions is as many examples: training draws one of them. Texts are UTF-8, or
UTF-16 with a byte-order mark. `read_examples` reads any of these for training, into an
`ExampleIndex`, and names what it leaves out; `read_prompts` reads prompts alone, for sampling and
for scores; `notes_on` says what prompts lose.
"""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import os
import random
import re
import struct
import tarfile
import tempfile
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from clip_text import END, LENGTH, Tokenizer
from support.cli import BadInput, require
from support.files import expand

UNREAD_SUFFIXES = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".exr")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
                  ".jfif", ".jpe", *UNREAD_SUFFIXES)
CAPTION_SUFFIXES = (".caption", ".txt")                 # of two captions, the .txt is read
SHARD_SUFFIXES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")    # read: the first alone
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("caption", "text", "prompt")
NO_CAPTION, NO_IMAGE = "without a caption", "without an image"
NO_TEXT = "with a caption that is not text in UTF-8, or in UTF-16 with a byte-order mark"
UNREAD = f"in a format that is not read: {', '.join(UNREAD_SUFFIXES)}"
UNLISTED = "that can't be listed: "
PACKED = "compressed: unpack first, since images are read where they lie in a plain .tar"
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")             # {00000..00012} in the name of shards
LONGEST = 2000                           # characters of a caption that are read; 77 tokens are used
DATA_FORMS = ("give a folder of images with .txt captions or with metadata.jsonl, tar shards, "
              "COCO's captions.json:FOLDER, or a text file of prompts")


class Example(NamedTuple):
    """An image and its caption. A prompt without an image has no file."""

    file: str
    start: int                  # the image's first byte in the file: a shard holds many
    length: int                 # its number of bytes; -1: the whole file
    caption: str                # from a reader: bytes, a list, or whatever stood in its place


Skip = Callable[[str, str], None]            # called with the name of what is left out, and why
Named = Iterator[tuple[str, Example]]        # with the names that messages give them
Reader = Callable[[str, Skip], Named]


class LeftOut:
    """How much was left out for each reason, and the first names. Its size stays flat."""

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()):
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = defaultdict(list)
        for name, reason in pairs:
            self.add(name, reason)

    def add(self, name: str, reason: str) -> None:
        self.counts[reason] += 1
        if len(self.names[reason]) < 3 and name not in self.names[reason]:
            self.names[reason].append(name)

    def summary(self, verb: str) -> str:
        """"3 left out: 2 without a caption (a.png, b.png); 1 …", for verb "left out"; or ""."""
        reasons = [f"{count:,} " * (len(self.counts) > 1) + f"{reason} ({', '.join(names)})"
                   for reason, count in self.counts.most_common() for names in [self.names[reason]]]
        reasons[5:] = [f"{len(reasons) - 5} other reasons"] * (len(reasons) > 5)
        return f"{self.counts.total():,} {verb}: {'; '.join(reasons)}" if reasons else ""


def why(error: Exception) -> str:
    """What an error says, without what differs from file to file: its name, and its (13 bytes)."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return re.sub(r" \(\d[^)]*\)", "", said)


# ------------------------------------------------------------------------------- for training

def read_examples(given: Sequence[str], skip: Skip) -> Iterator[Example]:
    """Every example of every --data, one at a time; prompts without images come last.

    Only names and captions are read, not the images. What can't be used goes to `skip`. Raises
    BadInput where a --data is none of the layouts above.
    """
    sources = [(_find_reader(path), path) for path in map(os.path.expanduser, given)]
    sources.sort(key=lambda source: source[0] is _read_prompt_lines)
    for read, path in sources:
        try:
            for name, example in read(path, skip):
                yield from _examples_of(name, example, skip)
        except UnicodeDecodeError as error:
            raise BadInput(f"--data {path}: a damaged UTF-16 text ({error.reason})") from None


def _examples_of(name: str, example: Example, skip: Skip) -> Iterator[Example]:
    captions = example.caption if isinstance(example.caption, list) else [example.caption]
    for caption in captions or [None]:
        text = _text_of(caption)
        if name.lower().endswith(UNREAD_SUFFIXES):
            skip(name, UNREAD)
        elif text is None:
            skip(name, NO_CAPTION if caption is None else NO_TEXT)
        else:
            yield example._replace(caption=text)


def _text_of(caption: object) -> str | None:
    """A caption as training uses it; None where it is not text."""
    try:
        if isinstance(caption, bytes):
            decoder = codecs.getincrementaldecoder(_encoding(caption))()
            caption = decoder.decode(caption, final=len(caption) < LONGEST)   # or cut in a letter
        caption.encode()                    # fails on the surrogates that `_open_text` leaves
        return None if "\0" in caption else caption.strip()[:LONGEST]
    except (UnicodeError, AttributeError):
        return None


def _encoding(start: bytes) -> str:
    """That of a text that starts so."""
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return "utf-16" if start.startswith(marks) else "utf-8-sig"


def _open_text(path: str | Path, errors: str = "surrogateescape",
               newline: str | None = None) -> TextIO:
    """A text to read. Bytes that are not UTF-8 become surrogates, so their line alone is lost."""
    file = open(path, "rb")
    return io.TextIOWrapper(file, _encoding(file.peek(2)[:2]), errors, newline)


def _find_reader(given: str) -> Reader:
    """The one of the readers below that understands this --data."""
    path = Path(given)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _read_folder
    if suffix in (".jsonl", ".csv", ".tsv") and path.is_file():
        return _read_metadata
    if suffix == ".json" or ".json:" in given:
        return _read_coco_images
    if path.is_file():
        return _read_shard if suffix in SHARD_SUFFIXES else _read_prompt_lines
    if NUMBERS.search(given) or re.search(r"[*?\[]", given):
        return _read_shards
    raise BadInput(f"--data {given} does not exist: {DATA_FORMS}")


def _read_folder(folder: str, skip: Skip) -> Named:
    seen: set[str] = set()
    for root, subfolders, names in os.walk(folder, followlinks=True,
                                           onerror=lambda e: skip(e.filename, UNLISTED + why(e))):
        if (real := os.path.realpath(root)) in seen:                   # links may form a circle
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        metadata = next((name for name in METADATA_NAMES if name in names), None)
        if metadata:                                   # it names the images of its subfolders too
            subfolders.clear()
            yield from _read_metadata(f"{root}/{metadata}", skip)
            names = [name for name in names if name.lower().endswith(SHARD_SUFFIXES)]
        yield from _read_files(root, sorted(names), skip)


def _read_files(root: str, names: list[str], skip: Skip) -> Named:
    """The shards among the files of a folder, and its images, each with the text beside it."""
    captions = {os.path.splitext(name)[0]: f"{root}/{name}"
                for kind in CAPTION_SUFFIXES for name in names if name.lower().endswith(kind)}
    unused = dict(captions)
    for name in names:
        stem, suffix = os.path.splitext(name)
        path = f"{root}/{name}"
        if suffix.lower() in SHARD_SUFFIXES:
            yield from _read_shard(path, skip)
        elif suffix.lower() in IMAGE_SUFFIXES:
            unused.pop(stem, None)
            try:
                yield path, Example(path, 0, -1, _read_caption(captions.get(stem)))
            except OSError as error:
                skip(path, f"with a caption that can't be read: {why(error)}")
    for path in unused.values():
        skip(path, NO_IMAGE)


def _read_caption(path: str | None) -> bytes | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return file.read(LONGEST)


def _read_metadata(file: str, skip: Skip) -> Named:
    """A .jsonl, .csv or .tsv; its file names start at its own folder."""
    with _open_text(file, newline="") as lines:
        try:
            rows = (map(_json_object, filter(str.strip, lines)) if file.lower().endswith(".jsonl")
                    else _csv_rows(lines, file))
            for number, row in enumerate(rows, 1):
                if not isinstance(name := row.get("file_name"), str):
                    skip(f"{file} row {number}", "without a file_name")
                    continue
                name = str(Path(file).parent / name)
                given = [row[c] for c in ("text", *CAPTION_COLUMNS) if row.get(c) is not None]
                yield name, Example(name, 0, -1, given[0] if given else None)
        except csv.Error as error:
            raise BadInput(f"--data {file}: a table that can't be read ({error})") from error


def _json_object(line: str) -> dict:
    """The object on a line; an empty one where it is something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else {}


def _read_shard(file: str, skip: Skip) -> Named:
    """Reads headers and captions only. A damaged shard gives what is whole before the damage."""
    halves: dict[str, dict] = {}                        # of examples whose other half is to come
    try:
        with tarfile.open(file, "r:") as shard:
            while member := shard.next():
                shard.members.clear()                   # tarfile would keep every header in memory
                key, suffix = os.path.splitext(member.name if member.isfile() else "")
                half = halves.setdefault(key, {})
                if suffix.lower() in IMAGE_SUFFIXES:
                    if "image" in half:
                        skip(f"{file}: {half['name']}", NO_CAPTION)
                    half |= {"name": member.name, "image": (member.offset_data, member.size)}
                elif suffix.lower() in CAPTION_SUFFIXES:
                    half["caption"] = shard.extractfile(member).read(LONGEST)
                if len(half) == 3:
                    yield f"{file}: {half['name']}", Example(file, *half["image"], half["caption"])
                if len(half) in (0, 3):
                    del halves[key]
        for key, half in halves.items():
            skip(f"{file}: {half.get('name', key)}", NO_CAPTION if "name" in half else NO_IMAGE)
    except (tarfile.TarError, OSError) as error:
        packed = file.lower().endswith(SHARD_SUFFIXES[1:])
        skip(file, PACKED if packed else f"that can't be read to the end: {why(error)}")


def _read_shards(pattern: str, skip: Skip) -> Named:
    """Every shard of a pattern: shards/{00000..00012}.tar, shards/*.tar."""
    if numbers := NUMBERS.search(pattern):
        first, last = numbers.groups()
        files = (f"{pattern[:numbers.start()]}{i:0{len(first)}d}{pattern[numbers.end():]}"
                 for i in range(int(first), int(last) + 1))
    else:
        files = sorted(glob.glob(pattern, recursive=True))
        if not files:
            skip(pattern, "patterns that match no file")
    for file in files:
        yield from _read_shard(file, skip)


def _read_coco_images(given: str, skip: Skip) -> Named:
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
        yield name, Example(str(root / name), 0, -1, caption)


def _read_prompt_lines(file: str, skip: Skip) -> Named:
    """Prompts without images: training then follows the base's own sampling."""
    if Path(file).suffix.lower() == ".parquet":
        raise BadInput(f"--data {file} is a table, not a list of prompts: {DATA_FORMS}")
    with _open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            require(("\0" in line, f"--data {file} is not text: {DATA_FORMS}"))
            if line.strip():
                yield f"{file} line {number}", Example("", 0, 0, line)


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
        raise BadInput(f"--prompts {path}: not a text in UTF-8, or in UTF-16 with a byte-order "
                       "mark") from None
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
    with _open_text(path, "strict") as lines:
        if path.suffix.lower() in (".csv", ".tsv"):
            return _caption_column(lines, path)
        return list(lines)


def _caption_column(lines: Iterable[str], path: Path) -> list[str]:
    try:
        rows = _csv_rows(lines, path.name)
        column = next((c for c in CAPTION_COLUMNS if c in rows.fieldnames), None)
        require((column is None, f"--prompts {path}: no column is called caption, text or prompt; "
                                 "name the one that is in the first line"))
        return [row[column] or "" for row in rows]
    except csv.Error as error:
        raise BadInput(f"--prompts {path}: a table that can't be read ({error})") from None


# ------------------------------------------------------------------------------- what prompts lose

# What has a meaning in A1111's web UI. AND and BREAK among other capitals are just words.
SYNTAX = re.compile(r"\([^()]+:\s*\d*\.?\d+\s*\)|\[[^][]+\]|<(?:lora|lyco|hypernet):[^<>]*>"
                    r"|(?<![A-Z] )\b(?:AND|BREAK)\b")


def notes_on(prompts: Sequence[str], tokenizer: Tokenizer, noun: str = "prompt") -> list[str]:
    """A line on what prompts lose behind their 75th token, and one on A1111's syntax in them, which
    is plain text here: how many they are, and what it is in the first. Without such, no line."""
    full = (tokenizer(list(prompts))[:, LENGTH - 2] != END).tolist()
    cut = [text for prompt, long in zip(prompts, full)
           if long and (text := _cut_text(prompt, tokenizer))]
    marked = [match[0] for prompt in prompts if (match := SYNTAX.search(prompt))]
    return [f"{noun if len(prompts) == 1 else f'{len(found):,} of {len(prompts):,} {noun}s'} "
            f"{what}: {found[0][:200]!r}{'…' * (len(found[0]) > 200)}"
            for found, what in ((cut, "cut after 75 tokens; left out"),
                                (marked, "with A1111's syntax, which is plain text here")) if found]


def _cut_text(prompt: str, tokenizer: Tokenizer) -> str:
    """What comes after the first 75 tokens: all behind the shortest beginning with the same ids."""
    ids = tokenizer(prompt)
    end = bisect_left(range(len(prompt)), True,
                      key=lambda length: torch.equal(tokenizer(prompt[:length]), ids))
    return " ".join(prompt[end:].split())


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


def _file_names(coco: dict) -> list[tuple[str, object]]:
    """(file name, caption or what is in its place), in the file's order."""
    names = {image["id"]: "" + image["file_name"] for image in coco["images"]}
    return [(names[a["image_id"]], a["caption"]) for a in coco["annotations"]]


def _image_ids(coco: dict) -> list[tuple[int, str]]:
    """(image id, caption), in the order of image ids, then of caption ids."""
    annotations = sorted(coco["annotations"], key=itemgetter("image_id", "id"))
    return [(a["image_id"], "" + a["caption"]) for a in annotations]
