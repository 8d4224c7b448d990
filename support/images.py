"""Images on disk: PNG files with their settings inside, contact sheets and labelled grids."""

from __future__ import annotations

import json
import math
import re
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from support.cli import one_line
from support.files import atomic_write

# ------------------------------------------------------------------------------- single images

def to_image(pixels: Tensor) -> Image.Image:
    """An image (3, H, W), uint8, as Pillow's."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """The image as it is seen: upright, on the background, 16 bits of grey as 8. Raises ValueError.

    Pillow's own conversion clips 16 bits to white, and shows what is hidden by transparency.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                                             # 16 bits, grey
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def fit(image: Image.Image, width: int, height: int) -> Tensor:
    """(3, height, width) uint8: upright, on white, the middle cut out and resized."""
    image = ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """The image at least `side` pixels wide, by an integer factor.

    Nearest neighbour: every pixel becomes a square, so that a small image shows what was sampled
    and not what a filter made of it.
    """
    factor = math.ceil(side / image.width)
    size = (factor * image.width, factor * image.height)
    return image.resize(size, Image.Resampling.NEAREST)


def save_png(path: Path, image: Image.Image, **text_chunks: str) -> None:
    """A PNG with text chunks. Its name appears only once it is complete."""
    info = PngInfo()
    for key, text in text_chunks.items():
        info.add_text(key, text)
    with atomic_write(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


# ------------------------------------------------------------------------------- settings inside

def parameters_text(prompt: str, negative: str = "", **settings: object) -> str:
    """The text chunk `parameters`, which popular interfaces write into an image and read from it.

    Three lines: the prompt, "Negative prompt: …" where there is one, and the settings as
    "Name: value, Name: value". Underscores in the names become spaces.
    """
    lines = [_plain(prompt)]
    if negative:
        lines.append(f"Negative prompt: {_plain(negative)}")
    items = (f"{name.replace('_', ' ')}: {_quoted(str(value))}" for name, value in settings.items())
    return "\n".join([*lines, ", ".join(items)])


def prompt_in_image(path: Path) -> str:
    """The prompt that an image was made from, or "" where it says none or the file is no image.

    It is read from the text chunk `parameters` of a PNG, or from the EXIF of a JPEG or WebP.
    """
    try:
        with Image.open(path) as image:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
            return prompt_of(str(image.info.get("parameters", "")) or _user_comment(comment))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""


def prompt_of(parameters: str) -> str:
    """The prompt in the text of `parameters`; "" where it is empty, or no settings follow it."""
    above_settings = "\n" + parameters.rpartition("\nSteps: ")[0]
    return above_settings.partition("\nNegative prompt: ")[0].strip()


def _user_comment(comment: bytes | str) -> str:
    """The text of EXIF's UserComment: eight bytes name its encoding."""
    if isinstance(comment, str):
        return comment
    code, text = comment[:8], comment[8:]
    if code != b"UNICODE\0":
        return text.decode(errors="replace")
    # UTF-16; the standard leaves the order of bytes open. In most texts every high byte is zero.
    big_endian = text[::2].count(0) >= text[1::2].count(0)
    return text.decode("utf-16-be" if big_endian else "utf-16-le", errors="replace")


def _plain(text: str) -> str:
    # The chunk is read line by line, so a prompt's own line break would be taken for the next
    # field. A space means the same to the tokenizer.
    return one_line(text.encode(errors="replace").decode())


def _quoted(value: str) -> str:
    value = _plain(value)
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"]', value) else value


# ------------------------------------------------------------------------------- names of files

def next_number(folder: Path) -> int:
    """One more than the highest number that the name of a PNG in the folder begins with."""
    matches = (re.match(r"(\d{3,9})(-.*)?\.png$", path.name) for path in folder.iterdir())
    return max((int(match[1]) for match in matches if match), default=-1) + 1


def free_name(folder: Path, stem: str) -> Path:
    """stem.png, or where that exists stem-2.png, stem-3.png, …"""
    path = folder / f"{stem}.png"
    k = 2
    while path.exists():
        path = folder / f"{stem}-{k}.png"
        k += 1
    return path


def slug(prompt: str) -> str:
    """The prompt in a file name: "-" and at most 60 of a-z, 0-9 and "-", or nothing at all."""
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:60].strip("-")
    return words and f"-{words}"


# ------------------------------------------------------------------------------- sheets

def contact_sheet(images: list[Image.Image], captions: list[str]) -> Image.Image:
    """The images on white, each above its caption: four in a row, or eight where there are more
    than 16. They are enlarged to at least 256 pixels, and captions are cut after three lines."""
    images = [enlarge(image, 256) for image in images]
    columns = min(len(images), 4 if len(images) <= 16 else 8)
    width, height = images[0].size
    unit = width / 256                                # text and margins grow with the images
    gap = round(10 * unit)
    captions = [_wrap(one_line(caption), 38, max_lines=3) for caption in captions]
    lines = max(caption.count("\n") + 1 for caption in captions)
    across, down = width + gap, height + gap + round(18 * unit * lines)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * across + gap, rows * down + gap), "white")
    draw, small = ImageDraw.Draw(sheet), ImageFont.load_default(13 * unit)
    for i, (image, caption) in enumerate(zip(images, captions)):
        row, column = divmod(i, columns)
        x, y = gap + column * across, gap + row * down
        sheet.paste(image, (x, y))
        draw.text((x, y + height + 4 * unit), caption, "#555", small)
    return sheet


def labelled_grid(headings: list[str], labels: list[str], images: list[list[Image.Image | None]],
                  note: str, side: int = 192) -> Image.Image:
    """A white sheet: a heading above each column, a label left of each row, a note below.

    The first line of a heading is black, its other lines are grey. images[row][column] are
    enlarged to at least `side` pixels; None leaves a narrow gap. Labels are cut to the height of
    their row.
    """
    rows = [[image and enlarge(image, side) for image in row] for row in images]
    width, height = next(image.size for row in rows for image in row if image)
    unit = max(width / 192, 1.0)                      # text and margins grow with the images
    gap = round(8 * unit)
    small = ImageFont.load_default(13 * unit)

    lefts = []
    right = round(150 * unit)                         # the labels' column
    for k in range(len(headings)):
        lefts.append(right)
        right += gap + (width if any(row[k] for row in rows) else gap)
    heads = [_wrap(head, max(8, round(width / (6.6 * unit)))) for head in headings]
    top = round((24 + 18 * max(head.count("\n") + 1 for head in heads)) * unit)
    note = textwrap.fill(note, round(right / (6.4 * unit)))
    bottom = round((26 + 18 * (note.count("\n") + 1)) * unit)

    sheet = Image.new("RGB", (right + gap, top + len(rows) * (height + gap) + bottom), "white")
    draw = ImageDraw.Draw(sheet)
    for left, head in zip(lefts, heads):
        _draw_heading(draw, left + width / 2, head, unit)
    for k, (label, row) in enumerate(zip(labels, rows)):
        y = top + k * (height + gap)
        label = _wrap(label, 18, max_lines=max(2, int(height / (18 * unit))))
        draw.text((2 * gap, y + height / 2), label, "#555", small, anchor="lm")
        for left, image in zip(lefts, row):
            if image:
                sheet.paste(image, (left, y))
    draw.text((2 * gap, sheet.height - bottom + 10 * unit), note, "#777", small)
    return sheet


def _draw_heading(draw: ImageDraw.ImageDraw, middle: float, heading: str, unit: float) -> None:
    first, _, rest = heading.partition("\n")
    title = ImageFont.load_default(17 * unit)
    small = ImageFont.load_default(13 * unit)
    draw.text((middle, 20 * unit), first, "#111", title, anchor="mm")
    draw.multiline_text((middle, 34 * unit), rest, "#777", small, anchor="ma", align="center")


def _wrap(text: str, width: int, max_lines: int = 0) -> str:
    """Every line of the text broken to the width; "…" after max_lines of them."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
    if 0 < max_lines < len(lines):
        lines = [*lines[:max_lines - 1], lines[max_lines - 1] + " …"]
    return "\n".join(lines)
