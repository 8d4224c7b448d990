"""support/machine.py: devices, dtypes, and what a result file says of where it was made."""

# ruff: noqa: F811 (the fixtures' names)

import json
import os
import subprocess
import sys
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


@pytest.mark.parametrize("device, name, able, warned", [
    ("cpu", "bf16", False, True), ("cpu", "fp16", False, True), ("cpu", "bf16", True, False),
    ("cpu", "fp32", False, False), ("cpu", "auto", False, False), ("cuda", "bf16", False, False)])
def test_a_dtype_that_this_cpu_has_no_units_for(monkeypatch, capsys, gpus, device, name, able,
                                                warned):
    gpus(1)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for dtype in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", lambda: able)
    machine._warn_without_units.cache_clear()
    resolve_dtype(name, device), resolve_dtype(name, device)
    assert capsys.readouterr().err == warned * (
        f"warning: this CPU has no {name} units: --dtype fp32 is many times faster\n")


def test_small_networks_run_with_few_threads(monkeypatch):
    """But with as many as OMP_NUM_THREADS says, and with no more than before."""
    threads = [32]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "32")
    machine.use_few_threads()
    assert threads == [32]
    monkeypatch.delenv("OMP_NUM_THREADS")
    for before, after in ((32, machine.FEW_THREADS), (1, 1)):
        threads.append(before)
        machine.use_few_threads()
        assert threads[-1] == after


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP")
@pytest.mark.parametrize("given", ["", "ACTIVE"])
@pytest.mark.parametrize("script", ["sample.py", "train.py", "eval.py"])
def test_waiting_threads_leave_the_cores_to_others(script, given):
    """PyTorch's OpenMP prints its settings as it is loaded."""
    environment = os.environ | {"OMP_DISPLAY_ENV": "true"} | (
        {"OMP_WAIT_POLICY": given} if given else {})
    printed = subprocess.run([sys.executable, machine.ROOT / script, "--help"], check=True,
                             capture_output=True, text=True, env=environment).stderr
    assert f"OMP_WAIT_POLICY = '{given or 'PASSIVE'}'" in printed


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
