"""Several processes make the updates of one, and none of them waits for ever."""

import os
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from processes import message, start_several, wait_for_checkpoint
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.run import get_args_parser
from train_helpers import RUN, checkpoints, flags, guides

import train
from support.cli import BadInput
from support.distributed import (
    all_reduce,
    barrier,
    broadcast,
    init_distributed,
    print_once,
    rank_zero_only,
)

ROOT = Path(__file__).resolve().parent.parent


def last_weights(folder):
    """The guide's weights in the last checkpoint."""
    return {k: v for k, v in load_file(checkpoints(folder)[-1]).items() if k.startswith("guide.")}


def distance(a, b):
    """The largest difference of any weight."""
    assert set(a) == set(b)
    return max((a[k] - b[k]).abs().max().item() for k in a)


def train_in(folder, count, argv):
    processes = start_several(folder, count, argv)
    for process in processes:
        process.join(300)
        assert process.exitcode == 0, message(folder)


@pytest.mark.parametrize("updates, more", [
    (8, ["--trajectories", "0.5", "--accumulate", "2"]),
    pytest.param(20, [], marks=pytest.mark.full)])
def test_two_processes_make_the_updates_of_one_and_a_resume_may_change_their_number(
        toy_base, tmp_path, updates, more):
    argv = flags(toy_base, "--updates", updates, "--end-steps", 64, "--save-every", updates // 2,
                 "--lr", 1e-4, "--batch", 5, *more)
    for name in ("one", "two", "both"):
        (tmp_path / name).mkdir()
    train_in(tmp_path / "one", 1, argv)
    train_in(tmp_path / "two", 2, argv)
    begun = start_several(tmp_path / "both", 2, argv)
    wait_for_checkpoint(tmp_path / "both", begun)
    begun[0].kill()
    for process in begun:
        process.join(300)
        assert process.exitcode is not None
    train_in(tmp_path / "both", 1, [*argv, "--resume"])
    one, two, both = (last_weights(tmp_path / name) for name in ("one", "two", "both"))
    assert max(v.abs().max() for k, v in one.items() if "z3" in k) > 2e-5
    assert distance(one, two) <= 1e-6 and distance(one, both) <= 1e-6
    for name in ("one", "two", "both"):                                   # one process logs
        assert len((tmp_path / name / RUN / "log.jsonl").read_text().splitlines()) == 1


def test_a_process_that_dies_ends_the_others_with_a_sentence(toy_base, tmp_path):
    processes = start_several(tmp_path, 2, flags(toy_base, "--updates", 100_000, "--save-every", 5))
    wait_for_checkpoint(tmp_path, processes)
    processes[1].kill()
    processes[0].join(300)
    assert processes[0].exitcode == 2
    text = message(tmp_path)
    assert "train.py, process 0: another process ended" in text and "--resume" in text
    assert "Traceback" not in text
    for file in checkpoints(tmp_path):
        load_file(file)


def test_ctrl_c_to_one_process_stops_and_saves_all(toy_base, tmp_path):
    processes = start_several(tmp_path, 2, flags(toy_base, "--updates", 100_000, "--save-every", 5))
    wait_for_checkpoint(tmp_path, processes)
    os.kill(processes[1].pid, 2)
    for process in processes:
        process.join(300)
        assert process.exitcode == 130, message(tmp_path)
    assert message(tmp_path).count("go on with: torchrun --nproc_per_node=2 -- train.py") == 1


@pytest.mark.full
def test_torchrun_starts_it(toy_base, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", str(ROOT / "train.py"),
               *flags(toy_base, "--updates", 2, "--end-steps", 64)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert set(guides(tmp_path)) == {"tiny"} and ended.stdout.count("base: ") == 1


def test_a_process_that_never_comes_is_a_sentence(monkeypatch):
    def time_out(*_, **__):
        raise distributed.DistStoreError("timed out")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(distributed, "init_process_group", time_out)
    with pytest.raises(BadInput, match="another process ended, .*; go on"):
        with init_distributed("cpu", timedelta(seconds=1), "; go on"):
            pytest.fail("was not to be entered")


def test_what_is_no_fault_of_another_process_is_not_said_to_be(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(distributed, "init_process_group", fail)
    with pytest.raises(RuntimeError, match="a bug"), init_distributed("cpu"):
        pass


@pytest.mark.parametrize("env, device, words", [
    ({"WORLD_SIZE": "2"}, "cpu", "torchrun"),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda", "at most one process a GPU")])
def test_processes_that_can_never_work_are_refused(monkeypatch, env, device, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match=words), init_distributed(device):
        pass


def test_without_torchrun_nothing_is_shared(capsys, monkeypatch):
    with init_distributed("cuda:7") as device:
        assert device == "cuda:7" and not distributed.is_initialized()
    x = torch.ones(2)
    all_reduce(x)
    barrier()
    assert x.tolist() == [1, 1] and broadcast({"a": 1}) == {"a": 1}
    print_once("a", "b")
    assert capsys.readouterr().out == "a\nb\n"
    calls = []
    rank_zero_only(calls.append)(1)
    monkeypatch.setenv("RANK", "1")
    rank_zero_only(calls.append)(2)
    print_once("c")
    assert calls == [1] and capsys.readouterr().out == ""


def test_the_command_printed_on_a_stop_starts_the_same_run_again(monkeypatch):
    assert train.how_to_go_on(None, ["--resume", "--run", "a b"]).endswith(
        "python train.py --run 'a b' --resume")
    assert "--resume" not in train.how_to_go_on(None, [])
    monkeypatch.setenv("WORLD_SIZE", "4")
    argv = ["--run", "a b", "--guide", "full"]
    assert "other flags" not in train.how_to_go_on(None, argv)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    sentence = train.how_to_go_on(None, argv).partition("go on with: ")[2]
    assert sentence.endswith(" (and torchrun's other flags as before, on every node)")
    words = get_args_parser().parse_args(shlex.split(sentence.partition(" (")[0])[1:])
    assert words.nproc_per_node == "2" and words.training_script == "train.py"
    assert words.training_script_args == argv
