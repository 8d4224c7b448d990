"""CLIP and its score against open_clip; the prompts of images; `eval.py clip`."""

# ruff: noqa: F811 (fixtures are imported, and named again as arguments)

import json
import os
import zlib

import open_clip
import pytest
import torch
from eval_helpers import clean_refusal, empty, postcard_folder, result_of  # noqa: F401
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from evaluation.clip_score import clip_cosines
from evaluation.features import load_clip
from evaluation.folders import image_files
from mini import postcards
from support.base import MINI
from support.cli import BadInput
from support.images import prompt_in_image


@pytest.fixture(scope="module")
def clip():
    return load_clip("mini")


@pytest.fixture(scope="module")
def direct():
    """The miniature's CLIP by plain open_clip calls: cosines of images and texts."""
    folder = MINI.parent
    model = open_clip.CLIP(**json.loads((folder / "clip.json").read_text())).eval()
    model.load_state_dict(load_file(folder / "clip.safetensors"))

    def cosines(images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        with torch.no_grad():
            u = model.encode_image(images / 255, normalize=True)
            v = model.encode_text(open_clip.tokenize(texts), normalize=True)
        return (u * v).sum(1)

    return cosines


def test_scores_are_open_clip_s(clip, direct):
    images = postcards.draw(torch.tensor([[0, 0, 0, 2, 1, 1], [3, 3, 2, 1, 2, 0]]))
    images = (images * 255).round().byte()
    texts = ["a big red boat on the sea at sunset, in the middle",
             "a small green cactus in the desert at noon, on the right"]
    cosines = clip_cosines(clip, images, texts)
    assert torch.allclose(cosines, direct(images, texts), atol=1e-6)
    assert (cosines > clip_cosines(clip, images, texts[::-1]) + 0.1).all()
    assert torch.allclose(clip.images(images).norm(dim=1), torch.ones(2), atol=1e-6)
    assert torch.equal(clip(images), clip.images(images))


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
    clip = load_clip(spec)
    theirs, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-test-clip", pretrained=str(small_clip / file), force_quick_gelu=quick)
    theirs.eval()
    tokens = open_clip.get_tokenizer("tiny-test-clip")
    images = torch.randint(256, (3, 3, 48, 48), generator=torch.Generator().manual_seed(0))
    images = images.byte()
    read = torch.stack([preprocess(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in images])
    assert torch.allclose(clip.preprocess(images), read, atol=1e-6)
    with torch.no_grad():
        expected = theirs.encode_image(read, normalize=True)
        assert torch.allclose(clip.images(images), expected, atol=1e-5)
        texts = ["a boat", "x " * 200, ""]
        expected = theirs.encode_text(tokens(texts), normalize=True)
    assert torch.allclose(clip.texts(texts), expected, atol=1e-5)
    other = load_clip(spec.replace(file, "plain.safetensors")).images(images)
    assert torch.allclose(other, clip.images(images), atol=1e-5) != quick
    assert clip.name == spec and len(clip.protocol["sha256"]) == 64
    assert clip.protocol["activation"] == ("QuickGELU" if quick else "GELU")


@pytest.mark.parametrize("height, width", [(120, 70), (31, 64)])
def test_resized_images_are_pillow_s_but_for_a_level_or_two(small_clip, height, width):
    clip = load_clip(f"tiny-test-clip:{small_clip / 'plain.safetensors'}")
    attributes = postcards.sample_attributes(1, torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(postcards.draw(attributes), (height, width),
                                            mode="bilinear")
    image = (image[0] * 255).round().byte()
    *_, preprocess = open_clip.create_model_and_transforms("tiny-test-clip")
    read = preprocess(Image.fromarray(image.permute(1, 2, 0).numpy()))[None]
    levels = (clip.preprocess(image[None]) - read).abs() * 255 * 0.27
    assert levels.max() < 2.1 and levels.mean() < 0.15
    with torch.no_grad():
        expected = clip.model.encode_image(read, normalize=True)
    assert (clip.images(image[None]) * expected).sum() > 0.9999


def test_a_clip_that_is_not_to_be_had(empty, small_clip):
    for spec, message in (("ViT-g-14:laion2b_s34b_b88k", "can't be loaded .*ViT-g-14:FILE"),
                          ("ViT-g-14:nothing", "no such file, nor such a tag of ViT-g-14"),
                          ("ViT-g-14", "MODEL:TAG, MODEL:FILE or mini"),
                          ("nothing:openai", "MODEL:TAG, MODEL:FILE or mini"),
                          (f"ViT-B-32:{small_clip / 'plain.safetensors'}", "can't be loaded")):
        with pytest.raises(BadInput, match=message) as error:
            load_clip(spec)
        assert "\n" not in str(error.value)


def test_a_download_is_announced_with_its_size_before_it_begins(empty, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(empty))
    with pytest.raises(BadInput, match="can't be loaded"):
        load_clip("ViT-B-32:openai")
    message = capsys.readouterr().err
    assert "downloading CLIP ViT-B-32:openai, about 0.6 GB" in message
    assert all(way in message for way in ("ViT-B-32:FILE", "--clip-model mini", "--inception pt_"))
    snapshot = empty / "hub/models--timm--vit_base_patch32_clip_224.openai/snapshots/1"
    snapshot.mkdir(parents=True)
    (snapshot / "open_clip_model.safetensors").touch()
    with pytest.raises(BadInput, match="can't be loaded"):
        load_clip("ViT-B-32:openai")
    assert capsys.readouterr().err == ""


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


def test_no_pickle_is_run(empty, small_clip):
    torch.save({"state_dict": Evil()}, empty / "evil.pt")
    with pytest.raises(BadInput, match="can't be loaded"):
        load_clip("tiny-test-clip:evil.pt")
    assert os.listdir(empty) == ["evil.pt"]


# ----------------------------------------------------------------------- eval.py clip

def test_the_clip_score_of_a_folder(empty, capsys, direct):
    images = postcard_folder(empty / "a", 5)
    texts = [f"a red boat number {k}" for k in range(5)]
    (empty / "a.txt").write_text("\n".join(texts) + "\n")
    result, printed = result_of(capsys, "clip", "a", "--prompts", "a.txt", "--batch", 2)
    expected = direct(images, texts)
    assert result["cosine"] == pytest.approx(expected.mean().item(), abs=1e-6)
    assert result["value"] == 100 * result["cosine"] and result["images"] == 5
    assert f"{result['value']:.3f}" in printed and "the miniature's CLIP" in printed
    assert result["deviation"] == pytest.approx(expected.std().item(), abs=1e-6)
    (empty / "a/002.png").write_bytes(b"")                   # its prompt goes with it
    result, _ = result_of(capsys, "clip", "a", "--prompts", "a.txt", "--skip-bad")
    assert result["cosine"] == pytest.approx(expected[[0, 1, 3, 4]].mean().item(), abs=1e-6)
    assert (result["images"], result["left out"]) == (4, 1)


def test_an_image_s_own_prompt(empty, capsys):
    (empty / "a").mkdir()
    prompt = "a red boat,\non the sea"
    for k, more in enumerate(("", "\nNegative prompt: fog\nmore")):
        info = PngInfo()
        info.add_text("parameters", f"{prompt}{more}\nSteps: 8, Sampler: DDIM, CFG scale: 9")
        Image.new("RGB", (64, 64)).save(empty / f"a/{k}.png", pnginfo=info)
    assert [prompt_in_image(file) for file in image_files(empty / "a")] == [prompt, prompt]
    assert result_of(capsys, "clip", "a")[0]["images"] == 2
    Image.new("RGB", (64, 64)).save(empty / "a/2.png")
    assert "a/2.png does not say its prompt: write 2.txt" in clean_refusal(capsys, "clip", "a")
    huge = bytearray((empty / "a/2.png").read_bytes())               # its header says 10¹⁰ pixels
    huge[16:24] = (100_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    (empty / "a/2.png").write_bytes(huge)
    (empty / "a/3.png").write_bytes(b"")
    assert "2 of 4 images can't be read" in clean_refusal(capsys, "clip", "a")
    assert result_of(capsys, "clip", "a", "--skip-bad")[0]["left out"] == 2


def test_captions_beside_images_are_those_that_training_reads(empty, capsys, direct):
    images = postcard_folder(empty / "a", 4)
    texts = ["a red boat", "a tree (tall:1.3)", "a house", "a car"]
    (empty / "a/000.txt").write_text(texts[0], encoding="utf-16")
    (empty / "a/001.caption").write_text(f"{texts[1]}\n")
    (empty / "a/002.TXT").write_text(f"{texts[2]}\nNegative prompt: fog\nSteps: 8, Seed: 1")
    info = PngInfo()
    info.add_text("parameters", f"{texts[3]}\nSteps: 8")
    with Image.open(empty / "a/003.png") as image:
        image.save(empty / "a/003.png", pnginfo=info)
    result, printed = result_of(capsys, "clip", "a")
    assert result["cosine"] == pytest.approx(direct(images, texts).mean().item(), abs=1e-6)
    assert "3 from captions beside the images, 1 from the images themselves" in printed
    assert "A1111's syntax, which is plain text here: '(tall:1.3)'" in printed
    (empty / "a/metadata.jsonl").write_text("".join(
        json.dumps({"file_name": f"./{k:03d}.png", "text": text}) + "\n"
        for k, text in enumerate(reversed(texts))))
    result, _ = result_of(capsys, "clip", "a")
    assert result["cosine"] == pytest.approx(direct(images, texts[::-1]).mean().item(), abs=1e-6)
