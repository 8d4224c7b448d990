"""support/images.py: PNG files with their settings, sheets, and the names of files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from support import images
from support.images import (
    contact_sheet,
    enlarge,
    free_name,
    labelled_grid,
    next_number,
    parameters_text,
    prompt_in_image,
    save_png,
    slug,
    to_image,
)


def plain(color: str, width: int = 8, height: int = 8) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def test_to_image_is_height_by_width():
    pixels = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    image = to_image(pixels)
    assert image.size == (5, 4) and image.mode == "RGB"
    assert image.getpixel((2, 3)) == tuple(pixels[:, 3, 2].tolist())


@pytest.mark.parametrize("width, height, side, size", [
    (8, 8, 32, (32, 32)), (8, 4, 33, (40, 20)), (64, 64, 64, (64, 64)), (64, 32, 8, (64, 32))])
def test_enlarge_makes_every_pixel_a_square(width, height, side, size):
    image = to_image(torch.randint(256, (3, height, width), dtype=torch.uint8))
    large = enlarge(image, side)
    assert large.size == size
    factor = size[0] // width
    assert (np.asarray(large) == np.asarray(image).repeat(factor, 0).repeat(factor, 1)).all()


# ----------------------------------------------------------------------- PNG files

def test_save_png_keeps_pixels_and_text(tmp_path):
    path = tmp_path / "new/a.png"
    save_png(path, plain("red"), ppdd="{}", parameters="猫\nSteps: 1")
    with Image.open(path) as image:
        assert image.text == {"ppdd": "{}", "parameters": "猫\nSteps: 1"}
        assert image.getpixel((0, 0)) == (255, 0, 0)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_png(tmp_path / "a.png", plain("red"))
    before = (tmp_path / "a.png").read_bytes()

    def fail(self, file, *_, **__):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "a.png", plain("blue"))
    assert (tmp_path / "a.png").read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def test_parameters_text():
    text = parameters_text("a tree: red", "dull, grey", Steps=4, CFG_scale="7.5", Model='a, "b"')
    assert text.split("\n") == ["a tree: red", "Negative prompt: dull, grey",
                                'Steps: 4, CFG scale: 7.5, Model: ' + json.dumps('a, "b"')]
    assert parameters_text("x", Steps=1) == "x\nSteps: 1"


@pytest.mark.parametrize("prompt", ["a\nSteps: 9, Seed: 1", "a\r\nb\u2028c\x85d", "a\0b", "\udcff"])
def test_a_prompt_can_not_forge_a_line(prompt):
    assert parameters_text(prompt, prompt, Steps=1, Model=prompt).count("\n") == 2


@pytest.mark.parametrize("negative", ["", "dull"])
@pytest.mark.parametrize("prompt", ["a tree", "", "猫, big: red"])
def test_the_prompt_comes_back(tmp_path, prompt, negative):
    text = parameters_text(prompt, negative, Steps=1)
    save_png(tmp_path / "a.png", plain("red"), parameters=text)
    assert prompt_in_image(tmp_path / "a.png") == prompt


def test_what_holds_no_prompt(tmp_path):
    save_png(tmp_path / "a.png", plain("red"))
    (tmp_path / "b.png").write_bytes(b"no image")
    assert [prompt_in_image(tmp_path / f"{name}.png") for name in "abc"] == ["", "", ""]


SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64, Version: v1.6.0"


@pytest.mark.parametrize("above, prompt", [
    ("Negative prompt: ugly\n", ""), ("", ""), ("a red boat\n", "a red boat"),
    ("a red boat,\nat sea\nNegative prompt: ugly,\nSteps: no\n", "a red boat,\nat sea")])
def test_a_web_interface_s_prompt_in_any_format(tmp_path, above, prompt):
    """PNG has a text chunk; JPEG and WebP have it in EXIF, in UTF-16 of either order of bytes."""
    save_png(tmp_path / "a.png", plain("red"), parameters=above + SETTINGS)
    assert prompt_in_image(tmp_path / "a.png") == prompt
    for order in ("be", "le"):
        exif = Image.Exif()
        text = (above + SETTINGS).encode(f"utf-16-{order}")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text
        for name in ("a.jpg", "a.webp"):
            plain("red").save(tmp_path / name, exif=exif)
            assert prompt_in_image(tmp_path / name) == prompt
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0" + (
        above + SETTINGS).encode()
    plain("red").save(tmp_path / "b.jpg", exif=exif)
    assert prompt_in_image(tmp_path / "b.jpg") == prompt


# ----------------------------------------------------------------------- names

@pytest.mark.parametrize("names, number", [
    ([], 0), (["000-a.png", "007.png"], 8), (["12.png", "grid.png", "003-x.jpg"], 0),
    (["0012-mine.png"], 13), (["1234567890.png"], 0), (["999.png"], 1000)])
def test_next_number(tmp_path, names, number):
    for name in names:
        (tmp_path / name).touch()
    assert next_number(tmp_path) == number


def test_free_name(tmp_path):
    for name in ("grid.png", "grid-2.png", "grid-3.png"):
        assert free_name(tmp_path, "grid").name == name
        (tmp_path / name).touch()


@pytest.mark.parametrize("prompt, name", [
    ("../../etc/passwd", "-etc-passwd"), ("Crème brûlée, 8K!", "-creme-brulee-8k"), ("猫", ""),
    ("", ""), ("x" * 500, "-" + "x" * 60), ("a" * 59 + " b", "-" + "a" * 59)])
def test_slug(prompt, name):
    assert slug(prompt) == name


# ----------------------------------------------------------------------- sheets

@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (3, 3, 1), (5, 4, 2), (16, 4, 4),
                                                  (17, 8, 3), (64, 8, 8)])
def test_contact_sheet(count, columns, rows):
    sheet = contact_sheet([plain("red", 64, 32)] * count, ["a tree"] * count)
    assert sheet.size == (columns * 266 + 10, rows * (128 + 10 + 18) + 10)    # four times as large
    assert sheet.getpixel((10, 10)) == (255, 0, 0) and sheet.getpixel((9, 9)) == (255, 255, 255)


def test_each_image_of_a_contact_sheet_stands_above_its_caption():
    images = [plain(color, 64, 64) for color in ("red", "blue")]
    captions = ["a big red boat on the sea\nat sunset", "word " * 100]
    sheet = contact_sheet(images, captions)
    assert sheet.size == (2 * 266 + 10, 256 + 20 + 3 * 18)
    under = [(10, 266, 266, sheet.height), (276, 266, 532, sheet.height)]
    assert all(inked(sheet, box) for box in under)
    assert not inked(contact_sheet(images, ["", captions[1]]), under[0])
    assert sheet.crop(under[0]) == contact_sheet(images, [captions[0], "x\n" * 99]).crop(under[0])


def places(sheet: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The box around all pixels of one colour: left, top, right, bottom."""
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("side, shown", [(192, 192), (256, 256), (100, 104)])
def test_labelled_grid_puts_images_in_rows_and_columns(side, shown):
    colors = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
    sheet = labelled_grid(["one", "two\n8 passes"], ["first", "second"],
                          [[plain("red"), plain("lime")], [plain("blue"), plain("yellow")]],
                          "a note", side)
    red, lime, blue = (places(sheet, color) for color in colors.values())
    assert (red[2] - red[0], red[3] - red[1]) == (shown, shown)
    assert lime[1] == red[1] and lime[0] > red[2] and blue[0] == red[0] and blue[1] > red[3]
    for x, y in ((0, 0), (sheet.width - 1, sheet.height - 1)):
        assert sheet.getpixel((x, y)) == (255, 255, 255)


def inked(sheet: Image.Image, box: tuple[int, int, int, int]) -> bool:
    return np.asarray(sheet.crop(box)).min() < 200


def test_headings_labels_and_note_have_their_places():
    sheet = labelled_grid(["head"], ["label"], [[plain("red")]], "note")
    left, top, right, bottom = places(sheet, (255, 0, 0))
    assert inked(sheet, (left, 0, right, top)) and inked(sheet, (0, top, left, bottom))
    assert inked(sheet, (0, bottom, sheet.width, sheet.height))
    bare = labelled_grid([""], [""], [[plain("red")]], "")
    assert not inked(bare, (left, 0, right, top - 1)) and not inked(bare, (0, top, left, bottom))


def test_a_missing_image_is_a_narrow_gap():
    full = labelled_grid(["", ""], [""], [[plain("red"), plain("red")]], "")
    gap = labelled_grid(["", ""], [""], [[None, plain("red")]], "")
    assert gap.width == full.width - 192 + 8


@pytest.mark.parametrize("label", ["word " * 500, "x" * 3000, "a\nb\n" * 100, "مرحبا 👨\u200d👩"])
def test_a_long_label_stays_in_its_row(label):
    sheet = labelled_grid([""], [label, ""], [[plain("red")], [plain("red")]], "")
    _, top, _, bottom = places(sheet, (255, 0, 0))
    middle = (top + bottom) // 2
    assert not inked(sheet, (0, 0, 150, top - 8)) and not inked(sheet, (0, middle, 150, bottom))


def test_a_label_that_fits_is_not_cut():
    assert images._wrap("one\n\ntwo words here", 9, max_lines=4) == "one\n\ntwo words\nhere"
    assert images._wrap("one two three", 5, max_lines=2) == "one\ntwo …"
