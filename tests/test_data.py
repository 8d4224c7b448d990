"""What `train.py --data` reads: every form it names, and pictures as people have them."""

# ruff: noqa: F401, F811 (fixtures are imported, and named again as arguments)

import csv
import io
import json
import os
import sqlite3
import tarfile
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from test_train import base, here

import ppdd
import train


@pytest.fixture(scope="module")
def loaded(base):
    return ppdd.load_base(base)


def half(size=(64, 64), upper=(255, 0, 0), lower=(0, 0, 255)):
    """A picture whose upper half has another colour than its lower."""
    image = Image.new("RGB", size, lower)
    image.paste(upper, (0, 0, size[0], size[1] // 2))
    return image


def encoded(image, kind="PNG", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def shard(file, entries):
    """A tar as img2dataset writes it: key.jpg, key.json, key.txt."""
    with tarfile.open(file, "w") as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def fill(folder, captions, suffix=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, caption in enumerate(captions):
        half().save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}{suffix}").write_text(caption, encoding="utf-8")


def captions(loaded, *given):
    data = train.Pictures(loaded, [str(g) for g in given], 64)
    return data.captions(list(range(len(data)))), data


# ------------------------------------------------------------------------------- forms

def test_a_folder_gives_pictures_with_txt_or_caption_beside_them(loaded, tmp_path):
    fill(tmp_path / "a", ["one", "zwei ü\n"])
    fill(tmp_path / "b" / "deeper", ["three"], ".caption")
    half().save(tmp_path / "a" / "no-caption.png")
    texts, data = captions(loaded, tmp_path)
    assert texts == ["one", "zwei ü", "three"] and data.pictured == 3


def test_linked_folders_are_read_and_circles_end(loaded, tmp_path):
    fill(tmp_path / "elsewhere", ["one"])
    fill(tmp_path / "set", ["two"])
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    assert captions(loaded, tmp_path / "set")[0] == ["two", "one"]


def test_a_table_by_any_name_is_no_list_of_prompts(loaded, tmp_path):
    fill(tmp_path, ["not this"])
    (tmp_path / "mine.jsonl").write_text('{"file_name": "000.png", "text": "this"}\n')
    texts, data = captions(loaded, tmp_path / "mine.jsonl")
    assert texts == ["this"] and data.pictured == 1
    for name in ("mine.csv", "mine.tsv"):
        (tmp_path / name).write_text("id\tprompt\n1\ta tree\n")
        with pytest.raises(train.BadInput, match=name):
            captions(loaded, tmp_path / name)


@pytest.mark.parametrize("kind, given", [
    ("jsonl", "set"), ("jsonl", "set/metadata.jsonl"), ("csv", "set"), ("csv", "set/metadata.csv")])
def test_metadata_lists_pictures_and_captions(loaded, tmp_path, kind, given):
    fill(tmp_path / "set" / "images", ["not this", "nor this"])
    rows = [{"file_name": f"images/{i:03d}.png", "text": f"a, {i}\nb"} for i in (1, 0)]
    with (tmp_path / "set" / f"metadata.{kind}").open("w", newline="", encoding="utf-8-sig") as f:
        if kind == "csv":
            table = csv.DictWriter(f, ["file_name", "text"])
            table.writeheader()
            table.writerows(rows)
        else:
            f.write("\n".join(map(json.dumps, rows)) + "\n\n")
    texts, data = captions(loaded, tmp_path / given)
    assert texts == ["a, 1\nb", "a, 0\nb"] and data.load([0, 1])[0] == [0, 1]


@pytest.mark.parametrize("given", [
    "00000.tar 00001.tar", ".", "{00000..00001}.tar", "*.tar", "{00000..00002}.tar"])
def test_shards_are_indexed_and_their_pictures_read_where_they_lie(loaded, tmp_path, given):
    for number in range(2):
        entries = []
        for i in range(3):
            key = f"{number:05d}{i:04d}"
            colour = encoded(Image.new("RGB", (64, 64), (80 * i, 100 * number, 7)))
            entries += [(f"{key}.png", colour), (f"{key}.json", b"{}"),
                        (f"{key}.txt", f"{number} {i}".encode())]
        shard(tmp_path / f"{number:05d}.tar", [*entries, ("alone.txt", b"no picture")])
    texts, data = captions(loaded, *(tmp_path / g for g in given.split()))
    assert texts == [f"{n} {i}" for n in range(2) for i in range(3)]
    rows, pictures = data.load([5, 1])
    assert rows == [5, 1] and [p[:, 9, 9].tolist() for p in pictures] == [[160, 100, 7], [80, 0, 7]]
    assert len(data.skipped) == (given == "{00000..00002}.tar")


def test_a_shards_folders_and_links_are_no_halves(loaded, tmp_path):
    file = shard(tmp_path / "s.tar", [("k.png", encoded(half())), ("k.txt", b"x")])
    with tarfile.open(file, "a") as tar:
        for kind, name in ((tarfile.DIRTYPE, "a.txt"), (tarfile.SYMTYPE, "b.txt"),
                           (tarfile.DIRTYPE, "c.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "nowhere"
            tar.addfile(member)
    texts, data = captions(loaded, file)
    assert texts == ["x"] and not data.skipped


def test_a_damaged_shard_gives_what_is_whole_and_is_named(loaded, tmp_path):
    picture = encoded(half())
    entries = [(f"{i}.{s}", c) for i in range(3) for s, c in (("txt", b"x"), ("png", picture))]
    file = shard(tmp_path / "cut.tar", entries)
    file.write_bytes(file.read_bytes()[:512 * 3 + 100])                # in the first picture's data
    shard(tmp_path / "good.tar", entries)
    (tmp_path / "zipped.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    texts, data = captions(loaded, tmp_path)
    assert len(texts) == 4 and len(data.skipped) == 3 and "cut.tar" in data.told()
    assert data.load([0, 1, 2, 3])[0][1:] == [1, 2, 3] and len(data.skipped) == 3
    with pytest.raises(train.BadInput, match="zipped.tar"):
        captions(loaded, tmp_path / "zipped.tar")


@pytest.mark.parametrize("layout", ["given", "beside", "coco"])
def test_coco_captions_with_their_pictures(loaded, tmp_path, layout):
    places = {"given": "elsewhere", "beside": "annotations/val2014", "coco": "val2014"}
    fill(tmp_path / places[layout], ["", ""])
    file = tmp_path / "annotations" / "captions_val2014.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({
        "images": [{"id": 7, "file_name": "000.png"}, {"id": 9, "file_name": "001.png"}],
        "annotations": [{"image_id": 9, "id": 1, "caption": "a"},
                        {"image_id": 7, "id": 2, "caption": "b"},
                        {"image_id": 9, "id": 3, "caption": "c "}]}))
    given = f"{file}:{tmp_path / 'elsewhere'}" if layout == "given" else file
    texts, data = captions(loaded, given)
    assert texts == ["a", "b", "c"] and data.load([0, 1, 2])[0] == [0, 1, 2]


def test_forms_are_mixed_and_prompts_go_last(loaded, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffp one\r\n\r\np two \udc80\n".encode(
        "utf-8", "surrogatepass"))
    fill(tmp_path / "pictures", ["a"])
    shard(tmp_path / "s.tar", [("k.png", encoded(half())), ("k.txt", b"\xff bad byte")])
    texts, data = captions(loaded, tmp_path / "prompts.txt", tmp_path / "pictures",
                           tmp_path / "s.tar")
    assert texts[:3] == ["a", "\ufffd bad byte", "p one"] and len(texts) == 4
    assert data.pictured == 2
    assert data.prompts([0, 3]).shape == (2, 77, 32)


@pytest.mark.parametrize("name, content, word", [
    ("prompts.txt", b"\n \n", "no prompt"), ("noise.bin", bytes(99), "not text"),
    ("captions.json", b"{}", "COCO"), ("captions.json", b"not json", "COCO"),
    ("captions.json", b'{"images": [], "annotations": []}', "FOLDER"),
    ("captions.json", b'{"images": [{"id": 1, "file_name": "x"}], "annotations": '
                      b'[{"image_id": 1, "caption": null}]}', "COCO"),
    ("metadata.jsonl", b'{"text": "x"}', "file_name"), ("metadata.jsonl", b"[1]", "file_name"),
    ("metadata.jsonl", b'{"file_name": "a\\u0000.png", "text": "x"}', "no file can be called"),
    ("metadata.jsonl", b'{"file_name": "a\\ud800.png", "text": "x"}', "no file can be called"),
    ("metadata.csv", b"file_name,text\nx.png\n", "file_name"), ("empty.tar", b"", "no picture"),
    ("deep/x.md", b"", "does not exist"), ("no-{0..3}.tar", None, "no picture")])
def test_a_set_that_gives_nothing_is_said_in_one_sentence(loaded, tmp_path, name, content, word):
    if content is not None and "/" not in name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(train.BadInput, match=word):
        captions(loaded, tmp_path / name)


# ------------------------------------------------------------------------------- pictures

def turned():
    exif = Image.Exif()
    exif[0x0112] = 6                                            # to be turned by 90° clockwise
    return encoded(half().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


def see_through():
    image = half().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 64, 32))
    return image


def deep():
    grey = np.full((64, 64), 0x4000, np.uint16)
    grey[:32] = 0xffff
    return Image.fromarray(grey)


PICTURES = {
    "RGB": (encoded(half()), (255, 0, 0)), "turned": (turned(), (255, 0, 0)),
    "palette": (encoded(half().quantize(4)), (255, 0, 0)),
    "alpha on white": (encoded(see_through()), (255, 255, 255)),
    "palette with alpha": (encoded(see_through().quantize(4)), (255, 255, 255)),
    "transparent colour": (encoded(half(), transparency=(255, 0, 0)), (255, 255, 255)),
    "CMYK": (encoded(half().convert("CMYK"), "TIFF"), (255, 0, 0)),
    "CMYK jpeg": (encoded(half().convert("CMYK"), "JPEG", quality=100, subsampling=0), (255, 0, 0)),
    "grey": (encoded(half().convert("L")), (76, 76, 76)),
    "grey with alpha": (encoded(see_through().convert("LA")), (255, 255, 255)),
    "16 bits": (encoded(deep()), (255, 255, 255)),
    "1 bit": (encoded(half(upper="white", lower="black").convert("1")), (255, 255, 255)),
    "wide": (encoded(half((640, 64))), (255, 0, 0)), "tall": (encoded(half((8, 640))), (255, 0, 0)),
    "one pixel": (encoded(Image.new("RGB", (1, 1), (255, 0, 0))), (255, 0, 0)),
    "large": (encoded(half((3000, 2000)), "JPEG", quality=95), (254, 0, 0)),
    "webp": (encoded(half(), "WEBP", lossless=True), (255, 0, 0)),
    "gif": (encoded(half(), "GIF"), (255, 0, 0)), "bmp": (encoded(half(), "BMP"), (255, 0, 0)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_seen_as_its_owner_sees_it(name):
    content, upper = PICTURES[name]
    picture = train.square(io.BytesIO(content), 64)
    assert picture.shape == (3, 64, 64) and picture.dtype == torch.uint8
    assert np.abs(picture[:, 10, 32].int().numpy() - upper).max() <= 3
    if name not in ("one pixel", "1 bit", "16 bits", "grey"):
        assert np.abs(picture[:, 54, 32].int().numpy() - (0, 0, 255)).max() <= 3 or "grey" in name
    if name == "16 bits":
        assert picture[0, 54, 32] == 63


def test_the_middle_is_cut_out():
    image = Image.linear_gradient("L").resize((256, 128))
    wanted = ImageOps.fit(image.convert("RGB"), (64, 64), Image.Resampling.LANCZOS)
    picture = train.square(io.BytesIO(encoded(image)), 64)
    assert torch.equal(picture, torch.from_numpy(np.array(wanted)).permute(2, 0, 1))
    wide = Image.new("RGB", (300, 100))
    wide.paste((255, 255, 255), (100, 0, 200, 100))
    assert train.square(io.BytesIO(encoded(wide)), 64).min() > 200


def bad_pictures():
    whole = encoded(Image.effect_noise((64, 64), 90), "PNG")
    jpeg = encoded(Image.effect_noise((64, 64), 90), "JPEG")
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2                       # says 3.6 gigapixels
    return {"cut.png": whole[:len(whole) // 2], "cut.jpg": jpeg[:len(jpeg) // 2],
            "bomb.png": bytes(bomb), "empty.jpg": b"", "page.jpg": b"<html>not found</html>",
            "real.tif": encoded(Image.new("F", (8, 8)), "TIFF")}


def test_bad_pictures_are_skipped_counted_and_named_and_others_stand_in(loaded, tmp_path):
    fill(tmp_path, ["good"] * 3)
    for name, content in bad_pictures().items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text("bad")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.txt").write_text("bad")
    runs = []
    for order in (range(8), reversed(range(8))):
        texts, data = captions(loaded, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            rows = {row: data.load([row])[0][0] for row in order}
        assert all(texts[row] == "good" for row in rows.values())
        assert sorted(data.skipped) == [i for i, t in enumerate(texts) if t == "bad"]
        assert "(6 skipped" in data.told() and data.told().count(";") == 2
        runs.append(sorted(rows.items()))
    assert runs[0] == runs[1]                  # whatever was read before, the same ones stand in


@pytest.mark.parametrize("cache", [[], ["--cache", "cache"]])
def test_a_set_from_which_all_is_skipped_stops_at_once(base, here, capsys, cache):
    (here / "set").mkdir()
    for name, content in bad_pictures().items():
        (here / "set" / name).write_bytes(content)
        (here / "set" / name).with_suffix(".txt").write_text("bad")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--weights", str(base), "--data", "set", "--device", "cpu", *cache])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "no picture could be used (6 skipped: set/" in said
    assert not (here / "guides").exists() and not (here / "cache").exists()


def test_memory_does_not_grow_with_the_set(loaded, tmp_path):
    picture, peaks = encoded(Image.new("RGB", (8, 8))), []
    for count in (500, 5000):
        entries = [(f"{i:09d}.{s}", c) for i in range(count)
                   for s, c in (("png", picture), ("txt", b"a caption of some length" * 9))]
        shard(tmp_path / "shard.tar", entries)
        del entries
        tracemalloc.start()
        data = train.Pictures(loaded, [str(tmp_path / "shard.tar")], 64)
        assert len(data) == count and data.captions([count - 1])[0].startswith("a caption")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 100_000


def test_the_index_of_a_large_set_lies_on_disk(loaded, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{i} {'a' * 500}\n" for i in range(10_000)))
    data = train.Pictures(loaded, [str(tmp_path / "prompts.txt")], 64)
    files = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    assert len(data) == 10_000 and any("etilqs_" in file for file in files)    # SQLite's own name


def test_a_full_temporary_disk_is_one_sentence(base, here, capsys, monkeypatch):
    def full(self, given):
        raise sqlite3.OperationalError("database or disk is full")

    fill(here / "set", ["a"])
    monkeypatch.setattr(train.Pictures, "examples_of", full)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--weights", str(base), "--data", "set", "--device", "cpu"])
    assert stopped.value.code == 2 and "SQLITE_TMPDIR" in capsys.readouterr().err


def test_a_picture_that_was_replaced_makes_another_set(loaded, tmp_path):
    fill(tmp_path, ["a"])
    before = captions(loaded, tmp_path)[1].identity
    assert captions(loaded, tmp_path)[1].identity == before
    half((32, 32)).save(tmp_path / "000.png")
    assert captions(loaded, tmp_path)[1].identity != before


def test_encodings_are_in_float32_under_autocast_too(loaded, tmp_path):
    fill(tmp_path, [f"caption {i}" for i in range(10)])
    _, data = captions(loaded, tmp_path)
    rows, pictures = data.load(list(range(10)))
    plain = data.moments(pictures), data.prompts(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(data.moments(pictures), plain[0])
        assert torch.equal(data.prompts(rows), plain[1])
    torch.testing.assert_close(plain[0][8:], data.moments(pictures[8:]))


# ------------------------------------------------------------------------------- cache

def test_a_cache_gives_the_moments_and_states_of_the_pictures(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Cached, "SHARD", 3)
    fill(tmp_path / "set", [f"caption {i}" for i in range(7)])
    (tmp_path / "set" / "004.png").write_bytes(b"no picture")
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    given = [str(tmp_path / "set"), str(tmp_path / "prompts.txt")]
    plain = train.Pictures(loaded, given, 64)
    cached = train.Cached(loaded, given, 64, str(tmp_path / "cache"))
    rows, pictures = plain.load([6, 4, 0])
    same, moments = cached.load([6, 4, 0])
    assert same == rows and rows[1] != 4
    torch.testing.assert_close(cached.moments(moments), plain.moments(pictures), rtol=2e-3,
                               atol=2e-3)
    torch.testing.assert_close(cached.prompts([*rows, 7]), plain.prompts([*rows, 7]), rtol=2e-3,
                               atol=2e-3)
    assert len(list(cached.folder.iterdir())) == 3
    again = train.Cached(loaded, given, 64, str(tmp_path / "cache"))
    assert "004.png (not usable when cached)" in again.told()


def test_a_cache_is_gone_on_with_and_made_anew_for_what_changes_it(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Cached, "SHARD", 2)
    fill(tmp_path / "set", ["a", "b", "c", "d", "e"])
    given, made = ([str(tmp_path / "set")], str(tmp_path / "cache")), []
    make = train.Cached.make

    def counted(self, number):
        if len(made) == 1 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        made.append(number)
        make(self, number)

    monkeypatch.setattr(train.Cached, "make", counted)
    with pytest.raises(KeyboardInterrupt):
        train.Cached(loaded, given[0], 64, given[1])
    (tmp_path / "again").touch()
    first = train.Cached(loaded, given[0], 64, given[1])
    assert made == [0, 1, 2]
    file = first.folder / "000001.safetensors"
    whole = load_file(file)
    file.write_bytes(file.read_bytes()[:-3])
    train.Cached(loaded, given[0], 64, given[1])
    assert made == [0, 1, 2, 1] and torch.equal(load_file(file)["moments"], whole["moments"])
    assert train.Cached(loaded, given[0], 128, given[1]).folder != first.folder
    monkeypatch.setattr(train.Cached, "SHARD", 3)
    assert train.Cached(loaded, given[0], 64, given[1]).folder != first.folder
    (tmp_path / "set" / "003.txt").write_text("another")
    assert train.Cached(loaded, given[0], 64, given[1]).folder != first.folder
    with torch.no_grad():
        next(loaded.vae.parameters())[0] += 1
        other = train.Cached(loaded, given[0], 64, given[1]).folder
        next(loaded.vae.parameters())[0] -= 1
    assert len(list((tmp_path / "cache").iterdir())) == 5 and other != first.folder


@pytest.mark.parametrize("given, word", [(["prompts.txt"], "prompts only"),
                                         (["prompts.txt", "set"], "--trajectories")])
def test_prompts_alone_are_not_cached_nor_silently_left_unused(
        base, here, capsys, given, word):
    fill(here / "set", ["a"])
    (here / "prompts.txt").write_text("a prompt\n")
    flags = [w for g in given for w in ("--data", g)] + ["--cache", "cache"] * (len(given) == 1)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--weights", str(base), "--device", "cpu", *flags])
    assert stopped.value.code == 2 and word in capsys.readouterr().err
