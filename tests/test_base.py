"""support/base.py: the three networks together, and where their weights are found."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOY_VAE, noise, randomised
from PIL import Image
from references import diffusers_vae
from safetensors.torch import save_file
from torch import nn
from toys import command, difference, here, refusal, toys  # noqa: F401 (fixtures)

import eval as eval_script
import sample
import train
from evaluation import sampling
from support import base as module
from support.base import (
    HUB_NAMES,
    MINI,
    Base,
    base_name,
    base_sha256,
    describe_base,
    find_weights,
    load_base,
    to_channels_last,
)
from support.checkpoint import load_vae, read_tensors
from support.configs import CheckpointError
from vae import VAE

# ------------------------------------------------------------------------------- the networks


def test_a_base_is_loaded_whole_and_frozen(toy_base):
    base = load_base(toy_base, torch.bfloat16)
    assert base.name == "toy" and base.path == toy_base and base.device.type == "cpu"
    assert base.is_miniature and base.sha256 == base_sha256(toy_base)
    for network in (base.unet, base.vae, base.text):
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    states = base.embed(["a cat", ""])
    assert states.shape == (2, 77, 32) and states.dtype == torch.bfloat16
    assert states.equal(base.text(base.tokenizer(["a cat", ""])))
    images = base.decode(noise(2, 4, 8, 8))
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.uint8


@pytest.mark.parametrize("small", [True, False])
def test_a_small_base_takes_few_threads(toy_base, monkeypatch, small):
    calls = []
    monkeypatch.setattr(Base, "is_miniature", small)
    monkeypatch.setattr(module, "use_few_threads", lambda: calls.append(1))
    load_base(toy_base)
    assert len(calls) == small


def test_an_image_that_overflows_is_decoded_again():
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(40_000.0))

        def decode(self, z):
            return z[:, :3] * self.weight * 2 / (self.weight * 2)     # 80,000 is no float16

    z = noise(2, 4, 8, 8).clamp(-1, 1).half().float()
    vae = Loud().half().requires_grad_(False)
    images = Base(None, vae, None, None, Path()).decode(z)
    assert images.dtype == torch.uint8 and vae.weight.dtype == torch.float16
    assert torch.equal(images, ((z[:, :3] + 1) * 127.5).round().byte())


def test_an_image_that_overflows_is_encoded_again():
    class Loud(VAE):
        def encode(self, x):
            self.dtypes.append(x.dtype)
            return (x.mean(1, keepdim=True)[..., ::8, ::8] * 4e4 * 9 / 36e4).expand(-1, 8, -1, -1)

    vae = randomised(lambda: Loud(TOY_VAE)).half()
    vae.dtypes = []
    x = noise(3, 3, 16, 16)
    x[1] *= 1e-3
    z = Base(None, vae, None, None, Path()).encode(x, 0)
    assert z.dtype == torch.float32 and next(vae.parameters()).dtype == torch.float16
    assert vae.dtypes == [torch.float16, torch.float32]
    expected = vae.config.scale_factor * x.mean(1, keepdim=True)[..., ::8, ::8]
    assert torch.allclose(z, expected.expand(-1, 4, -1, -1), rtol=1e-2, atol=1e-3)


class Counting(nn.Module):
    """Decodes every latent to grey, and notes how many at once."""

    def __init__(self):
        super().__init__()
        self.weight, self.parts = nn.Parameter(torch.ones(1)), []

    def decode(self, z):
        self.parts.append(len(z))
        return torch.zeros(len(z), 3, 8 * z.shape[2], 8 * z.shape[3])


@pytest.mark.parametrize("side, parts", [
    (8, [64, 2]), (16, [16, 3]), (64, [1, 1]), (72, [1])])
def test_so_many_are_decoded_at_once_as_make_up_one_of_512_pixels(side, parts):
    vae = Counting()
    images = Base(None, vae, None, None, Path()).decode(torch.zeros(sum(parts), 4, side, side))
    assert vae.parts == parts and len(images) == sum(parts) and (images == 128).all()


def test_pixels_beyond_black_and_white_are_clamped():
    class Plain(Counting):
        def decode(self, z):
            return z[:, :3]

    z = torch.tensor([-3.0, -1, 0, 1, 3]).view(1, 1, 1, 5).expand(1, 4, 1, 5)
    images = Base(None, Plain(), None, None, Path()).decode(z)
    assert images[0, 0, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.full
def test_images_decoded_together_are_those_decoded_alone():
    """Alone, a convolution may round differently."""
    base = Base(None, randomised(lambda: VAE(TOY_VAE)), None, None, Path())
    for side, count in ((8, 66), (16, 19)):
        z = noise(count, 4, side, side)
        together = base.decode(z)
        alone = torch.cat([base.decode(latent) for latent in z[-4:].split(1)])
        off = (alone.int() - together[-4:].int()).abs()
        assert off.max() <= 1 and off.float().mean() < 1e-3


def test_its_sha256_is_that_of_the_bytes(tmp_path):
    file, folder = tmp_path / "base.safetensors", tmp_path / "unet" / "weights.safetensors"
    folder.parent.mkdir()
    file.write_bytes(b"weights" * 1_000_000)
    folder.write_bytes(file.read_bytes())
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert base_sha256(file) == base_sha256(tmp_path) == expected
    for part in ("vae", "text_encoder", "safety_checker"):
        before = base_sha256(tmp_path)
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(b"more")
        assert (base_sha256(tmp_path) == before) == (part == "safety_checker")
    before = base_sha256(tmp_path)
    (tmp_path / "vae/config.json").write_text('{"scaling_factor": 1}')
    assert base_sha256(tmp_path) != before


def test_loras_change_its_sha256(tmp_path):
    base, lora = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    base.write_bytes(b"weights"), lora.write_bytes(b"more")
    hashes = {base_sha256(base, loras) for loras in ((), [(lora, 1.0)], [(lora, 0.5)])}
    assert len(hashes) == 3 and base_sha256(base) in hashes
    assert Base(None, None, None, None, base, ((lora, 0.5),)).sha256 == base_sha256(
        base, [(lora, 0.5)])


def test_on_a_cpu_nothing_is_laid_out_anew():
    conv = nn.Conv2d(4, 4, 3)
    strides = conv.weight.stride()
    assert to_channels_last(conv) is conv and conv.weight.stride() == strides


# ------------------------------------------------------------------------------- another VAE


def without_vae(base: Path, file: Path) -> Path:
    tensors, metadata = read_tensors(base)
    save_file({k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")}, file,
              metadata)
    return file


@pytest.fixture
def other_vae(tmp_path) -> Path:
    """The folder that diffusers saves a VAE to, with a scaling factor of its own."""
    vae = randomised(lambda: diffusers_vae(replace(TOY_VAE, scale_factor=0.5)), seed=7)
    vae.save_pretrained(tmp_path / "mse")
    return tmp_path / "mse"


def test_a_vae_of_another_file_replaces_the_checkpoint_s_or_stands_for_it(
        toy_base, tmp_path, other_vae):
    bare, expected = without_vae(toy_base, tmp_path / "toy.safetensors"), load_vae(other_vae)
    with pytest.raises(CheckpointError, match="toy.safetensors holds no VAE .*--vae FILE"):
        load_base(bare)
    for path in (toy_base, bare):
        base = load_base(path, vae=str(other_vae))
        assert base.vae.config == expected.config and base.vae.config.scale_factor == 0.5
        assert torch.equal(base.vae.decoder.conv_in.weight, expected.decoder.conv_in.weight)
        assert base.name == "toy" and base.path == path
    borrowed = load_base(bare, vae=toy_base)                        # from a whole checkpoint
    z = noise(1, 4, 8, 8)
    assert torch.equal(borrowed.decode(z), load_base(toy_base).decode(z))


def test_another_vae_changes_its_sha256_and_is_described(toy_base, other_vae):
    file = other_vae / "diffusion_pytorch_model.safetensors"
    hashes = [load_base(toy_base, vae=vae).sha256 for vae in ("", other_vae, file, toy_base)]
    assert len({*hashes}) == 4 and hashes[0] == base_sha256(toy_base)
    settings = other_vae / "config.json"
    settings.write_text(settings.read_text().replace("0.5", "0.25"))
    assert load_base(toy_base, vae=other_vae).sha256 not in hashes
    assert describe_base(toy_base, "x", "mse") == f"base: {toy_base}; its VAE is that of mse"


@pytest.mark.parametrize("sizes", [{"z_channels": 8}, {"ch_mult": (1, 2, 2)}, {"in_channels": 1}])
def test_a_vae_that_does_not_fit_is_refused(toy_base, tmp_path, sizes):
    other = randomised(lambda: diffusers_vae(replace(TOY_VAE, **sizes)))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="toy.safetensors with .*other .* do not fit toge"):
        load_base(toy_base, vae=tmp_path / "other")


def test_sample_paints_with_another_vae(here, toys, other_vae, capsys):  # noqa: F811
    bare = without_vae(toys / "toy.safetensors", here / "bare.safetensors")
    line = f"--guide none --steps 2 --prompt tree --weights {bare}"
    assert "--vae FILE" in refusal(capsys, *line.split())
    first, = command(f"{line} --vae {toys}/toy.safetensors")
    assert "base: bare.safetensors; its VAE" in capsys.readouterr().out.replace(f"{here}/", "")
    second = command(f"{line} --vae {other_vae}")[1]
    assert difference(first, second) > 10
    assert "VAE: mse" in Image.open(second).text["parameters"]


def test_training_and_evaluation_take_another_vae(here, toys, other_vae):  # noqa: F811
    path, given = toys / "toy.safetensors", {"vae": str(other_vae), "device": "cpu"}
    base = sampling.load(eval_script.Config(**given), path)
    trainer = train.prepare(train.Config(weights=str(path), run="run", batch=2, images=4,
                                         max_updates=1, **given))
    assert base.vae_path == trainer.base.vae_path == other_vae
    assert base.sha256 == trainer.base_hash != base_sha256(path)


@pytest.mark.parametrize("script", [sample, train, eval_script])
def test_a_model_that_predicts_no_noise_is_refused_by_every_script(
        here, toys, capsys, script):  # noqa: F811
    """As a base to sample from and as a teacher alike."""
    tensors, metadata = read_tensors(toys / "toy.safetensors")
    save_file(tensors | {"v_pred": torch.ones(0)}, "v.safetensors", metadata)
    command = ["table2"] * (script is eval_script)
    with pytest.raises(SystemExit) as exit:
        script.main([*command, "--weights", "v.safetensors", "--device", "cpu"])
    assert exit.value.code == 2 and "has a tensor v_pred" in capsys.readouterr().err


# ------------------------------------------------------------------------------- its name


def test_its_name_is_the_file_s_the_folder_s_or_the_repository_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("v1.5.safetensors").touch(), Path("folder.x").mkdir()
    assert base_name(Path("v1.5.safetensors")) == "v1.5"
    assert base_name(Path("folder.x")) == "folder.x"
    assert base_name(Path(".")) == tmp_path.name
    assert base_name(Path("hub/models--org--some-repo/snapshots/4f3a")) == "some-repo"
    loras = ((Path("a/style.safetensors"), 1.0), (Path("b.safetensors"), -1.0))
    assert Base(None, None, None, None, Path("v1.5.safetensors"), loras).name == "v1.5+style+b"


# ------------------------------------------------------------------------------- finding it

OFFICIAL, COMFY = HUB_NAMES[0], HUB_NAMES[2]


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty place to work in, and the Hugging Face cache beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def test_weights_are_the_bundled_ones_where_there_are_no_others(cache):
    put(cache / OFFICIAL / "snapshots" / "1" / "README.md")
    for part in ("unet", "vae"):                                             # not its weights
        put(cache / OFFICIAL / "snapshots" / "1" / part / "config.json")
        put(cache / OFFICIAL / "snapshots" / "1" / part / "diffusion_pytorch_model.bin")
    put(Path("weights") / "README.md")
    assert find_weights() == MINI
    assert MINI.parent == Path(module.__file__).parent.parent / "mini"


def test_weights_are_looked_for_in_order(cache, monkeypatch):
    comfy = put(cache / COMFY / "snapshots" / "1" / "v1-5-pruned-emaonly-fp16.safetensors")
    assert find_weights() == comfy
    folder = cache / OFFICIAL / "snapshots" / "2"
    put(folder / "safety.safetensors")
    put(folder / "unet" / "x.safetensors"), put(folder / "vae" / "x.safetensors")
    assert find_weights() == folder
    base = Base(None, None, None, None, folder)
    assert base.name == "stable-diffusion-v1-5"
    file = put(folder / "v1-5-pruned-emaonly.safetensors")
    assert find_weights() == file
    other = put(Path("elsewhere") / OFFICIAL / "snapshots" / "3" / file.name)
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")
    assert find_weights() == other
    put(Path("weights/model/unet/x")), put(Path("weights/model/vae/x"))
    assert find_weights() == Path("weights/model")
    mine = put(Path("weights/mine.safetensors"))
    assert find_weights() == mine
    assert find_weights("given.safetensors") == Path("given.safetensors")
    assert find_weights("~/given") == Path.home() / "given"
    assert find_weights("mini") == MINI


def test_a_line_says_which_base_is_used():
    assert describe_base(Path("sd.safetensors"), "") == "base: sd.safetensors"
    assert describe_base(MINI, "mini") == f"base: {MINI}"
    line = describe_base(MINI, "")
    assert "\n" not in line and "v1-5-pruned-emaonly.safetensors" in line
    assert "--weights FILE" in line and HUB_NAMES[0].split("--")[-1] in line
