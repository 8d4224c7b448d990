"""eval.py against pytorch-fid, open_clip and closed forms, and what its commands say."""

import json
import math
import os
import re
import zlib

import numpy as np
import open_clip
import pytest
import pytorch_fid.inception
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pytorch_fid import fid_score
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm

import eval as ours
import ppdd
from eval import BadInput, Statistics, frechet, pictures_in, read_prompts
from mini import postcards


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, no weights of Inception or CLIP on this machine, no connection."""
    def download(*_, **__):
        raise OSError("no connection\nto be had")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(open_clip, "download_pretrained", download)
    return tmp_path


def refusal(capsys, *argv) -> str:
    """The sentence on stderr of a command that must end with exit code 2, and write nothing."""
    before = {p for p in os.listdir(".")}
    with pytest.raises(SystemExit) as exit:
        ours.main([str(word) for word in argv])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and said.startswith("eval.py: ") and set(os.listdir(".")) == before
    return said


def result_of(capsys, *argv) -> tuple[dict, str]:
    """The result file of a command, and what it printed."""
    ours.main([*map(str, argv), "--out", "result.json"])
    with open("result.json") as file:
        return json.load(file), capsys.readouterr().out


def postcard_folder(folder, n: int, seed: int = 0, style: str = "postcard"):
    """n pictures of the miniature's world, 000.png and so on, as the tensor that they hold."""
    generator = torch.Generator().manual_seed(seed)
    attributes = postcards.sample_attributes(n, generator)
    pictures = (postcards.draw(attributes, style, generator) * 255).round().byte()
    folder.mkdir()
    for k, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{k:03d}.png")
    return pictures


# ----------------------------------------------------------------------- statistics

def features(n: int, d: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    """Correlated features (n, d), far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix * scale + 100


def of(x: torch.Tensor, batch: int = 7) -> Statistics:
    statistics = Statistics()
    for part in x.split(batch):
        statistics.add(part)
    return statistics


def gaussian(folder, mean, covariance) -> Statistics:
    np.savez(folder / "gaussian.npz", mu=np.array(mean), sigma=np.array(covariance))
    return Statistics.load(folder / "gaussian.npz")


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_streamed_statistics_are_numpy_s(batch):
    x = features(150, 12)
    statistics = of(x, batch)
    assert statistics.n == 150 and statistics.mean.dtype == statistics.covariance.dtype == float
    np.testing.assert_allclose(statistics.mean, x.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.covariance, np.cov(x.numpy(), rowvar=False), atol=1e-11)


def test_float32_features_far_from_zero_lose_nothing():
    x = (features(400, 5, scale=0.01) + 1e4).float()
    np.testing.assert_allclose(of(x).covariance, np.cov(x.double().numpy(), rowvar=False),
                               rtol=1e-9)


def test_merged_statistics_are_those_of_all_and_leave_the_other_alone():
    x = features(90, 6)
    a, b, both = of(x[:20]), of(x[20:]), Statistics()
    kept = b.covariance.copy()
    both.merge(b)
    both.merge(a)
    np.testing.assert_allclose(both.covariance, np.cov(x.numpy(), rowvar=False), atol=1e-11)
    assert both.n == 90 and np.array_equal(b.covariance, kept)


def test_memory_does_not_grow_with_pictures():
    def held(n):
        return sum(v.nbytes for v in vars(of(features(n, 8))).values() if hasattr(v, "nbytes"))
    assert held(10) == held(1000)


def test_statistics_on_disk_are_pytorch_fid_s(tmp_path):
    x = features(40, 6)
    a = of(x)
    a.of = "FID"
    a.save(tmp_path / "a.npz")
    again = Statistics.load(tmp_path / "a.npz")
    np.testing.assert_allclose(again.covariance, a.covariance, rtol=1e-14)
    assert (again.n, again.of) == (40, "FID") and frechet(a, again) < 1e-9
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
    a, b = of(x), of(y)
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
def test_fewer_pictures_than_dimensions(n, m):
    x, y = features(n, 64), features(m, 64, seed=1)
    assert frechet(of(x), of(y)) == pytest.approx(nuclear(x, y), rel=1e-6)
    assert frechet(of(y), of(x)) == pytest.approx(nuclear(x, y), rel=1e-6)


def test_noise_does_not_hide_a_small_distance_between_few_pictures():
    x = features(10, 256) - 100
    x -= x.mean(0)
    expected = 0.001**2 * of(x).covariance.trace()
    assert frechet(of(x), of(1.001 * x)) == pytest.approx(expected, rel=1e-6)


def test_degenerate_sets():
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
    one = of(x[:1])                                          # one picture has no spread
    assert one.n == 1 and not one.covariance.any() and math.isfinite(frechet(one, of(x)))
    assert frechet(one, one) == 0.0
    with pytest.raises(BadInput, match="16 features a picture and 64"):
        frechet(of(x), of(few))


# ----------------------------------------------------------------------- Inception

@pytest.fixture(scope="module")
def weights():
    """Random weights under which activations keep their scale, and features differ."""
    torch.manual_seed(0)
    network = ours.Inception()
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
    path = tmp_path / ours.INCEPTION
    plain = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    torch.save(plain, path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(ours, "INCEPTION_SHA", ppdd.fingerprint(path))
    return path


def test_features_are_pytorch_fid_s(weights, inception_file, fid_of, monkeypatch):
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: weights)
    theirs = pytorch_fid.inception.InceptionV3([3]).eval()
    network = ours.load_inception(inception_file)
    generator = torch.Generator().manual_seed(0)
    attributes = postcards.sample_attributes(6, generator)
    sets = []
    large = torch.randint(256, (2, 3, 400, 320), generator=generator).byte()   # to be shrunk
    with torch.no_grad():
        expected = theirs(large.float() / 255)[0][:, :, 0, 0]
    assert (network(large) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for style, side in (("postcard", 64), ("watercolor", 48)):
        pictures = postcards.draw(attributes, style, generator)[:, :, :side]
        pictures = (pictures * 255).round().byte()
        with torch.no_grad():
            expected = theirs(pictures.float() / 255)[0][:, :, 0, 0]
        got = network(pictures)
        assert got.shape == (6, 2048) and expected.std(0).mean() > 1e-2 * expected.abs().mean()
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        sets.append((got, expected.double().numpy()))
    # in a few of the dimensions, or the matrix root of theirs takes a minute
    x, y = (expected[:, 5:1000:250] for _, expected in sets)
    a, b = (of(got[:, 5:1000:250]) for got, _ in sets)
    assert frechet(a, b) == pytest.approx(fid_of(x, y), rel=1e-6)


def test_the_weight_file_is_found_and_checked(here, inception_file):
    assert ours.find_inception() is None
    cache = here / "torch/hub/checkpoints"
    cache.mkdir(parents=True)
    (cache / ours.INCEPTION).symlink_to(inception_file)
    assert ours.find_inception() == cache / ours.INCEPTION
    assert ours.find_inception("other.pth").name == "other.pth"
    asked = ours.Config("fid", device="cpu")
    assert ours.extractor(asked, base_is_mini=True)[0] == "CLIP-FID (the miniature's CLIP)"
    name, network = ours.extractor(asked, base_is_mini=False)
    assert name == "FID" and network.protocol["sha256"] == ours.INCEPTION_SHA
    inception_file.write_bytes(inception_file.read_bytes()[:-1])
    with pytest.raises(BadInput, match="has SHA-256 .*not .*pytorch-fid's releases"):
        ours.load_inception(inception_file)


# ----------------------------------------------------------------------- CLIP

@pytest.fixture(scope="module")
def clip():
    return ours.load_clip("mini")


@pytest.fixture(scope="module")
def direct():
    """The miniature's CLIP by plain open_clip calls: cosines of PIL pictures and texts."""
    folder = ppdd.MINI.parent
    model = open_clip.CLIP(**json.loads((folder / "clip.json").read_text())).eval()
    model.load_state_dict(load_file(folder / "clip.safetensors"))

    def cosines(pictures: torch.Tensor, texts: list[str]) -> torch.Tensor:
        with torch.no_grad():
            u = model.encode_image(pictures / 255, normalize=True)
            v = model.encode_text(open_clip.tokenize(texts), normalize=True)
        return (u * v).sum(1)

    return cosines


def test_scores_are_open_clip_s(clip, direct):
    pictures = postcards.draw(torch.tensor([[0, 0, 0, 2, 1, 1], [3, 3, 2, 1, 2, 0]]))
    pictures = (pictures * 255).round().byte()
    texts = ["a big red boat on the sea at sunset, in the middle",
             "a small green cactus in the desert at noon, on the right"]
    scores = ours.clip_scores(clip, pictures, texts)
    assert torch.allclose(scores, direct(pictures, texts), atol=1e-6)
    assert (scores > ours.clip_scores(clip, pictures, texts[::-1]) + 0.1).all()
    assert torch.allclose(clip.images(pictures).norm(dim=1), torch.ones(2), atol=1e-6)
    assert torch.equal(clip(pictures), clip.images(pictures))


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A model in open_clip's list, small, with random weights in a file."""
    folder = tmp_path_factory.mktemp("clip")
    config = {"embed_dim": 32, "vision_cfg": {"image_size": 48, "layers": 1, "width": 64,
                                              "patch_size": 16, "head_width": 32},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                           "layers": 1}}
    (folder / "tiny-test-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-test-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test-clip")
    save_file(model.state_dict(), folder / "openai.safetensors")
    save_file(model.state_dict(), folder / "plain.safetensors")
    return folder


@pytest.mark.parametrize("file", ["plain.safetensors", "openai.safetensors"])
def test_a_local_file_is_open_clip_s(small_clip, file):
    spec, quick = f"tiny-test-clip:{small_clip / file}", file.startswith("openai")
    clip = ours.load_clip(spec)
    theirs, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-test-clip", pretrained=str(small_clip / file), force_quick_gelu=quick)
    theirs.eval()
    tokens = open_clip.get_tokenizer("tiny-test-clip")
    pictures = torch.randint(256, (3, 3, 48, 48), generator=torch.Generator().manual_seed(0))
    pictures = pictures.byte()
    read = torch.stack([preprocess(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pictures])
    assert torch.allclose(clip.prepare(pictures), read, atol=1e-6)
    with torch.no_grad():
        expected = theirs.encode_image(read, normalize=True)
        assert torch.allclose(clip.images(pictures), expected, atol=1e-5)
        texts = ["a boat", "x " * 200, ""]
        expected = theirs.encode_text(tokens(texts), normalize=True)
    assert torch.allclose(clip.texts(texts), expected, atol=1e-5)
    other = ours.load_clip(spec.replace(file, "plain.safetensors")).images(pictures)
    assert torch.allclose(other, clip.images(pictures), atol=1e-5) != quick
    assert clip.name == spec and len(clip.protocol["sha256"]) == 64
    assert clip.protocol["activation"] == ("QuickGELU" if quick else "GELU")


@pytest.mark.parametrize("height, width", [(120, 70), (31, 64)])
def test_resized_pictures_are_pillow_s_but_for_a_level_or_two(small_clip, height, width):
    clip = ours.load_clip(f"tiny-test-clip:{small_clip / 'plain.safetensors'}")
    attributes = postcards.sample_attributes(1, torch.Generator().manual_seed(0))
    picture = torch.nn.functional.interpolate(postcards.draw(attributes), (height, width),
                                              mode="bilinear")
    picture = (picture[0] * 255).round().byte()
    *_, preprocess = open_clip.create_model_and_transforms("tiny-test-clip")
    read = preprocess(Image.fromarray(picture.permute(1, 2, 0).numpy()))[None]
    levels = (clip.prepare(picture[None]) - read).abs() * 255 * 0.27
    assert levels.max() < 2.1 and levels.mean() < 0.15
    with torch.no_grad():
        expected = clip.model.encode_image(read, normalize=True)
    assert (clip.images(picture[None]) * expected).sum() > 0.9999


def test_a_clip_that_is_not_to_be_had(here, small_clip):
    for spec, said in (("ViT-g-14:laion2b_s34b_b88k", "can't be loaded .*ViT-g-14:FILE"),
                       ("ViT-g-14:nothing", "no such file, nor such a tag of ViT-g-14"),
                       ("ViT-g-14", "MODEL:TAG, MODEL:FILE or mini"),
                       ("nothing:openai", "MODEL:TAG, MODEL:FILE or mini"),
                       (f"ViT-B-32:{small_clip / 'plain.safetensors'}", "can't be loaded")):
        with pytest.raises(BadInput, match=said) as error:
            ours.load_clip(spec)
        assert "\n" not in str(error.value)


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


def test_no_pickle_is_run(here, small_clip):
    torch.save({"state_dict": Evil()}, here / "evil.pt")
    with pytest.raises(BadInput, match="can't be loaded"):
        ours.load_clip("tiny-test-clip:evil.pt")
    assert os.listdir(here) == ["evil.pt"]


# ----------------------------------------------------------------------- pictures

def test_any_format_size_and_mode_in_natural_order(tmp_path):
    made = {"10.png": ("RGB", (8, 6)), "2.jpg": ("RGB", (8, 6)), "1.webp": ("RGB", (5, 5)),
            "3.bmp": ("RGB", (8, 6)), "sub/7.png": ("RGBA", (4, 4)), "20.tiff": ("L", (4, 4)),
            "4.gif": ("P", (8, 6)), "5.jpeg": ("CMYK", (8, 6)), "6.PNG": ("1", (8, 6))}
    (tmp_path / "sub").mkdir()
    for name, (mode, size) in made.items():
        Image.new("RGB", size, (250, 120, 10)).convert(mode).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"half of one")
    batches = list(pictures_in(tmp_path, 3))
    names = [str(p.relative_to(tmp_path)) for paths, _ in batches for p in paths]
    assert names == ["1.webp", "2.jpg", "3.bmp", "4.gif", "5.jpeg", "6.PNG", "10.png", "20.tiff",
                     "sub/7.png"]
    for paths, pictures in batches:
        assert pictures.dtype == torch.uint8 and pictures.shape[:2] == (len(paths), 3)
        assert len(paths) <= 3 and pictures.shape[:1:-1] == made[str(paths[0].relative_to(
            tmp_path))][1]
    assert batches[0][1][0, 0].float().mean() > 240 > batches[0][1][0, 2].float().mean()


def test_contact_sheets_are_no_pictures(tmp_path):
    sheet, picture, info = Image.new("RGB", (8, 8)), Image.new("RGB", (4, 4)), PngInfo()
    info.add_text("ppdd", "{}")
    info.add_text("parameters", "a tree\nSteps: 8")
    picture.save(tmp_path / "grid-3.png")                    # somebody's picture of a grid
    picture.save(tmp_path / "000.png", pnginfo=info)
    info.add_text("sheet", "grid")
    for name in ("grid.png", "grid-2.png", "compare-2.png"):
        sheet.save(tmp_path / name, pnginfo=info)
    assert [p.name for p in ours.picture_files(tmp_path)] == ["000.png", "grid-3.png"]


def test_no_more_pictures_are_held_than_some_batches(tmp_path, monkeypatch):
    postcard_folder(tmp_path / "a", 60)
    read, plain = [], ours.read_picture
    monkeypatch.setattr(ours, "read_picture", lambda path: read.append(path) or plain(path))
    stream = pictures_in(tmp_path / "a", 4)
    next(stream)
    stream.close()
    assert len(read) <= 4 * (ours.AHEAD + 1)


def spoil(folder) -> None:
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[:len(whole) // 2])
    (folder / "003.png").write_bytes(b"")
    (folder / "005.png").write_text("<html>")


def test_bad_pictures_are_named_and_counted_and_end_it(here, capsys):
    good = postcard_folder(here / "a", 8)
    spoil(here / "a")
    said = refusal(capsys, "fid", "a", "a", "--batch", 2)
    assert "3 of 8 pictures can't be read" in said and "--skip-bad" in said
    assert all(f"a/{k:03d}.png" in said for k in (1, 3, 5))
    left = [p for _, pictures in pictures_in("a", 3, skip_bad=True) for p in pictures]
    assert torch.equal(torch.stack(left), good[[0, 2, 4, 6, 7]])
    assert "3 of 8 pictures can't be read" in capsys.readouterr().err
    result, _ = result_of(capsys, "fid", "a", "a", "--skip-bad")
    assert result["sets"][0] == {"folder": "a", "pictures": 5, "left out": 3}
    for path in (here / "a").iterdir():
        path.write_bytes(b"")
    assert "a: none of its 8 pictures can be read" in refusal(capsys, "fid", "a", "a", "--skip-bad")


# ----------------------------------------------------------------------- prompts

def test_prompts_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa boat\r\n\r\nan  été, \u2028at sea\r\n last \n\n",
                                    encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "a.txt") == ["a boat", "an été, at sea", "last"]


@pytest.mark.parametrize("name", ["captions_val2014.json", "captions_val2017.json"])
def test_one_caption_an_image_of_coco(tmp_path, name):
    notes = [{"image_id": i, "id": 10 * i + k, "caption": f"image {i} said {k}\n"}
             for i in (42, 7, 100) for k in (2, 0, 1)]
    (tmp_path / name).write_text(json.dumps({"images": [{"id": 7}], "annotations": notes}))
    drawn = {tuple(read_prompts(tmp_path / name, seed=s)) for s in range(20)}
    assert len(drawn) > 5 and all([c.split()[1] for c in d] == ["7", "42", "100"] for d in drawn)
    assert {d[0] for d in drawn} == {f"image 7 said {k}" for k in range(3)}
    assert read_prompts(tmp_path / name, seed=3) == read_prompts(tmp_path / name, seed=3)


@pytest.mark.parametrize("name, text", [
    ("val2014_30k.tsv", "id\tcaption\n1\ta boat, red\n2\ta house\n3\tcar\n"),
    ("tabs.TSV", "caption\tid\r\na boat, red\t1\r\na house\t2\r\ncar\t3\r\n"),
    ("MS-COCO_val2014_30k_captions.csv",
     ',image_id,caption\n0,1,"a boat, red"\n1,2,a house\n2,3,car\n'),
    ("with_text.csv", '\ufefftext,file\n"a boat, red",a b.jpg\na house,b c.jpg\ncar,c d.jpg\n'),
    ("Windows.CSV", "key, Caption\r\n1,\"a boat, red\"\r\n2,a house\r\n3,car\r\n4\r\n"),
])
def test_prompts_of_a_table(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == ["a boat, red", "a house", "car"]


def test_a_quotation_mark_in_a_tsv_is_a_letter(tmp_path):
    (tmp_path / "a.tsv").write_text('id\tcaption\n1\t"A man on a horse\n2\ta "stop" sign\n3\ta"\n')
    assert read_prompts(tmp_path / "a.tsv") == ['"A man on a horse', 'a "stop" sign', 'a"']


def test_prompts_are_drawn_by_seed_in_the_file_s_order(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"{k:03d}" for k in range(200)))
    some = read_prompts(tmp_path / "a.txt", 20, seed=1)
    assert len(set(some)) == 20 and some == sorted(some)
    assert some == read_prompts(tmp_path / "a.txt", 20, seed=1)
    assert some != read_prompts(tmp_path / "a.txt", 20, seed=2)
    with pytest.raises(BadInput, match="holds 200 prompts only"):
        read_prompts(tmp_path / "a.txt", 201)


@pytest.mark.parametrize("name, data, said", [
    ("a.txt", b"\n \n", "no prompt"), ("a.txt", b"\xff\xfe\x00", "UTF-8"),
    ("a.json", b"[1]", "COCO"), ("a.json", b"{", "COCO"), ("a.json", b"[" * 10**5, "COCO"),
    ("a.json", b'{"annotations": [1]}', "CO"),
    ("a.csv", b"", "no column is called caption"), ("a.csv", b"a,b\na b,c d\n", "no column"),
    ("a.tsv", b"id\tcaption\n", "no prompt"), ("b.txt", None, "no such file")])
def test_prompts_that_are_none(tmp_path, name, data, said):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput, match=said):
        read_prompts(tmp_path / name)


# ----------------------------------------------------------------------- the commands

def test_the_distance_of_two_folders(here, capsys, clip):
    a, b = postcard_folder(here / "a", 30), postcard_folder(here / "b", 40, 1, "watercolor")
    result, said = result_of(capsys, "fid", "a", "b", "--batch", 7)
    expected = frechet(of(clip.images(a)), of(clip.images(b)))
    assert result["value"] == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert said.startswith("CLIP-FID (the miniature's CLIP): ") and "\nFID" not in said
    assert "30 pictures of a" in said and "40 of b" in said
    assert result["score"] == "CLIP-FID (the miniature's CLIP)"
    assert result["settings"]["batch"] == 7 and len(result["network"]["sha256"]) == 64
    assert {"hardware", "versions", "commit"} <= set(result)
    assert "Resize" in result["network"]["resize"]
    ours.main(["fid", "a", "--save", "a.npz"])
    ours.main(["fid", "a", "--save", "named so"])            # what is no .npz could not be read
    assert (here / "named so.npz").stat().st_size == (here / "a.npz").stat().st_size
    assert list(here.glob(".*")) == []
    stored, _ = result_of(capsys, "fid", "a.npz", "b")
    assert stored["value"] == pytest.approx(result["value"], rel=1e-5)
    assert stored["sets"][0]["pictures"] == 30
    same, _ = result_of(capsys, "fid", "a.npz", "a.npz")
    assert same["value"] < 1e-6 and same["score"] == result["score"]


def test_fid_where_inception_is_there(here, capsys, inception_file):
    postcard_folder(here / "a", 3)
    postcard_folder(here / "b", 2, 1)
    result, said = result_of(capsys, "fid", "a", "b", "--inception", inception_file)
    assert result["score"] == "FID" and said.startswith("FID: ") and result["value"] > 0
    assert "no antialias" in result["network"]["resize"]
    ours.main(["fid", "a", "--save", "a.npz", "--inception", str(inception_file)])
    assert "different networks" in refusal(capsys, "fid", "a.npz", "b", "--clip", "mini")
    np.savez("theirs.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    result, _ = result_of(capsys, "fid", "theirs.npz", "b", "--inception", inception_file)
    assert result["score"] == "FID" and result["sets"][0]["pictures"] is None
    assert "2048 features a picture and 128" in refusal(capsys, "fid", "theirs.npz", "b")


def test_small_sets_are_warned_of(here, capsys, inception_file):
    postcard_folder(here / "a", 2)
    ours.main(["fid", "a", "a", "--inception", str(inception_file)])
    said = capsys.readouterr().err
    assert "biased" in said and "2 pictures can't fill 2048 dimensions" in said
    ours.main(["fid", "a", "a", "--clip", "mini"])
    said = capsys.readouterr().err
    assert "biased" not in said and "2 pictures can't fill 128 dimensions" in said


def test_the_clip_score_of_a_folder(here, capsys, direct):
    pictures = postcard_folder(here / "a", 5)
    texts = [f"a red boat number {k}" for k in range(5)]
    (here / "a.txt").write_text("\n".join(texts) + "\n")
    result, said = result_of(capsys, "clip", "a", "--prompts", "a.txt", "--batch", 2)
    expected = direct(pictures, texts)
    assert result["cosine"] == pytest.approx(expected.mean().item(), abs=1e-6)
    assert result["value"] == 100 * result["cosine"] and result["pictures"] == 5
    assert f"{result['value']:.3f}" in said and "the miniature's CLIP" in said
    assert result["deviation"] == pytest.approx(expected.std().item(), abs=1e-6)
    (here / "a/002.png").write_bytes(b"")                    # its prompt goes with it
    result, _ = result_of(capsys, "clip", "a", "--prompts", "a.txt", "--skip-bad")
    assert result["cosine"] == pytest.approx(expected[[0, 1, 3, 4]].mean().item(), abs=1e-6)
    assert (result["pictures"], result["left out"]) == (4, 1)


def test_a_picture_s_own_prompt(here, capsys):
    (here / "a").mkdir()
    said = "a red boat,\non the sea"
    for k, more in enumerate(("", "\nNegative prompt: fog\nmore")):
        info = PngInfo()
        info.add_text("parameters", f"{said}{more}\nSteps: 8, Sampler: DDIM, CFG scale: 9")
        Image.new("RGB", (64, 64)).save(here / f"a/{k}.png", pnginfo=info)
    files = ours.picture_files(here / "a")
    assert [ours.prompt_in(f) for f in files] == [said, said]
    assert result_of(capsys, "clip", "a")[0]["pictures"] == 2
    Image.new("RGB", (64, 64)).save(here / "a/2.png")
    assert "a/2.png does not say its prompt: pass --prompts" in refusal(capsys, "clip", "a")
    huge = bytearray((here / "a/2.png").read_bytes())                # its header says 10¹⁰ pixels
    huge[16:24] = (100_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    (here / "a/2.png").write_bytes(huge), (here / "a/3.png").write_bytes(b"")
    assert "2 of 4 pictures can't be read" in refusal(capsys, "clip", "a")
    assert result_of(capsys, "clip", "a", "--skip-bad")[0]["left out"] == 2


@pytest.mark.parametrize("argv, said", [
    ("", "arguments are required"), ("fud a b", "invalid choice"), ("fid a", "two folders"),
    ("fid a a a", "two folders"), ("fid a nowhere", "nowhere: there is no such folder"),
    ("fid a empty", "empty: there are no pictures"), ("fid a none.npz", "none.npz: there is no"),
    ("fid a bad.npz", "bad.npz is no .npz with mu and sigma"), ("fid a a --batch 0", "--batch 0"),
    ("fid a a --inception no.pth", "no.pth is no file"), ("fid a a --device abacus", "--device"),
    ("fid a a --device cuda:99", "--device cuda:99: there is none"), ("clip", "takes one folder"),
    ("fid a a --inception bad.npz", "bad.npz has SHA-256"), ("fid a a --clip x", "--clip x"),
    ("clip a --prompts two.txt", "has 2 prompts, and there are 1 pictures"),
    ("clip a --prompts none.txt", "no such file"), ("table1 a", "takes no paths"),
    ("table1 --size huge", "--size huge"), ("fid big big", "ViT-g-14.*--inception"),
    ("fid a a --seed x", "invalid int"), ("fid a a --out empty", "empty: "),
])
def test_bad_input_is_said_in_a_sentence(here, capsys, argv, said):
    postcard_folder(here / "a", 1)
    (here / "empty").mkdir()
    (here / "big").mkdir()
    Image.new("RGB", (80, 80)).save(here / "big/1.png")
    (here / "bad.npz").write_bytes(b"PK no zip")
    (here / "two.txt").write_text("one\ntwo\n")
    assert re.search(said, refusal(capsys, *argv.split()))


def test_a_file_is_never_half_written(here):
    ours.write_json("results/a.json", {"a": 1})
    with pytest.raises(ValueError):
        ours.write_json("results/a.json", {"a": float("nan")})
    with pytest.raises(OSError), ppdd.written(here / "results/a.json") as temporary:
        temporary.write_text("half of it")
        raise OSError("no space left")
    assert os.listdir("results") == ["a.json"]
    assert json.loads((here / "results/a.json").read_text()) == {"a": 1}


# ----------------------------------------------------------------------- Table 1

@pytest.fixture(scope="module")
def table1(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("table1") / "table1.json"
    ours.main(["table1", "--out", str(path), "--device", "cpu"])
    return json.loads(path.read_text()) | {"at": path}


def test_table1_is_the_paper_s_or_says_why_not(table1):
    for row in table1["rows"]:
        if max(map(abs, row["off by %"].values())) > 0.1:
            assert "paper" in table1["notes"][row["network"]] or "vectors" in table1["notes"][
                row["network"]]
        else:
            assert row["network"] in ("base UNet", "teacher", "full guide")
    rows = {row["network"]: row for row in table1["rows"]}
    assert len(rows) == 5 and rows["teacher"]["GMACs"] == 2 * rows["base UNet"]["GMACs"]
    assert rows["base UNet"]["parameters"] == 859_520_964
    assert rows["full guide"]["parameters"] == 361_279_120
    assert rows["tiny guide, on maps"]["parameters"] == 8_273_920 + 16 * 768


def test_table1_s_arithmetic_by_hand(table1):
    rows = {row["network"]: row for row in table1["rows"]}
    assert rows["base UNet"]["GMACs"] == pytest.approx(338.61, abs=0.01)
    assert rows["base UNet"]["GMACs with attention"] == pytest.approx(402, abs=0.5)
    assert rows["full guide"]["GMACs"] == pytest.approx(116.42, abs=0.01)
    assert table1["GMACs once a picture"]["VAE decoder"] == pytest.approx(1257, abs=0.5)
    # attention of a level: both products, to the N positions themselves and to the 77 tokens
    blocks = {64: (320, 5), 32: (640, 5), 16: (1280, 5), 8: (1280, 1)}
    products = sum(n * 2 * side**2 * (side**2 + 77) * c for side, (c, n) in blocks.items()) / 1e9
    row = rows["base UNet"]
    assert row["GMACs with attention"] - row["GMACs"] == pytest.approx(products, rel=1e-9)
    # ControlNet's hint encoder at 512 pixels
    sizes = ((3, 16, 512), (16, 16, 512), (16, 32, 256), (32, 32, 256), (32, 96, 128),
             (96, 96, 128), (96, 256, 64), (256, 320, 64))
    hint = sum(9 * a * b * side**2 for a, b, side in sizes) / 1e9
    assert table1["GMACs once a picture"]["hint encoder"] == pytest.approx(hint, rel=1e-9)
    # the tiny guide: a product a weight, and on maps as many as there are positions
    assert rows["tiny guide, as computed"]["GMACs"] == pytest.approx(
        (819_200 + 491_520 + 6_963_200) / 1e9, rel=1e-9)
    points = {320: 3 * 4096 + 1024, 640: 2 * 1024 + 256, 1280: 2 * 256 + 4 * 64}
    maps = 819_200 * 4096 + 491_520 * 77 + 640 * sum(c * n for c, n in points.items())
    assert rows["tiny guide, on maps"]["GMACs"] == pytest.approx(maps / 1e9, rel=1e-9)


def test_the_cost_of_a_picture(table1):
    once, rows = table1["GMACs once a picture"], {r["network"]: r for r in table1["rows"]}
    unet, full, tiny = (rows[n]["GMACs with attention"] for n in
                        ("base UNet", "full guide", "tiny guide, as computed"))
    ends, hint = once["VAE decoder"] + once["text encoder"], once["hint encoder"]
    # keys and values of the prompt, in attention layers of these widths, and what Θ_z2 makes of it
    base, own = (2 * 77 * 768 * width / 1e9 for width in (5 * 320 + 5 * 640 + 6 * 1280,
                                                          2 * 320 + 2 * 640 + 3 * 1280))
    text = (2 * 16 * 77 * 768 + 768 * 640) / 1e9
    # the time embedding and its projections to 20,160 channels: CFG's once a step, not twice
    time = (320 * 1280 + 1280 * 1280 + 1280 * 20_160) / 1e9
    for steps in (8, 16, 50):
        cost = {method: table1["GMACs a picture"][method][str(steps)] for method in
                ("cfg", "full", "tiny")}
        less, step = (steps - 1) * base, steps * (unet + tiny)
        twice = once["text encoder"] + 2 * (steps * unet - less) - steps * time
        assert cost["cfg"] == pytest.approx(ends + twice, rel=1e-9)
        assert cost["tiny"] == pytest.approx(ends + step - less - (steps - 1) * text, rel=1e-9)
        step, less = hint + steps * (unet + full - hint), less + (steps - 1) * own
        assert cost["full"] == pytest.approx(ends + step - less, rel=1e-9)


@pytest.mark.parametrize("method", ["cfg", "full", "tiny"])
def test_a_run_s_cost_is_affine_in_its_steps(monkeypatch, method):
    nets = ours.build_networks("mini")
    monkeypatch.setattr(ours, "STEPS", (1, 4))
    z, c = torch.empty(1, 4, 8, 8, device="meta"), torch.empty(1, 77, 64, device="meta")
    guide, empty = {"full": nets.full, "tiny": nets.tiny}.get(method), {"cfg": c}.get(method)
    one, four = (ours.arithmetic(
        lambda n=n: ppdd.sample(nets.unet, z, c, 8.0, n, guide, empty)).all for n in (1, 4))
    cost = ours.picture_cost(nets, method)
    assert cost[4] - cost[1] == four - one > 0


def test_counting_sees_real_calls_as_well():
    layer, x = torch.nn.Conv2d(6, 8, 3, groups=2, bias=True), torch.randn(2, 6, 9, 7)
    expected = 2 * 8 * 7 * 5 * 3 * 9
    counted = ours.arithmetic(lambda: layer(x))
    assert counted == (expected, expected)
    q = torch.randn(2, 4, 10, 16)
    counted = ours.arithmetic(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert counted == (0, 2 * 2 * 4 * 10 * 10 * 16)


def test_table1_of_the_miniature_in_markdown(here, capsys):
    result, said = result_of(capsys, "table1", "--size", "mini")
    base = ppdd.load_base(ppdd.MINI)
    count = sum(p.numel() for p in base.unet.parameters())
    assert result["rows"][0]["parameters"] == count and f"{count:,}" in said
    assert "paper" not in result["rows"][0] and "the miniature, 64 x 64" in said
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5 + 2 + 3 and {line.count("|") for line in table[:7]} == {9}


def test_a_broken_package_beside_ours_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "gone-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    versions = ours.surroundings(ours.Config(device="cpu"), "nowhere")["versions"]
    assert versions["torch"] in torch.__version__ and versions["nowhere"] is None
