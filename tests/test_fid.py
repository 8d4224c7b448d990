"""The Fréchet distance and its Inception against pytorch-fid and closed forms; `eval.py fid`."""

# ruff: noqa: F811 (fixtures are imported, and named again as arguments)

import math

import numpy as np
import pytest
import pytorch_fid.inception
import torch
from eval_helpers import (  # noqa: F401
    clean_refusal,
    command,
    empty,
    postcard_folder,
    result_of,
    statistics_of,
)
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from pytorch_fid import fid_score
from scipy.linalg import sqrtm

from evaluation import features as networks
from evaluation import folders
from evaluation.features import load_clip
from evaluation.fid import Statistics, frechet
from evaluation.folders import image_files, images_in
from mini import postcards
from support.cli import BadInput
from support.data import square
from support.files import sha256

# ----------------------------------------------------------------------- statistics

def features(n: int, d: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    """Correlated features (n, d), far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix * scale + 100


def gaussian(folder, mean, covariance) -> Statistics:
    np.savez(folder / "gaussian.npz", mu=np.array(mean), sigma=np.array(covariance))
    return Statistics.load(folder / "gaussian.npz")


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_streamed_statistics_are_numpy_s(batch):
    x = features(150, 12)
    statistics = statistics_of(x, batch)
    assert statistics.n == 150 and statistics.mean.dtype == statistics.covariance.dtype == float
    np.testing.assert_allclose(statistics.mean, x.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.covariance, np.cov(x.numpy(), rowvar=False), atol=1e-11)


def test_float32_features_far_from_zero_lose_nothing():
    x = (features(400, 5, scale=0.01) + 1e4).float()
    np.testing.assert_allclose(statistics_of(x).covariance,
                               np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)


def test_merged_statistics_are_those_of_all_and_leave_the_other_alone():
    x = features(90, 6)
    a, b, both = statistics_of(x[:20]), statistics_of(x[20:]), Statistics()
    kept = b.covariance.copy()
    both.merge(b)
    both.merge(a)
    np.testing.assert_allclose(both.covariance, np.cov(x.numpy(), rowvar=False), atol=1e-11)
    assert both.n == 90 and np.array_equal(b.covariance, kept)


def test_memory_does_not_grow_with_images():
    def held(n):
        values = vars(statistics_of(features(n, 8))).values()
        return sum(v.nbytes for v in values if hasattr(v, "nbytes"))
    assert held(10) == held(1000)


def test_statistics_on_disk_are_pytorch_fid_s(tmp_path):
    x = features(40, 6)
    a = statistics_of(x)
    a.features = "FID"
    a.save(tmp_path / "a.npz")
    again = Statistics.load(tmp_path / "a.npz")
    np.testing.assert_allclose(again.covariance, a.covariance, rtol=1e-14)
    assert (again.n, again.features) == (40, "FID") and frechet(a, again) < 1e-9
    again.add(features(5, 6, seed=1))
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_array_equal(file["mu"], a.mean)
        np.testing.assert_array_equal(file["sigma"], a.covariance)
    np.savez_compressed(tmp_path / "theirs.npz", mu=x.numpy().mean(0), sigma=np.cov(x.numpy().T))
    theirs = Statistics.load(tmp_path / "theirs.npz")
    assert theirs.n == 0 and frechet(a, theirs) < 1e-9
    with pytest.raises(ValueError, match="unknown number"):
        theirs.add(x)


@pytest.mark.parametrize("wrong", [
    {"mu": np.zeros(3)}, {"mu": np.zeros(3), "sigma": np.eye(2)},
    {"mu": np.full(2, np.nan), "sigma": np.eye(2)}, {"mu": np.zeros(2), "sigma": np.eye(2) * 1j},
    {"mu": np.array([{}, {}]), "sigma": np.eye(2)}])
def test_a_file_that_holds_no_statistics(tmp_path, wrong):
    np.savez(tmp_path / "a.npz", **wrong)
    with pytest.raises(BadInput, match="a.npz"):
        Statistics.load(tmp_path / "a.npz")


# ----------------------------------------------------------------------- the distance

def test_closed_forms(tmp_path):
    one = gaussian(tmp_path, [1.0], [[4.0]])
    two = gaussian(tmp_path, [4.0], [[9.0]])
    assert frechet(one, two) == pytest.approx(9 + (2 - 3) ** 2, rel=1e-12)
    a = gaussian(tmp_path, [0, 1, 2.], np.diag([1, 4, 9.]))
    b = gaussian(tmp_path, [0, 1, 5.], np.diag([16, 4, 1.]))
    assert frechet(a, b) == pytest.approx(9 + 9 + 0 + 4, rel=1e-12)
    # 2 x 2: Tr √M = √(Tr M + 2 √det M)
    s, t = np.array([[2, 1], [1, 2.]]), np.array([[3, -1], [-1, 1.]])
    cross = math.sqrt(np.trace(s @ t) + 2 * math.sqrt(np.linalg.det(s @ t)))
    a, b = gaussian(tmp_path, [0, 0.], s), gaussian(tmp_path, [1, 2.], t)
    assert frechet(a, b) == pytest.approx(5 + 4 + 4 - 2 * cross, rel=1e-12)


@pytest.fixture
def fid_of(monkeypatch):
    """pytorch-fid's distance of features; it asks SciPy's root for an answer gone in SciPy 1.18."""
    monkeypatch.setattr(fid_score.linalg, "sqrtm", lambda m, disp=True: (sqrtm(m), 0.0))
    return lambda x, y: fid_score.calculate_frechet_distance(
        x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))


def test_the_distance_is_pytorch_fid_s(fid_of):
    x, y = features(500, 96), features(700, 96, seed=1) + 0.5
    a, b = statistics_of(x), statistics_of(y)
    assert frechet(a, b) == pytest.approx(fid_of(x.numpy(), y.numpy()), rel=1e-6)
    root = sqrtm(a.covariance @ b.covariance).real
    apart = a.mean - b.mean
    plain = apart @ apart + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet(a, b) == pytest.approx(plain, rel=1e-9)


def nuclear(x, y) -> float:
    """The distance from the features themselves: Tr √(Σ₁Σ₂) is the nuclear norm of X Yᵀ."""
    a, b = (v.numpy() - v.numpy().mean(0) for v in (x, y))
    a, b = a / math.sqrt(len(a) - 1), b / math.sqrt(len(b) - 1)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    apart = x.numpy().mean(0) - y.numpy().mean(0)
    return apart @ apart + np.square(a).sum() + np.square(b).sum() - 2 * cross


@pytest.mark.parametrize("n, m", [(20, 30), (20, 500), (500, 20), (2, 2)])
def test_fewer_images_than_dimensions(n, m):
    x, y = features(n, 64), features(m, 64, seed=1)
    a, b = statistics_of(x), statistics_of(y)
    assert frechet(a, b) == pytest.approx(nuclear(x, y), rel=1e-6)
    assert frechet(b, a) == pytest.approx(nuclear(x, y), rel=1e-6)


def test_noise_does_not_hide_a_small_distance_between_few_images():
    x = features(10, 256) - 100
    x -= x.mean(0)
    expected = 0.001**2 * statistics_of(x).covariance.trace()
    assert frechet(statistics_of(x), statistics_of(1.001 * x)) == pytest.approx(expected, rel=1e-6)


def test_degenerate_sets():
    of = statistics_of
    x, y = features(200, 16), features(200, 16, seed=1)
    assert frechet(of(x), of(x)) < 1e-9 * of(x).covariance.trace()
    few = features(10, 64)
    assert frechet(of(few), of(few)) < 1e-9 * of(few).covariance.trace()
    x[:, 3] = 7.0                                            # one channel never changes
    assert frechet(of(x), of(y)) == pytest.approx(nuclear(x, y), rel=1e-6)
    same = torch.full((5, 16), 2.0)                          # nor does any
    expected = of(x).covariance.trace() + ((of(x).mean - 2) ** 2).sum()
    assert frechet(of(same), of(x)) == pytest.approx(expected, rel=1e-12)
    assert frechet(of(x), of(same)) == pytest.approx(expected, rel=1e-12)
    one = of(x[:1])                                          # one image has no spread
    assert one.n == 1 and not one.covariance.any() and math.isfinite(frechet(one, of(x)))
    assert frechet(one, one) == 0.0
    with pytest.raises(BadInput, match="16 features an image and 64"):
        frechet(of(x), of(few))


# ----------------------------------------------------------------------- Inception

@pytest.fixture(scope="module")
def weights():
    """Random weights under which activations keep their scale, and features differ."""
    torch.manual_seed(0)
    network = networks.Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    fc = {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}
    return network.state_dict() | fc


@pytest.fixture
def inception_file(weights, tmp_path, monkeypatch):
    """Those weights as pytorch-fid's file, in the old format it has, without batch counters."""
    path = tmp_path / networks.INCEPTION
    plain = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    torch.save(plain, path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(networks, "INCEPTION_SHA256", sha256(path))
    return path


@pytest.mark.full
def test_features_are_pytorch_fid_s(weights, inception_file, fid_of, monkeypatch):
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: weights)
    theirs = pytorch_fid.inception.InceptionV3([3]).eval()
    network = networks.load_inception(inception_file)
    generator = torch.Generator().manual_seed(0)
    attributes = postcards.sample_attributes(6, generator)
    sets = []
    large = torch.randint(256, (2, 3, 400, 320), generator=generator).byte()   # to be shrunk
    with torch.no_grad():
        expected = theirs(large.float() / 255)[0][:, :, 0, 0]
    assert (network(large) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for style, side in (("postcard", 64), ("watercolor", 48)):
        images = postcards.draw(attributes, style, generator)[:, :, :side]
        images = (images * 255).round().byte()
        with torch.no_grad():
            expected = theirs(images.float() / 255)[0][:, :, 0, 0]
        output = network(images)
        assert output.shape == (6, 2048) and expected.std(0).mean() > 1e-2 * expected.abs().mean()
        assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
        sets.append((output, expected.double().numpy()))
    # in a few of the dimensions, or the matrix root of theirs takes a minute
    x, y = (expected[:, 5:1000:250] for _, expected in sets)
    a, b = (statistics_of(output[:, 5:1000:250]) for output, _ in sets)
    assert frechet(a, b) == pytest.approx(fid_of(x, y), rel=1e-6)


def test_the_weight_file_is_found_and_checked(empty, inception_file):
    assert networks.find_inception() is None
    cache = empty / "torch/hub/checkpoints"
    cache.mkdir(parents=True)
    (cache / networks.INCEPTION).symlink_to(inception_file)
    assert networks.find_inception() == cache / networks.INCEPTION
    assert networks.find_inception("other.pth").name == "other.pth"
    name, _ = networks.choose_extractor(miniature=True)
    assert name == "CLIP-FID (the miniature's CLIP)"
    name, network = networks.choose_extractor(miniature=False)
    assert name == "FID" and network.protocol["sha256"] == networks.INCEPTION_SHA256
    name, _ = networks.choose_extractor(False, clip_model="mini", prefer_clip=True)
    assert name == "CLIP-FID (the miniature's CLIP)"
    name, _ = networks.choose_extractor(True, inception=str(inception_file), prefer_clip=True)
    assert name == "FID"
    inception_file.write_bytes(inception_file.read_bytes()[:-1])
    with pytest.raises(BadInput, match="has SHA-256 .*not .*pytorch-fid's releases"):
        networks.load_inception(inception_file)


# ----------------------------------------------------------------------- folders of images

def test_any_format_size_and_mode_in_natural_order(tmp_path):
    made = {"10.png": ("RGB", (8, 6)), "2.jpg": ("RGB", (8, 6)), "1.webp": ("RGB", (5, 5)),
            "3.bmp": ("RGB", (8, 6)), "sub/7.png": ("RGBA", (4, 4)), "20.tiff": ("L", (4, 4)),
            "4.gif": ("P", (8, 6)), "5.jpeg": ("CMYK", (8, 6)), "6.PNG": ("1", (8, 6))}
    (tmp_path / "sub").mkdir()
    for name, (mode, size) in made.items():
        Image.new("RGB", size, (250, 120, 10)).convert(mode).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"half of one")
    batches = list(images_in(tmp_path, 3))
    names = [str(p.relative_to(tmp_path)) for paths, _ in batches for p in paths]
    assert names == ["1.webp", "2.jpg", "3.bmp", "4.gif", "5.jpeg", "6.PNG", "10.png", "20.tiff",
                     "sub/7.png"]
    for paths, images in batches:
        assert images.dtype == torch.uint8 and images.shape[:2] == (len(paths), 3)
        size = made[str(paths[0].relative_to(tmp_path))][1]
        assert len(paths) <= 3 and images.shape[:1:-1] == size
    assert batches[0][1][0, 0].float().mean() > 240 > batches[0][1][0, 2].float().mean()


def test_images_are_read_as_they_are_seen_and_as_for_training(tmp_path):
    """16 bits of grey are scaled, transparency is white, and EXIF turns an image upright."""
    grey = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "grey.tif")
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 20, 64))
    clear.save(tmp_path / "clear.png")
    clear.quantize().save(tmp_path / "palette.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6                      # to be turned by 90°
    clear.convert("RGB").save(tmp_path / "turned.webp", exif=exif, lossless=True)
    for path in tmp_path.iterdir():
        with path.open("rb") as file:
            assert torch.equal(folders.read_image(path), square(file, 64)), path
    assert folders.read_image(tmp_path / "grey.png")[0, 0].tolist() == [x // 257 for x in grey[0]]
    assert folders.read_image(tmp_path / "palette.png")[:, 0, 63].tolist() == [255, 255, 255]
    turned = folders.read_image(tmp_path / "turned.webp")
    assert turned[2].eq(255)[:20].all() and not turned[2].eq(255)[20:].any()


def test_permission_denied_is_said_as_such(empty, capsys, monkeypatch):
    """For a folder, and for images in it. The user root may read everything, so it is acted."""
    postcard_folder(empty / "a", 2)
    (empty / "a/001.png").write_bytes(b"")
    monkeypatch.setattr(folders.os, "access", lambda path, _: path.name != "001.png")
    assert "a/001.png (permission denied); take" in clean_refusal(capsys, "fid", "a", "a")

    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", str(folder)))
        return iter(())

    monkeypatch.setattr(folders.os, "walk", walk)
    assert clean_refusal(capsys, "fid", "a", "a") == "eval.py: a: Permission denied"


def test_contact_sheets_are_left_out(tmp_path):
    sheet, image, info = Image.new("RGB", (8, 8)), Image.new("RGB", (4, 4)), PngInfo()
    info.add_text("ppdd", "{}")
    info.add_text("parameters", "a tree\nSteps: 8")
    image.save(tmp_path / "grid-3.png")                      # somebody's image of a grid
    image.save(tmp_path / "000.png", pnginfo=info)
    info.add_text("sheet", "grid")
    for name in ("grid.png", "grid-2.png", "compare-2.png"):
        sheet.save(tmp_path / name, pnginfo=info)
    assert [p.name for p in image_files(tmp_path)] == ["000.png", "grid-3.png"]


def test_no_more_images_are_held_than_some_batches(tmp_path, monkeypatch):
    postcard_folder(tmp_path / "a", 60)
    read, plain = [], folders.read_image
    monkeypatch.setattr(folders, "read_image", lambda path: read.append(path) or plain(path))
    stream = images_in(tmp_path / "a", 4)
    next(stream)
    stream.close()
    assert len(read) <= 4 * (folders.BATCHES_AHEAD + 1)


def spoil(folder) -> None:
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[:len(whole) // 2])
    (folder / "003.png").write_bytes(b"")
    (folder / "005.png").write_text("<html>")


def test_bad_images_are_named_and_counted_and_end_it(empty, capsys):
    good = postcard_folder(empty / "a", 8)
    spoil(empty / "a")
    sentence = clean_refusal(capsys, "fid", "a", "a", "--batch", 2)
    assert "3 of 8 images can't be read" in sentence and "--skip-bad" in sentence
    assert all(f"a/{k:03d}.png" in sentence for k in (1, 3, 5))
    left = [image for _, images in images_in("a", 3, skip_bad=True) for image in images]
    assert torch.equal(torch.stack(left), good[[0, 2, 4, 6, 7]])
    assert "3 of 8 images can't be read" in capsys.readouterr().err
    result, _ = result_of(capsys, "fid", "a", "a", "--skip-bad")
    assert result["sets"][0] == {"folder": "a", "images": 5, "left out": 3}
    for path in (empty / "a").iterdir():
        path.write_bytes(b"")
    sentence = clean_refusal(capsys, "fid", "a", "a", "--skip-bad")
    assert "a: none of its 8 images can be read" in sentence


# ----------------------------------------------------------------------- eval.py fid

def test_the_distance_of_two_folders(empty, capsys):
    clip = load_clip("mini")
    a, b = postcard_folder(empty / "a", 30), postcard_folder(empty / "b", 40, 1, "watercolor")
    result, printed = result_of(capsys, "fid", "a", "b", "--batch", 7)
    expected = frechet(statistics_of(clip.images(a)), statistics_of(clip.images(b)))
    assert result["value"] == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert printed.startswith("CLIP-FID (the miniature's CLIP): ") and "\nFID" not in printed
    assert "30 images of a" in printed and "40 of b" in printed
    assert result["score"] == "CLIP-FID (the miniature's CLIP)"
    assert result["settings"]["batch"] == 7 and len(result["network"]["sha256"]) == 64
    assert {"hardware", "versions", "commit"} <= set(result)
    assert "Resize" in result["network"]["resize"]
    command("fid a --save a.npz")
    command("fid a --save", "named so")                      # what is no .npz could not be read
    assert (empty / "named so.npz").stat().st_size == (empty / "a.npz").stat().st_size
    assert list(empty.glob(".*")) == []
    stored, _ = result_of(capsys, "fid", "a.npz", "b")
    assert stored["value"] == pytest.approx(result["value"], rel=1e-5)
    assert stored["sets"][0]["images"] == 30
    same, _ = result_of(capsys, "fid", "a.npz", "a.npz")
    assert same["value"] < 1e-6 and same["score"] == result["score"]


@pytest.mark.full
def test_fid_where_inception_is_there(empty, capsys, inception_file):
    postcard_folder(empty / "a", 3)
    postcard_folder(empty / "b", 2, 1)
    result, printed = result_of(capsys, "fid", "a", "b", "--inception", inception_file)
    assert result["score"] == "FID" and printed.startswith("FID: ") and result["value"] > 0
    assert "no antialias" in result["network"]["resize"]
    command("fid a --save a.npz --inception", inception_file)
    assert "different networks" in clean_refusal(capsys, "fid", "a.npz", "b", "--clip-model",
                                                 "mini")
    np.savez("theirs.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    result, _ = result_of(capsys, "fid", "theirs.npz", "b", "--inception", inception_file)
    assert result["score"] == "FID" and result["sets"][0]["images"] is None
    assert "2048 features an image and 128" in clean_refusal(capsys, "fid", "theirs.npz", "b")


@pytest.mark.full
def test_small_sets_are_warned_of(empty, capsys, inception_file):
    postcard_folder(empty / "a", 2)
    command("fid a a --inception", inception_file)
    warnings = capsys.readouterr().err
    assert "biased" in warnings and "2 images can't fill 2048 dimensions" in warnings
    command("fid a a --clip-model mini")
    warnings = capsys.readouterr().err
    assert "biased" not in warnings and "2 images can't fill 128 dimensions" in warnings
