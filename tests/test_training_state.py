"""support/training_state.py: a run's lock, checkpoints and log, and guides of other runs."""

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from stat import S_ISDIR

import pytest
import torch
from conftest import TOY_UNET
from torch import nn
from train_helpers import begin, checkpoints, config, updates_of

import ppdd
import support.files
import support.training_state
import train
from ppdd import GuideConfig
from support.cli import BadInput
from support.files import sync
from support.guides import save_guide
from support.training_state import (
    History,
    Pace,
    RunFolder,
    duration,
    load_optimizer,
    optimizer_tensors,
    set_aside,
)


def unfinished(toy_base, *more):
    """A run of 30 updates that stopped after 6, with its checkpoints; returns its settings."""
    settings = config(toy_base, "--updates", 30, "--save-every", 2, "--end-steps", 64, *more)
    trainer = train.prepare(settings)
    trainer.stages[0] = replace(trainer.stages[0], updates=6)
    trainer.train_stage()
    trainer.folder.unlock()
    return settings


# ------------------------------------------------------------------------------- the lock


def test_two_runs_do_not_share_a_folder(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.lock()
    with pytest.raises(BadInput, match="in use by another run"):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()


def test_a_run_that_ended_in_any_way_leaves_no_lock(tmp_path):
    code = (f"import os; from support.training_state import RunFolder; "
            f"RunFolder({str(tmp_path)!r}).lock(); os.kill(os.getpid(), 9)")
    (tmp_path / ".left.1.tmp").write_text("half a file")
    killed = subprocess.run([sys.executable, "-c", code], cwd=support.files.__file__[:-16])
    assert killed.returncode == -9 and (tmp_path / "lock").exists()
    folder = RunFolder(tmp_path)
    folder.lock()
    folder.unlock()
    assert not (tmp_path / ".left.1.tmp").exists()


def test_file_systems_without_locks_or_synced_folders_only_warn(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    folder = RunFolder(tmp_path)
    with pytest.warns(UserWarning, match="can't be locked"):
        folder.lock()
    folder.unlock()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: without() if S_ISDIR(os.fstat(f).st_mode)
                        else fsync(f))
    with pytest.warns(UserWarning, match="can't be synced"):
        sync(tmp_path / "lock")


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path / "file")


# ------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("keep, kept", [(1, [6]), (3, [2, 4, 6]), (0, [0, 2, 4, 6])])
def test_the_last_checkpoints_are_kept(tmp_path, keep, kept):
    folder = RunFolder(tmp_path)
    for update in (0, 2, 4, 6):
        folder.save({"x": torch.tensor([update])}, {"stage": 1, "update": update}, keep)
    assert updates_of(folder.checkpoints()) == kept
    tensors, state = folder.load()
    assert tensors["x"].tolist() == [6] and state == {"stage": 1, "update": 6}
    folder.remove_checkpoints()
    assert not folder.checkpoints()


@pytest.mark.parametrize("keep", [1, 3])
def test_a_run_keeps_as_many_as_it_says(toy_base, here, keep):
    unfinished(toy_base, "--keep", keep)
    assert updates_of(checkpoints(here)) == [2, 4, 6][-keep:]


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:9], lambda b: b"",
                                    lambda b: bytes(8) + b[8:]])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    folder = RunFolder(tmp_path)
    for update in (2, 4):
        folder.save({"x": torch.tensor([update])}, {"stage": 0, "update": update}, keep=2)
    latest = folder.checkpoints()[-1]
    latest.write_bytes(damage(latest.read_bytes()))
    tensors, state = folder.load()
    assert tensors["x"].tolist() == [2] and state["update"] == 2
    assert f"{latest} is damaged" in capsys.readouterr().out
    assert updates_of(folder.checkpoints()) == [2] and latest.with_suffix(".damaged").exists()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(toy_base, here):
    settings = unfinished(toy_base)
    checkpoints(here)[-1].write_bytes(b"damaged")
    trainer = train.prepare(replace(settings, resume=True))
    assert trainer.update == 4 and updates_of(checkpoints(here)) == [4]


def test_no_whole_checkpoint_is_one_sentence(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoint_path(0, 2).write_bytes(b"half a file")
    with pytest.raises(BadInput, match="begin anew without --resume"):
        folder.load()


def test_a_checkpoint_that_cannot_be_read_is_no_damaged_one(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    folder = RunFolder(tmp_path)
    folder.save({"x": torch.zeros(1)}, {"stage": 0, "update": 2}, keep=2)
    before = folder.checkpoints()
    monkeypatch.setattr(support.training_state, "safe_open", fail)
    with pytest.raises(OSError, match="Input/output"):
        folder.load()
    assert folder.checkpoints() == before


def test_a_killed_save_leaves_what_was_there(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save({"x": torch.zeros(1)}, {"stage": 0, "update": 2}, keep=1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(support.training_state, "save_tensors", fail)
    with pytest.raises(OSError, match="No space"):
        folder.save({"x": torch.zeros(1)}, {"stage": 0, "update": 4}, keep=1)
    assert updates_of(folder.checkpoints()) == [2]


def test_an_older_checkpoint_goes_only_once_the_newer_one_is_safely_on_disk(tmp_path, monkeypatch):
    folder, seen = RunFolder(tmp_path), []
    folder.save({"x": torch.zeros(1)}, {"stage": 0, "update": 2}, keep=1)
    monkeypatch.setattr(support.training_state, "sync",
                        lambda path: seen.append((path, updates_of(folder.checkpoints()))))
    folder.save({"x": torch.zeros(1)}, {"stage": 0, "update": 4}, keep=1)
    assert seen == [(folder.checkpoint_path(0, 4), [2, 4])]
    assert updates_of(folder.checkpoints()) == [4]


# ------------------------------------------------------------------------------- the log


def test_a_log_is_cut_to_the_checkpoint_and_loses_half_a_line(tmp_path):
    folder = RunFolder(tmp_path)
    folder.trim_log(0, 50)                                  # where there is none
    entries = [{"stage": stage, "update": update} for stage in (0, 1) for update in (50, 100)]
    for entry in entries:
        folder.log(entry)
    with folder.log_file.open("a") as file:
        file.write('{"stage": 1, "upd')
    folder.trim_log(1, 60)
    kept = [json.loads(line) for line in folder.log_file.read_text().splitlines()]
    assert kept == entries[:3]
    folder.set_log_aside()
    assert not folder.log_file.exists() and (tmp_path / "log.old.jsonl").exists()
    folder.set_log_aside()


# ------------------------------------------------------------------------------- optimisers, guides


def test_an_optimisers_state_comes_back_in_the_layout_of_its_weights():
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    first, second = torch.optim.AdamW(layer.parameters()), torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 4, 8, 8)).sum().backward()
    first.step()
    saved = optimizer_tensors(first)
    load_optimizer(second, {k: v.contiguous() for k, v in saved.items()} | {"guide.x": layer.bias})
    loaded = optimizer_tensors(second)
    assert set(loaded) == set(saved) and all(torch.equal(loaded[k], saved[k]) for k in saved)
    moment = second.state[layer.weight]["exp_avg"]
    assert moment.stride() == layer.weight.stride() != moment.contiguous().stride()


def test_a_guide_of_another_run_is_set_aside_and_its_own_is_not(tmp_path):
    config = GuideConfig()
    guide = ppdd.build_guide(TOY_UNET, config)
    about = {"seed": 1, "settings": {"lr": 0.1, "resume": False, "device": "cpu"}}
    path = tmp_path / "tiny.safetensors"
    assert set_aside(path, about) is None                   # nothing is there
    save_guide(path, guide, config, about)
    resumed = {"seed": 1, "settings": {"lr": 0.1, "resume": True, "device": "cuda"}}
    assert set_aside(path, resumed) is None and len(list(tmp_path.iterdir())) == 1
    before = path.read_bytes()
    other = {"seed": 1, "settings": {"lr": 0.2}}
    assert set_aside(path, other) == tmp_path / "tiny.safetensors.old"
    assert (tmp_path / "tiny.safetensors.old").read_bytes() == before
    path.write_bytes(b"no guide")
    assert set_aside(path, about).read_bytes() == b"no guide"


def test_the_state_before_a_bad_update_costs_no_older_one(toy_base, here, monkeypatch):
    settings = unfinished(toy_base, "--keep", 1)
    trainer = train.prepare(replace(settings, resume=True))
    trainer.train_step()
    trainer.read_metrics()
    monkeypatch.setattr(support.training_state, "EXPLODED", -1)
    trainer.history.recent *= 10
    with pytest.raises(BadInput, match="from the one before"):
        trainer.train_step()
    assert updates_of(checkpoints(here)) == [6, 7]


def tensors_of(trainer):
    return (trainer.guide.state_dict(), trainer.teacher.state_dict(),
            trainer.batches.rollouts.state, optimizer_tensors(trainer.optimizer))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_goes_on_where_it_was(toy_base, here, optimizer):
    flags = ("--trajectories", 0.5, "--optimizer", optimizer)
    trainer = begin(toy_base, *flags)
    for _ in range(2):
        trainer.train_step()
        trainer.read_metrics()
    trainer.save()
    trainer.folder.unlock()
    again = begin(toy_base, *flags, "--resume")
    assert (again.stage, again.update) == (0, 2)
    assert again.history.recent == trainer.history.recent
    for loaded, saved in zip(tensors_of(again), tensors_of(trainer)):
        assert saved and set(loaded) == set(saved)
        assert all(torch.equal(loaded[k], saved[k]) for k in saved)


# ------------------------------------------------------------------------------- how updates went


def test_a_pace_is_measured_once_after_the_first_updates(monkeypatch):
    now = iter([0, 20, 40, 60, 61, 64, 68, 90])
    monkeypatch.setattr(support.training_state.time, "monotonic", lambda: next(now))
    pace = Pace(warm_up=1)
    measured = [pace.measure(update) for update in (1, 2, 1, 2, 3, 4, 6, 9)]      # of two stages
    assert measured == [*[None] * 6, 2.0, None]                 # 8 s from update 2 to 6


def test_a_share_of_no_correction_is_no_large_number():
    history = History()
    history.add(1e-14, 6e-9, 1e-14, 0.1)
    assert history.means(1) == (1e-14, 1.0, 0.1) and not history.corrected
    history.add(0.1, 0.05, 0.1, 0.1)
    assert history.means(1)[1] == 0.5 and history.corrected


def test_durations_are_said_in_words():
    assert [duration(s) for s in (8.4, 89, 720, 7800, 36_000)] == [
        "8 s", "89 s", "12 min", "2 h 10 min", "10 h 0 min"]
