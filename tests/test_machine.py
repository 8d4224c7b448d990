"""support/machine.py: devices, dtypes, and what a result file says of where it was made."""

# ruff: noqa: F811 (the fixtures' names)

import json
import subprocess
from dataclasses import dataclass
from importlib.metadata import version

import pytest
import torch
from conftest import disagreement
from small import batch, trained, unet  # noqa: F401 (fixtures)

import ppdd
from ppdd import GuideConfig
from support import machine
from support.cli import BadInput
from support.machine import (
    DTYPES,
    auto_dtype,
    commit,
    find_device,
    hardware,
    math_attention,
    provenance,
    resolve_dtype,
)


@pytest.fixture
def gpus(monkeypatch):
    """Has this machine seem to have so many GPUs, of such a compute capability."""
    def pretend(count: int, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return pretend


def test_a_gpu_is_taken_where_there_is_one(gpus):
    gpus(0)
    assert find_device() == find_device("") == "cpu"
    gpus(2)
    assert find_device() == "cuda" and find_device("cpu") == "cpu"
    assert find_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize("name, word", [
    ("gpu", "pass cpu, cuda or cuda:1"), ("", "pass"), ("cuda:x", "pass"), ("cuda:2", "none here"),
    ("cpu:1", "none here"), ("meta", "none here"), ("cuda:-1", "pass"), ("9" * 99, "pass")])
def test_a_device_that_is_not_here(gpus, name, word):
    gpus(2)
    if name:
        with pytest.raises(BadInput, match=f"^--device {name}: .*{word}"):
            find_device(name)


def test_a_gpu_that_is_not_here(gpus):
    gpus(0)
    with pytest.raises(BadInput, match="--device cuda: there is none here; leave it out"):
        find_device("cuda")


def test_the_dtype_suits_the_device(gpus):
    gpus(1, (8, 0))
    assert auto_dtype("cpu") == "fp32" and auto_dtype("cuda") == "bf16"
    assert resolve_dtype("auto", "cuda") == torch.bfloat16
    gpus(1, (7, 5))
    assert auto_dtype(torch.device("cuda:0")) == "fp16"
    for name, dtype in DTYPES.items():
        assert resolve_dtype(name, "cpu") == resolve_dtype(name, "cuda") == dtype


def test_math_attention_changes_only_the_time(unet, batch):
    guide = trained(GuideConfig())
    distilled = ppdd.cfg_distillation(unet, guide, *batch)
    with math_attention("cpu"):
        quick = ppdd.cfg_distillation(unet, guide, *batch)
    assert disagreement(quick.error, distilled.error) < 1e-4
    enabled = torch.backends.cuda.flash_sdp_enabled()
    with math_attention("cuda"):                            # leaves the kernels of a GPU alone
        assert torch.backends.cuda.flash_sdp_enabled() == enabled


def test_the_hardware_is_named(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert hardware("cpu").startswith("2 CPU threads, ")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert hardware().startswith("1 CPU thread, ")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU ({device})")
    assert hardware("cuda:1") == "a GPU (cuda:1)" and hardware(torch.device("mps")) == "mps"


def test_the_commit_is_this_checkout_s(tmp_path, monkeypatch):
    def git(*line: str) -> str:
        return subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@x", *line], cwd=tmp_path, check=True,
            capture_output=True, text=True).stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert commit() == "unknown"
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file"), git("commit", "-qm", "x")
    assert commit() == git("rev-parse", "--short=10", "HEAD")
    (tmp_path / "file").write_text("b")
    assert commit() == git("rev-parse", "--short=10", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"                            # no git


def test_a_result_says_how_it_was_made(monkeypatch):
    @dataclass
    class Config:
        device: str = "cpu"
        steps: int = 8

    made = provenance(Config(), "safetensors", "no_such_package")
    assert made["settings"] == {"device": "cpu", "steps": 8}
    assert made["hardware"] == hardware() and made["commit"] == commit()
    assert made["versions"]["torch"] == version("torch")
    assert made["versions"]["safetensors"] == version("safetensors")
    assert made["versions"]["no_such_package"] is None
    assert json.loads(json.dumps(made)) == made
