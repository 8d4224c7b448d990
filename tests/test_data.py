"""Training data: images as people have them, what stands in for bad ones, and the cache."""

import dataclasses
import hashlib
import io
import multiprocessing
import os
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, fill_folder, halves, write_shard
from PIL import Image, ImageOps
from safetensors.torch import load_file

import train
from mini import dataset, postcards
from mini.dataset import Postcards
from support import captions, data
from support.base import load_base
from support.cli import BadInput
from support.data import CachedImages, CaptionedImages, square

AVIF = Image.registered_extensions()             # Pillow before 11.3 has no decoder for it


@pytest.fixture(scope="module")
def base(toy_base):
    return load_base(toy_base)


@pytest.fixture(params=[0, 2], ids=["no workers", "2 workers"])
def workers(request, monkeypatch):
    """Images loaded in this process, and by others as with a GPU."""
    monkeypatch.setattr(data, "worker_count", lambda device: request.param)


def images_of(base, *given):
    return CaptionedImages(base, [str(g) for g in given], 64)


def rows_used(images, rows):
    """The rows used for these, one list of them."""
    [(used, _)] = images.batches([rows])
    return used


# ------------------------------------------------------------------------------- the data set

def test_rows_with_images_come_first_and_prompts_last(base, tmp_path):
    (tmp_path / "prompts.txt").write_text("p one\n\np two\n")
    fill_folder(tmp_path / "images", ["a", "b"])
    images = images_of(base, tmp_path / "prompts.txt", tmp_path / "images")
    assert images.captions(range(4)) == ["a", "b", "p one", "p two"]
    assert len(images) == 4 and images.image_count == 2 and images.side == 8
    assert images.example_prompts(3) == ["a", "b", "p one"]
    assert images.example_prompts(9) == ["a", "b", "p one", "p two"]
    assert images.prompt_states([0, 3]).shape == (2, 77, 32)


def test_images_of_shards_are_read_where_they_lie(base, tmp_path, workers):
    for number in range(2):
        entries = []
        for i in range(3):
            colour = encoded(Image.new("RGB", (64, 64), (80 * i, 100 * number, 7)))
            entries += [(f"{i}.png", colour), (f"{i}.txt", f"{number} {i}".encode())]
        write_shard(tmp_path / f"{number:05d}.tar", entries)
    images = images_of(base, tmp_path)
    (rows, pixels), (none, empty), (last, _) = images.batches(iter([[5, 1], [], [0]]))
    assert (rows, none, last) == ([5, 1], [], [0]) and not empty.numel()
    assert [p[:, 9, 9].tolist() for p in pixels] == [[160, 100, 7], [80, 0, 7]]


def test_a_damaged_shard_gives_what_is_whole_and_is_named(base, tmp_path):
    image = encoded(halves())
    entries = [(f"{i}.{s}", c) for i in range(3) for s, c in (("txt", b"x"), ("png", image))]
    file = write_shard(tmp_path / "cut.tar", entries)
    file.write_bytes(file.read_bytes()[:512 * 3 + 100])                # in the first image's data
    write_shard(tmp_path / "good.tar", entries)
    (tmp_path / "zipped.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    images = images_of(base, tmp_path)
    assert len(images) == 4 and len(images.skipped) == 1
    assert "cut.tar" in images.skipped_summary()
    assert all(f"{tmp_path / name}.tar" in images.notes()[0] for name in ("cut", "zipped"))
    assert rows_used(images, [0, 1, 2, 3])[1:] == [1, 2, 3] and len(images.skipped) == 1
    with pytest.raises(BadInput, match="zipped.tar"):
        images_of(base, tmp_path / "zipped.tar")


@pytest.mark.parametrize("name, content, word", [
    ("prompts.txt", b"\n \n", "no prompt"), ("empty.tar", b"", "no image"),
    ("no-{0..3}.tar", None, "no image"),
    ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}', "without a file: No such file"),
    ("metadata.jsonl", b'{"file_name": "a\\u0000.png", "text": "x"}', "without a file: embedded"),
    ("metadata.jsonl", b'{"file_name": "a\\ud800.png", "text": "x"}', "without a file: .* encode"),
    ("metadata.csv", b"file_name,text\na.png\n", "1 left out: without a caption")])
def test_data_that_gives_nothing_is_said_in_one_sentence(base, tmp_path, name, content, word):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=word):
        images_of(base, tmp_path / name)


def test_the_start_says_what_is_used_and_what_is_left_out(base, tmp_path, capsys):
    fill_folder(tmp_path, ["a", "", "c", "d", "boat " * 75 + "at night"])
    (tmp_path / "002.txt").write_text("été", encoding="utf-16")
    (tmp_path / "003.txt").write_text("été", encoding="latin-1")
    halves().save(tmp_path / "alone.jfif", "JPEG")
    images = images_of(base, tmp_path)
    assert images.captions([0, 1, 2]) == ["a", "", "été"]
    assert capsys.readouterr().out.splitlines() == [
        f"--data: 4 used; 1 of them with an empty caption; 2 left out: 1 {captions.NO_TEXT} "
        f"({tmp_path}/003.png); 1 without a caption ({tmp_path}/alone.jfif)",
        "1 of 4 captions cut after 75 tokens; left out: 'at night'"]
    (tmp_path / "prompts.txt").write_text("boat " * 76 + "\n" + "a boat\n" * 2000)
    images_of(base, tmp_path / "prompts.txt")
    assert capsys.readouterr().out.splitlines() == [
        "--data: 2,001 used; none left out",
        "1 of 667 sampled captions cut after 75 tokens; left out: 'boat'"]


def test_the_identity_of_data_that_was_read_before_is_kept(base, tmp_path):
    fill_folder(tmp_path, ["a", "b"])
    for k in range(2):
        os.utime(tmp_path / f"00{k}.png", ns=(k, k))
    (tmp_path / "prompts.txt").write_text("p\n")
    size = (tmp_path / "000.png").stat().st_size
    rows = ((("000.png", size, 0), 0, -1, "a"), (("001.png", size, 1), 0, -1, "b"),
            (("",), 0, 0, "p"))
    wanted = hashlib.sha256("".join(map(repr, rows)).encode()).hexdigest()
    (tmp_path / "alone.png").touch()
    for name in ("x.tar.gz", "x.heic"):
        (tmp_path / name).touch()
    assert images_of(base, tmp_path, tmp_path / "prompts.txt").identity == wanted


def test_one_of_several_captions_is_drawn(base, tmp_path):
    fill_folder(tmp_path, ["", ""])
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "000.png", "text": ["a", "b"]}\n{"file_name": "001.png", "text": "c"}\n')
    images = images_of(base, tmp_path)
    assert images.captions(range(3)) == ["a", "b", "c"] and images.image_count == 3
    [(rows, pixels)] = images.batches([[0, 1, 2]])
    assert rows == [0, 1, 2] and torch.equal(pixels[0], pixels[1])


def test_an_image_that_was_replaced_makes_another_data_set(base, tmp_path):
    fill_folder(tmp_path, ["a"])
    before = images_of(base, tmp_path).identity
    assert images_of(base, tmp_path).identity == before
    halves((32, 32)).save(tmp_path / "000.png")
    assert images_of(base, tmp_path).identity != before


def test_memory_does_not_grow_with_the_data(base, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LOOKED_AT", 200)
    image, peaks = encoded(Image.new("RGB", (8, 8))), []
    for count in (200, 2000):
        entries = [(f"{i:09d}.{s}", c) for i in range(count)
                   for s, c in (("png", image), ("txt", b"a caption of some length" * 9))]
        write_shard(tmp_path / "shard.tar", entries)
        del entries
        tracemalloc.start()
        images = images_of(base, tmp_path / "shard.tar")
        assert len(images) == count and images.captions([count - 1])[0].startswith("a caption")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 100_000


def test_the_index_is_on_disk_in_files_that_vanish_with_the_process(base, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{i} {'a' * 500}\n" for i in range(10_000)))
    images = images_of(base, tmp_path / "prompts.txt")
    open_files = [os.fstat(int(fd.name)) for fd in Path("/proc/self/fd").iterdir() if fd.exists()
                  or fd.is_symlink()]
    assert len(images) == 10_000
    assert any(stat.st_nlink == 0 and stat.st_size > 5_000_000 for stat in open_files)


def test_a_full_temporary_disk_is_one_sentence(base, tmp_path, monkeypatch):
    fill_folder(tmp_path, ["a"])
    monkeypatch.setattr(captions.tempfile, "TemporaryFile", lambda: open("/dev/full", "r+b"))
    with pytest.raises(BadInput, match="No space left.*TMPDIR"):
        images_of(base, tmp_path)


# ------------------------------------------------------------------------------- images

def turned():
    exif = Image.Exif()
    exif[0x0112] = 6                                            # to be turned by 90° clockwise
    return encoded(halves().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


def see_through():
    image = halves().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 64, 32))
    return image


def deep():
    grey = np.full((64, 64), 0x4000, np.uint16)
    grey[:32] = 0xffff
    return Image.fromarray(grey)


IMAGES = {
    "RGB": (encoded(halves()), (255, 0, 0)), "turned": (turned(), (255, 0, 0)),
    "palette": (encoded(halves().quantize(4)), (255, 0, 0)),
    "alpha on white": (encoded(see_through()), (255, 255, 255)),
    "palette with alpha": (encoded(see_through().quantize(4)), (255, 255, 255)),
    "transparent colour": (encoded(halves(), transparency=(255, 0, 0)), (255, 255, 255)),
    "CMYK": (encoded(halves().convert("CMYK"), "TIFF"), (255, 0, 0)),
    "CMYK jpeg": (encoded(halves().convert("CMYK"), "JPEG", quality=100, subsampling=0),
                  (255, 0, 0)),
    "grey": (encoded(halves().convert("L")), (76, 76, 76)),
    "grey with alpha": (encoded(see_through().convert("LA")), (255, 255, 255)),
    "16 bits": (encoded(deep()), (255, 255, 255)),
    "1 bit": (encoded(halves(upper="white", lower="black").convert("1")), (255, 255, 255)),
    "wide": (encoded(halves((640, 64))), (255, 0, 0)),
    "tall": (encoded(halves((8, 640))), (255, 0, 0)),
    "one pixel": (encoded(Image.new("RGB", (1, 1), (255, 0, 0))), (255, 0, 0)),
    "large": (encoded(halves((3000, 2000)), "JPEG", quality=95), (254, 0, 0)),
    "webp": (encoded(halves(), "WEBP", lossless=True), (255, 0, 0)),
    **({"avif": (encoded(halves(), "AVIF", quality=100), (255, 0, 0))} if ".avif" in AVIF else {}),
    "gif": (encoded(halves(), "GIF"), (255, 0, 0)), "bmp": (encoded(halves(), "BMP"), (255, 0, 0)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_seen_as_its_owner_sees_it(name):
    content, upper = IMAGES[name]
    pixels = square(io.BytesIO(content), 64)
    assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.uint8
    assert np.abs(pixels[:, 10, 32].int().numpy() - upper).max() <= 3
    if name not in ("one pixel", "1 bit", "16 bits", "grey"):
        assert np.abs(pixels[:, 54, 32].int().numpy() - (0, 0, 255)).max() <= 3 or "grey" in name
    if name == "16 bits":
        assert pixels[0, 54, 32] == 63


def test_the_middle_is_cut_out():
    image = Image.linear_gradient("L").resize((256, 128))
    wanted = ImageOps.fit(image.convert("RGB"), (64, 64), Image.Resampling.LANCZOS)
    pixels = square(io.BytesIO(encoded(image)), 64)
    assert torch.equal(pixels, torch.from_numpy(np.array(wanted)).permute(2, 0, 1))
    wide = Image.new("RGB", (300, 100))
    wide.paste((255, 255, 255), (100, 0, 200, 100))
    assert square(io.BytesIO(encoded(wide)), 64).min() > 200


def test_images_are_encoded_some_at_a_time(base, tmp_path):
    fill_folder(tmp_path, [f"caption {i}" for i in range(10)])
    images = images_of(base, tmp_path)
    [(rows, pixels)] = images.batches([list(range(10))])
    moments = images.moments(pixels)
    assert moments.dtype == images.prompt_states(rows).dtype == torch.float32
    torch.testing.assert_close(moments[8:], images.moments(pixels[8:]))


# ------------------------------------------------------------------------------- bad images

def bad_images():
    whole = encoded(Image.effect_noise((64, 64), 90), "PNG")
    jpeg = encoded(Image.effect_noise((64, 64), 90), "JPEG")
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2                      # says 3.6 gigapixels
    return {"cut.png": whole[:len(whole) // 2], "cut.jpg": jpeg[:len(jpeg) // 2],
            "bomb.png": bytes(bomb), "empty.jpg": b"", "page.jpg": b"<html>not found</html>",
            "real.tif": encoded(Image.new("F", (8, 8)), "TIFF")}


def write_bad_images(folder):
    folder.mkdir(exist_ok=True)
    for name, content in bad_images().items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("bad")


def test_bad_images_are_skipped_counted_and_named_and_others_stand_in(base, tmp_path, workers):
    write_bad_images(tmp_path)
    fill_folder(tmp_path, ["good"] * 3)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.txt").write_text("bad")
    count = len(images_of(base, tmp_path))
    runs = []
    for order in (list(range(count)), list(range(count))[::-1]):
        images = images_of(base, tmp_path)
        texts = images.captions(range(count))
        used = [rows[0] for rows, _ in images.batches([row] for row in order)]
        assert all(texts[row] == "good" for row in used)
        bad = [row for row, text in enumerate(texts) if text == "bad"]
        assert sorted(images.skipped) == bad and len(bad) == 6
        summary = images.skipped_summary()
        assert "2 image file is truncated (" in summary
        assert "(6 skipped: 3 not an image that Pillow reads (" in summary and "0x" not in summary
        runs.append(sorted(zip(order, used)))
    assert runs[0] == runs[1]                  # whatever was read before, the same ones stand in


def test_an_image_of_which_pillow_only_warns_is_skipped_too(base, tmp_path, monkeypatch):
    fill_folder(tmp_path, ["a", "b"])
    halves((200, 200)).save(tmp_path / "000.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    images = images_of(base, tmp_path)
    assert rows_used(images, [0, 1]) == [1, 1] and "pixels" in images.skipped_summary()


@pytest.mark.parametrize("cache", [[], ["--cache", "cache"]])
def test_data_from_which_all_is_skipped_stops_at_once(toy_base, here, capsys, cache):
    write_bad_images(here / "set")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--weights", str(toy_base), "--data", "set", "--device", "cpu", *cache])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "no image could be used (6 skipped: 3 not an image" in message
    assert not (here / "guides").exists() and not (here / "cache").exists()


@pytest.mark.parametrize("given, word", [(["prompts.txt"], "prompts only"),
                                         (["prompts.txt", "set"], "--trajectories")])
def test_prompts_alone_are_not_cached_nor_silently_left_unused(
        toy_base, here, capsys, given, word):
    fill_folder(here / "set", ["a"])
    (here / "prompts.txt").write_text("a prompt\n")
    flags = [w for g in given for w in ("--data", g)] + ["--cache", "cache"] * (len(given) == 1)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--weights", str(toy_base), "--device", "cpu", *flags])
    assert stopped.value.code == 2 and word in capsys.readouterr().err


# ------------------------------------------------------------------------------- worker processes

@pytest.fixture
def two_workers(monkeypatch):
    monkeypatch.setattr(data, "worker_count", lambda device: 2)


def test_workers_change_no_image_and_use_up_no_random_number(base, tmp_path, monkeypatch):
    fill_folder(tmp_path, [f"caption {i}" for i in range(9)])
    (tmp_path / "004.png").write_bytes(b"no image")
    lists = [[0, 4, 8], [], [4, 5], *([row] for row in range(9))]
    images = images_of(base, tmp_path)
    torch.manual_seed(1)
    wanted = torch.rand(3)
    results = []
    for count in (0, 2):
        monkeypatch.setattr(data, "worker_count", lambda device, count=count: count)
        torch.manual_seed(1)
        results.append(list(images.batches(lists)))
        assert torch.equal(torch.rand(3), wanted)
    for (rows, pixels), (same, others) in zip(*results, strict=True):
        assert rows == same and torch.equal(pixels, others)


def test_workers_ignore_the_signals_that_stop_a_run(base, tmp_path, two_workers):
    fill_folder(tmp_path, ["a"] * 4)
    before = signal.signal(signal.SIGTERM, lambda *_: (tmp_path / "handled").touch())
    try:
        batches = images_of(base, tmp_path).batches([k % 4] for k in range(40))
        assert [next(batches)[0] for _ in range(2)] == [[0], [1]]       # both are at work by now
        children = multiprocessing.active_children()
        for child in children:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(child.pid, number)
        assert len(children) == 2 and len(list(batches)) == 38
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "handled").exists() and not multiprocessing.active_children()


def test_an_error_in_a_worker_is_still_one_sentence(base, tmp_path, two_workers):
    fill_folder(tmp_path, ["a"] * 2)
    images = images_of(base, tmp_path)
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(BadInput, match=r"^--data: no image could be used \(2 skipped: .*\)$"):
        list(images.batches([[0], [1]]))


# ------------------------------------------------------------------------------- cache

def test_a_cache_gives_the_moments_and_states_of_the_images(base, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(CachedImages, "SHARD", 3)
    fill_folder(tmp_path / "set", [f"caption {i}" for i in range(7)])
    (tmp_path / "set" / "004.png").write_bytes(b"no image")
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    given = [str(tmp_path / "set"), str(tmp_path / "prompts.txt")]
    plain = CaptionedImages(base, given, 64)
    cached = CachedImages(base, given, 64, str(tmp_path / "cache"))
    [(rows, pixels)] = plain.batches([[6, 4, 0]])
    [(same, moments)] = cached.batches([[6, 4, 0]])
    assert same == rows and rows[1] != 4
    tolerance = {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(cached.moments(moments), plain.moments(pixels), **tolerance)
    torch.testing.assert_close(cached.prompt_states([*rows, 7]), plain.prompt_states([*rows, 7]),
                               **tolerance)
    assert len(list(cached.folder.iterdir())) == 3
    again = CachedImages(base, given, 64, str(tmp_path / "cache"))
    assert f"(1 skipped: not usable when cached ({tmp_path}/set/004.png)" in again.skipped_summary()


def test_a_cache_is_continued_and_made_anew_for_what_changes_it(base, tmp_path, monkeypatch):
    monkeypatch.setattr(CachedImages, "SHARD", 2)
    fill_folder(tmp_path / "set", ["a", "b", "c", "d", "e"])
    given, made = ([str(tmp_path / "set")], str(tmp_path / "cache")), []
    encode_shard = CachedImages.encode_shard

    def counted(self, number, loaded):
        if len(made) == 1 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        made.append(number)
        encode_shard(self, number, loaded)

    monkeypatch.setattr(CachedImages, "encode_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        CachedImages(base, given[0], 64, given[1])
    (tmp_path / "again").touch()
    first = CachedImages(base, given[0], 64, given[1])
    assert made == [0, 1, 2]
    file = first.folder / "000001.safetensors"
    whole = load_file(file)
    file.write_bytes(file.read_bytes()[:-3])
    CachedImages(base, given[0], 64, given[1])
    assert made == [0, 1, 2, 1] and torch.equal(load_file(file)["moments"], whole["moments"])
    assert CachedImages(base, given[0], 128, given[1]).folder != first.folder
    monkeypatch.setattr(CachedImages, "SHARD", 3)
    assert CachedImages(base, given[0], 64, given[1]).folder != first.folder
    (tmp_path / "set" / "003.txt").write_text("another")
    assert CachedImages(base, given[0], 64, given[1]).folder != first.folder
    with torch.no_grad():
        next(base.vae.parameters())[0] += 1
        other = CachedImages(base, given[0], 64, given[1]).folder
        next(base.vae.parameters())[0] -= 1
    assert len(list((tmp_path / "cache").iterdir())) == 5 and other != first.folder


# ------------------------------------------------------------------------------- postcards

def test_postcards_do_not_depend_on_how_many_are_drawn_together(base, monkeypatch):
    drawn = []
    draw = postcards.draw
    monkeypatch.setattr(postcards, "draw", lambda *args, **kwargs: (
        drawn.append(draw(*args, **kwargs)) or drawn[-1]))
    together = Postcards(base, 7, 1)
    monkeypatch.setattr(dataset, "ON_CPU", 3)
    apart = Postcards(base, 7, 1)
    assert [len(images) for images in drawn] == [7, 3, 3, 1]
    assert torch.equal(drawn[0], torch.cat(drawn[1:])) and together.texts == apart.texts
    torch.testing.assert_close(together._moments, apart._moments, rtol=1e-3, atol=1e-3)


def test_a_fine_tune_trains_on_postcards_in_its_own_style(base, monkeypatch):
    styles = []
    draw = postcards.draw
    monkeypatch.setattr(postcards, "draw", lambda attributes, style, generator: (
        styles.append(style) or draw(attributes, style, generator)))
    plain = Postcards(base, 2, 1)
    styled = Postcards(dataclasses.replace(base, path=Path("watercolor")), 2, 1)
    assert styles == ["postcard", "watercolor"] and plain.texts == styled.texts
    assert not torch.equal(plain._moments, styled._moments)
    assert (plain.identity, styled.identity) == ("postcards 2 1", "postcards 2 1 watercolor")


def test_postcards_are_drawn_by_seed_with_the_same_interface(base):
    first, again, other = (Postcards(base, 6, seed) for seed in (1, 1, 2))
    assert first.identity == again.identity == "postcards 6 1" and len(first) == 6
    (rows, images), (none, empty) = first.batches([[5, 0], []])
    assert rows == [5, 0] and none == [] and not empty.numel()
    assert first.moments(images).shape == (2, 8, first.side, first.side)
    assert torch.equal(first.moments(images), again.moments(images))
    assert not torch.equal(first.moments(images), other.moments(images))
    assert first.captions([5, 0]) == again.captions([5, 0]) != other.captions([5, 0])
    assert first.prompt_states([5, 0]).shape == (2, 77, 32) and first.skipped_summary() == ""
    assert len(first.example_prompts(4)) == 4 and first.image_count == 6
    assert first.skipped == {}


def test_images_are_encoded_from_minus_one_to_one(base, tmp_path):
    fill_folder(tmp_path, ["a"])
    images = images_of(base, tmp_path)
    [(_, pixels)] = images.batches([[0]])
    assert pixels.float().std() > 20
    torch.testing.assert_close(images.moments(pixels), base.vae.encode(pixels / 127.5 - 1))
