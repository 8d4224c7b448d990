"""Runs of train.py on a toy base, what they leave behind, and folders of images for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train
from support.cli import parse

# Of the toy base's run that no --run or --out moves elsewhere.
RUN = Path("runs/toy/tiny")
GUIDES = Path("guides/toy")


def flags(base: Path, *more: object) -> list[str]:
    """A command line for small batches on the CPU, without images of CFG beside the guide. Trials
    too leave their guides where those of finished runs are."""
    return [str(word) for word in ("--weights", base, "--device", "cpu", "--batch", 4, "--images",
                                   16, "--grid-every", 0, "--out", "guides", *more)]


def config(base: Path, *more: object) -> train.Config:
    return parse(train.Config, "train.py", "", flags(base, *more))


def begin(base: Path, *more: object) -> train.Trainer:
    """A run that stands at its beginning, or where --resume says."""
    return train.prepare(config(base, *more))


def run(base: Path, *more: object, updates: int = 3) -> None:
    """The whole command, with a checkpoint every two updates."""
    train.main(flags(base, "--max-updates", updates, "--save-every", 2, *more))


def refusal(capsys, argv: list[str]) -> str:
    """The sentence on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train.main(argv)
    printed = capsys.readouterr()
    assert exit.value.code == 2, printed
    assert "Traceback" not in printed.out + printed.err
    sentence = printed.err.splitlines()[-1]
    assert sentence.startswith("train.py: "), printed
    return sentence


def checkpoints(folder: Path) -> list[Path]:
    """Those of the run in folder/runs/toy/tiny, oldest first."""
    return sorted((folder / RUN).glob("state-*.safetensors"))


def updates_of(files: list[Path]) -> list[int]:
    """The update at which each checkpoint was written, from its name."""
    return [int(file.stem.split("-")[-1]) for file in files]


def guides(folder: Path, out: str | Path = GUIDES) -> dict[str, dict[str, Tensor]]:
    """The finished guides of a run, by name."""
    return {file.stem: load_file(file) for file in sorted((folder / out).glob("*.safetensors"))}


def assert_same_guides(some: dict, others: dict) -> None:
    """The same names and, bit for bit, the same weights."""
    assert set(some) == set(others)
    for name in some:
        assert set(some[name]) == set(others[name])
        for key, tensor in some[name].items():
            assert torch.equal(tensor, others[name][key]), (name, key)


def log_entries(file: Path) -> list[dict]:
    """A log, without the time of each entry."""
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "time"} for entry in entries]


def write_images(folder: Path, captions: list[str]) -> None:
    """000.png, 001.png … of one colour each, with a caption beside each."""
    folder.mkdir(parents=True)
    for i, caption in enumerate(captions):
        Image.new("RGB", (64, 64), (9 * i % 256, 80, 7)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption, encoding="utf-8")
