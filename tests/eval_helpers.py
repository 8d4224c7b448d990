"""Commands of eval.py in tests: what they write and say, and folders of images for them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import eval as script
import support.base
import support.guides
from evaluation import sampling
from evaluation.fid import Statistics
from evaluation.sampling import Row
from mini import postcards

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2
WITHOUT_GUIDE = (Row("none-2", "no guidance, 2 steps", "none", STEPS, only_g=0.0),
                 Row("cfg-2", "CFG, DDIM, 2 steps", "cfg", STEPS),
                 Row("cfg-plms-2", "CFG, PLMS, 2 steps", "cfg", STEPS, "plms"))
GUIDES = ("full", "tiny", "tiny-8-g8")
FEW = "--count 3 --batch 2 --seeds 2 --references 24 --repeats 1".split()


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    """An empty current folder, no weights of Inception or CLIP on this machine, no connection."""
    def download(*_, **__):
        raise OSError("no connection\nto be had")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(open_clip, "download_pretrained", download)
    return tmp_path


@pytest.fixture
def workspace(empty, monkeypatch) -> Path:
    """An empty current folder but for a miniature without styles in mini/; short runs."""
    (empty / "mini").mkdir()
    for name in ("mini.safetensors", "guides"):
        (empty / "mini" / name).symlink_to(ROOT / "mini" / name)
    monkeypatch.setattr(support.base, "MINI", empty / "mini" / "mini.safetensors")
    monkeypatch.setattr(support.guides, "BUNDLED", empty / "mini" / "guides")
    shorten(monkeypatch)
    return empty


def shorten(monkeypatch, without_guide=WITHOUT_GUIDE, guides=GUIDES) -> None:
    """Two steps for all rows but those of halved guides, and few rows."""
    for name, value in (("WITHOUT_GUIDE", without_guide), ("GUIDES", guides), ("OUR_GUIDES", ()),
                        ("STAGE_ONE", STEPS)):
        monkeypatch.setattr(sampling, name, value)


def command(line: str, *more: object) -> None:
    script.main([*line.split(), *map(str, more)])


def refusal(capsys, *argv: object) -> str:
    """The sentence on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        script.main([*map(str, argv)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and lines[-1].startswith("eval.py"), lines
    return lines[-1]


def clean_refusal(capsys, *argv: object) -> str:
    """As `refusal`, of a command that must write nothing."""
    before = set(os.listdir("."))
    sentence = refusal(capsys, *argv)
    assert set(os.listdir(".")) == before
    return sentence


def result_of(capsys, *argv: object) -> tuple[dict, str]:
    """The result file of a command, and what it printed."""
    script.main([*map(str, argv), "--out", "result.json"])
    return json.loads(Path("result.json").read_text()), capsys.readouterr().out


def postcard_folder(folder: Path, n: int, seed: int = 0, style: str = "postcard") -> torch.Tensor:
    """n images of the miniature's world, 000.png and so on, as the tensor that they hold."""
    generator = torch.Generator().manual_seed(seed)
    attributes = postcards.sample_attributes(n, generator)
    images = (postcards.draw(attributes, style, generator) * 255).round().byte()
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:03d}.png")
    return images


def statistics_of(features: torch.Tensor, batch: int = 7) -> Statistics:
    statistics = Statistics()
    for part in features.split(batch):
        statistics.add(part)
    return statistics


def table(file: str = "runs/eval/table2.json") -> dict:
    """A result less what no two runs share: its times, and what says how it was run."""
    result = json.loads(Path(file).read_text())
    for base in result["bases"].values():
        for row in base["rows"].values():
            row.pop("milliseconds", None)
    result["protocol"] = {k: v for k, v in result["protocol"].items()
                          if k not in ("processes", "settings", "hardware")}
    return result


def make_styles(folder: Path) -> None:
    (folder / "mini" / "styles").mkdir()
    for style in postcards.STYLES[1:]:
        shutil.copy(ROOT / "mini" / "mini.safetensors", folder / f"mini/styles/{style}.safetensors")


def drawn_on(path: str) -> np.ndarray:
    """A figure's pixels; it must not be blank."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.std() > 10
    return pixels
