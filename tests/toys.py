"""Random tiny bases in the official layout, guides for them, and commands run on them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOY_TEXT as TEXT
from conftest import TOY_UNET as UNET
from conftest import TOY_VAE as VAE_CONFIG
from conftest import randomised, write_single_file
from PIL import Image

import sample
import support.base
import support.guides
from clip_text import TextConfig, TextEncoder
from meng import StudentConfig
from ppdd import GuideConfig
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

DEEP = replace(UNET, channel_mult=(1, 2, 2), attention=(True, True, False))

# Values that nobody should give to a flag.
ABSURD = ["0", "-1", "1.5", "nan", "inf", "-inf", "1e9", "1e400", "9" * 20, "9" * 5000, "text", "",
          " ", "a\nb", "\x1b[31m", "é", "🎉", "٣", "0x10", "1_000", "--", "~", "~no-one/x",
          "/dev/null", "/dev/zero", "/proc/self/mem", "x" * 5000, "../..", "*", "%s", "{}",
          "cpu:-1", "cuda:-1", "cuda:99", "1x1", "0x0", "-8x-8", "nowhere.safetensors",
          ".safetensors", "a:b"]


def write_base(path: Path, unet: UNetConfig, vae: VAEConfig, text: TextConfig, dtype,
               seed: int = 0) -> Path:
    """A random Stable Diffusion of these sizes, as an official single file."""
    encoder = "cond_stage_model.transformer.text_model."
    tensors = {encoder + "embeddings.position_ids": torch.arange(text.positions)[None]}
    for prefix, build in ((encoder, lambda: TextEncoder(text)),
                          ("first_stage_model.", lambda: VAE(vae))):
        state = randomised(build).state_dict()
        tensors |= {prefix + name: p.to(dtype).contiguous() for name, p in state.items()}
    metadata = {"unet_config": asdict(unet), "vae_config": asdict(vae), "text_config": asdict(text)}
    network = randomised(lambda: UNet(unet), seed)
    return write_single_file(path, network, "model.diffusion_model.", dtype, metadata, **tensors)


def write_guide(path: Path, unet: UNetConfig, kind: str, steps: int, base: str = "toy",
                g_range: tuple = (2, 9), form: str = "sum", **about) -> Path:
    """A random guide that changes an image, or a random student, of the kind "whole"."""
    config = StudentConfig() if kind == "whole" else GuideConfig(kind=kind, width=64, form=form)
    guide = randomised(lambda: support.guides.build_guide(unet, config), seed=steps)
    about = {"base": base, "steps": steps, "g_range": g_range} | about
    support.guides.save_guide(path, guide, config, about)
    return path


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> Path:
    """A folder with a base, toy.safetensors, a deeper one, and guides of the first."""
    folder = tmp_path_factory.mktemp("toys")
    write_base(folder / "toy.safetensors", UNET, VAE_CONFIG, TEXT, torch.float32)
    write_base(folder / "deep.safetensors", DEEP, VAE_CONFIG, TEXT, torch.float32)
    for kind in ("tiny", "full"):
        for steps, suffix in ((0, ""), (32, "-32"), (16, "-16"), (8, "-8")):
            write_guide(folder / f"guides/toy/{kind}{suffix}.safetensors", UNET, kind, steps)
    write_guide(folder / "guides/toy/tiny-8-g8.safetensors", UNET, "tiny", 8, g_range=(8, 8))
    return folder


@pytest.fixture
def here(toys, tmp_path, monkeypatch) -> Path:
    """An empty current folder but for guides/; the toy is what the miniature would be."""
    (tmp_path / "guides").symlink_to(toys / "guides")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(support.base, "MINI", toys / "toy.safetensors")
    monkeypatch.setattr(support.guides, "BUNDLED", tmp_path / "mini/guides")   # none are there
    return tmp_path


def command(line: str, *more: str) -> list[Path]:
    """Runs sample.py, and returns the numbered images of its folder, in order."""
    sample.main([*line.split(), *more])
    return sorted(Path("out").glob("[0-9]*.png")) if Path("out").is_dir() else []


def refusal(capsys, *argv: str) -> str:
    """The sentence on stderr of a sample.py command that must end with exit code 2."""
    with pytest.raises(SystemExit) as exit:
        sample.main([*argv])
    message = capsys.readouterr().err
    assert exit.value.code == 2, message
    assert message.startswith("sample.py: ") and message.count("\n") == 1, message
    return message


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def difference(a: Path, b: Path) -> int:
    """The largest difference of two images, of 255."""
    return abs(pixels(a) - pixels(b)).max()
