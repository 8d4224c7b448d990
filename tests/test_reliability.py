"""Nothing lost: kills, signals, full disks, damaged checkpoints, several processes, odd flags.

`PPDD_KILLS=50 python -m pytest tests/test_reliability.py -k kill` kills 50 times in place of 3 and
writes results/reliability.json.
"""

# ruff: noqa: F401, F811 (fixtures are imported, and named again as arguments)

import json
import os
import platform
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from stat import S_ISDIR

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_data import fill
from test_eval_tables import FEW, PLAIN, STEPS
from test_train import base, guides, here, run, states
from torch.distributed.run import get_args_parser

import eval as tables
import ppdd
import sample
import train

ROOT = Path(__file__).resolve().parent.parent
SERVER = get_context("forkserver")           # imports torch once; its children are quick to start
SERVER.set_forkserver_preload(["train", "torch._dynamo", "test_reliability"])
READ = {".json": lambda file: json.loads(file.read_text()), ".safetensors": load_file,
        ".png": lambda file: Image.open(file).load()}


def go(folder, argv, env=None):
    """train.py in a process of its own, with its words in a file."""
    os.chdir(folder)
    os.environ.update(env or {})
    torch.set_num_threads(1)
    if env:
        train.Run.finish = lambda self: None     # the last checkpoint stays, in full precision
    with open("said", "a", buffering=1) as sys.stderr:
        train.main([str(a) for a in argv])


def start(folder, argv, env=None):
    process = SERVER.Process(target=go, args=(str(folder), argv, env))
    process.start()
    return process


def together(folder, count, argv):
    """The same command in so many processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(folder, argv, {
        "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for i in range(count)]


def until_saved(folder, processes):
    while not states(folder):
        assert all(p.is_alive() for p in processes), (folder / "said").read_text()
        time.sleep(0.01)


def trained(folder):
    """The guide's weights in the last checkpoint."""
    return {k: v for k, v in load_file(states(folder)[-1]).items() if k.startswith("guide.")}


def distance(a, b):
    """The largest difference of any weight."""
    assert set(a) == set(b)
    return max((a[k] - b[k]).abs().max().item() for k in a)


def flags(base, *more):
    return ["--weights", base, "--device", "cpu", "--grid-every", "0", "--batch", "4",
            "--pictures", "16", *more]


# ------------------------------------------------------------------------------- kill -9

def test_a_run_killed_at_any_moment_goes_on_and_ends_bit_for_bit_the_same(base, tmp_path):
    wanted, seed = int(os.environ.get("PPDD_KILLS", 3)), 0
    kills = late = runs = 0
    fill(tmp_path / "set", [f"caption {i}" for i in range(20)])
    (tmp_path / "set" / "003.png").write_bytes(b"no picture")
    rng = random.Random(seed)
    argv = flags(base, "--data", tmp_path / "set", "--cache", "cache", "--updates", "8",
                 "--halving-updates", "4", "--start-steps", "32", "--end-steps", "16",
                 "--save-every", "1", "--trajectories", "0.5", "--ema", "0.9")
    (tmp_path / "whole").mkdir()
    start(tmp_path / "whole", ["--batch", "0"]).join()        # the server's own start takes longer
    began = time.monotonic()
    process = start(tmp_path / "whole", argv)
    process.join()
    assert process.exitcode == 0, (tmp_path / "whole" / "said").read_text()
    lasted, whole = time.monotonic() - began, guides(tmp_path / "whole")
    while kills < wanted:
        here, runs = tmp_path / f"killed-{runs}", runs + 1
        here.mkdir()
        process = None
        while process is None or process.exitcode:
            process = start(here, argv + ["--resume"] * bool(states(here)))
            process.join(rng.uniform(0.1, 0.9) * lasted if kills < wanted else None)
            if process.exitcode is None:
                process.kill()
                process.join()
                kills, late = kills + 1, late + bool(states(here))
            assert process.exitcode in (0, -signal.SIGKILL), (here / "said").read_text()
        found = guides(here)
        assert set(found) == set(whole)
        assert all(torch.equal(found[g][k], whole[g][k]) for g in whole for k in whole[g])
        shutil.rmtree(here)
    if "PPDD_KILLS" in os.environ:
        told = {"kills": kills, "of them after the first update": late, "runs": runs,
                "seed": seed, "equal": True, "commit": ppdd.commit(),
                "hardware": f"CPU, {platform.machine()}, 1 thread", "torch": torch.__version__,
                "command": " ".join(["train.py", *(Path(a).name for a in argv)])}
        file = ROOT / "results" / "reliability.json"
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def tabulate(folder):
    """A small Table 2, in a process of its own."""
    os.chdir(folder)
    torch.set_num_threads(1)
    tables.PLAIN, tables.GUIDES, tables.STAGE_ONE = PLAIN[:2], ("tiny",), STEPS
    tables.OURS = ()
    with open("said", "a", buffering=1) as sys.stderr:
        tables.main(["table2", "--weights", "mini", "--device", "cpu", "--g", "8", *FEW])


def export(folder):
    os.chdir(folder)
    with open("said", "a", buffering=1) as sys.stderr:
        sample.main(["--guide", "full", "--weights", "mini", "--export", "out"])


def cells_of(folder):
    rows = json.loads((folder / "results/table2.json").read_text())["bases"]["mini"]["rows"]
    return {name: {g: cell["mean"] for g, cell in row["cells"].items()}
            for name, row in rows.items()}


def weights_of(folder):
    return {file.name: {k: v.tolist() for k, v in load_file(file).items() if v.ndim == 1}
            for file in (folder / "out").glob("*.safetensors")}


@pytest.mark.parametrize("work, made", [(tabulate, cells_of), (export, weights_of)])
def test_a_table_and_an_export_killed_at_any_moment_are_whole_after_all(tmp_path, work, made):
    wanted, rng, lasted = int(os.environ.get("PPDD_KILLS", 3)), random.Random(1), 0.0
    server = SERVER.Process(target=os.getpid)                 # its own start takes longer
    server.start()
    server.join()
    for name, kills in (("whole", 0), ("killed", wanted)):
        here = tmp_path / name
        here.mkdir()
        for k in range(kills + 1):
            process, began = SERVER.Process(target=work, args=(str(here),)), time.monotonic()
            process.start()
            process.join(rng.uniform(0.1, 0.8) * lasted if k < kills else None)
            if k < kills:
                process.kill()
                process.join()
            assert process.exitcode in (0, -signal.SIGKILL), (here / "said").read_text()
            for file in here.rglob("[!.]*.*"):              # what has its name is whole
                if file.suffix in READ:
                    READ[file.suffix](file)
        lasted = time.monotonic() - began
    assert made(tmp_path / "killed") == made(tmp_path / "whole")


# ------------------------------------------------------------------------------- processes

@pytest.mark.parametrize("more", [[], ["--trajectories", "0.5", "--accumulate", "2"]])
def test_two_processes_make_the_updates_of_one_and_a_resume_may_change_their_number(
        base, tmp_path, more):
    argv = flags(base, "--updates", "20", "--end-steps", "64", "--save-every", "10", "--lr",
                 "1e-4", "--batch", "5", *more)
    for name, steps in (("one", [(1, 20)]), ("two", [(2, 20)]), ("both", [(2, 10), (1, 20)])):
        folder = tmp_path / name
        folder.mkdir()
        for count, updates in steps:
            resume = ["--resume"] if states(folder) else []
            processes = together(folder, count, [*argv, *resume])
            if updates < 20:                         # the first is killed once it has saved
                until_saved(folder, processes)
                processes[0].kill()
            for process in processes:
                process.join(300)
                assert process.exitcode is not None
            assert updates < 20 or not any(p.exitcode for p in processes), (
                folder / "said").read_text()
        lines = (folder / "runs/toy/tiny/log.jsonl").read_text().splitlines()
        assert len(lines) == 1                                      # one process logs
    one, two, both = (trained(tmp_path / name) for name in ("one", "two", "both"))
    assert max(v.abs().max() for k, v in one.items() if "z3" in k) > 1e-4
    assert distance(one, two) <= 1e-6 and distance(one, both) <= 1e-6


def test_a_process_that_dies_ends_the_others_with_a_sentence(base, tmp_path):
    argv = flags(base, "--updates", "100000", "--save-every", "5")
    processes = together(tmp_path, 2, argv)
    until_saved(tmp_path, processes)
    processes[1].kill()
    processes[0].join(300)
    assert processes[0].exitcode == 2
    said = (tmp_path / "said").read_text()
    assert "another process ended" in said and "--resume" in said and "Traceback" not in said
    for path in states(tmp_path):
        load_file(path)


def test_torchrun_starts_it(base, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", str(ROOT / "train.py"),
               *map(str, flags(base, "--updates", "2", "--end-steps", "64"))]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    assert set(guides(tmp_path)) == {"tiny"} and said.stdout.count("base: ") == 1


# ------------------------------------------------------------------------------- signals, disks

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_once_and_says_how_to_go_on(base, here, capsys, monkeypatch, number):
    argv = [str(f) for f in flags(base, "--max-updates", "4", "--end-steps", "32")]
    train.main([*argv, "--out", "whole", "--run", "whole-run"])
    step = train.Run.step

    def interrupted(self, stage):
        if self.update == 2 and self.stage == 1:
            os.kill(os.getpid(), number)
        return step(self, stage)

    monkeypatch.setattr(train.Run, "step", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    said = capsys.readouterr().err
    assert stopped.value.code == 130 and signal.getsignal(number) is before
    assert states(here)[-1].name == "state-01-00000003.safetensors"
    assert said.rstrip().endswith("--resume") and "go on with: python train.py --weights" in said
    monkeypatch.setattr(train.Run, "step", step)
    train.main([*argv, "--resume"])
    for name, tensors in guides(here).items():
        whole = load_file(here / f"whole/toy/{name}.safetensors")
        assert all(torch.equal(tensors[k], whole[k]) for k in whole)


def unfinished(base, *more):
    """A run of 30 updates that stopped after 6, with its checkpoints."""
    config = train.parse([str(f) for f in flags(base, "--updates", "30", "--save-every", "2",
                                                "--end-steps", "64", *more)])
    made = train.prepare(config)
    stage = replace(made.stages[0], updates=6)
    made.train_stage(stage)
    made.held.close()
    return config


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_checkpoints_are_kept(base, here, keep):
    unfinished(base, "--keep", keep)
    assert [int(p.stem[-8:]) for p in states(here)] == [2, 4, 6][-keep:]


@pytest.mark.parametrize("harm", [lambda b: b[:-5], lambda b: b[:9], lambda b: b"",
                                  lambda b: bytes(8) + b[8:]])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(base, here, capsys, harm):
    config = unfinished(base)
    latest = states(here)[-1]
    latest.write_bytes(harm(latest.read_bytes()))
    run_ = train.prepare(replace(config, resume=True))
    assert run_.update == 4 and f"{latest.relative_to(here)} is damaged" in capsys.readouterr().out
    assert [int(p.stem[-8:]) for p in states(here)] == [4]


def test_a_checkpoint_that_cannot_be_read_is_no_damaged_one(base, here, monkeypatch):
    config, before = unfinished(base), states(here)

    def broken(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(train, "safe_open", broken)
    with pytest.raises(OSError, match="Input/output"):
        train.prepare(replace(config, resume=True))
    assert states(here) == before


def test_file_systems_without_locks_or_synced_folders_are_gone_on_with(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(train.fcntl, "flock", without)
    with pytest.warns(UserWarning, match="can't be locked"):
        train.lock(tmp_path).close()
    sync = os.fsync
    monkeypatch.setattr(train.os, "fsync", lambda f: without() if S_ISDIR(os.fstat(f).st_mode)
                        else sync(f))
    with pytest.warns(UserWarning, match="can't be synced"):
        train.sync(tmp_path / "lock")


def test_a_run_goes_on_with_data_that_shrank_and_with_no_other(base, here, capsys):
    fill(here / "set", [f"caption {i}" for i in range(9)])
    fill(here / "other", ["another"])
    flags = ["--data", "set", "--trajectories", "0.5", "--end-steps", "64"]
    begun = train.prepare(train.parse(["--weights", str(base), "--batch", "4", "--device", "cpu",
                                       "--max-updates", "3", "--grid-every", "0", *flags]))
    begun.step(begun.stages[0])
    begun.save()
    begun.held.close()
    with pytest.raises(SystemExit):
        run(base, "--resume", "--trajectories", "0.5", "--end-steps", "64", "--data", "other")
    assert "begun with other --data" in capsys.readouterr().err and states(here)
    for i in range(1, 9):
        (here / "set" / f"{i:03d}.png").unlink()
    run(base, "--resume", *flags)
    assert set(guides(here)) == {"tiny"} and "not what it was" in capsys.readouterr().out


def test_what_is_said_on_a_stop_starts_the_same_run_again(base, monkeypatch):
    assert train.stopped(None, ["--resume", "--run", "a b"]).endswith(
        "python train.py --run 'a b' --resume")
    assert "--resume" not in train.stopped(None, [])
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags, torchrun = ["--run", "a b", "--guide", "full"], get_args_parser()
    assert "other flags" not in train.stopped(None, flags)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = train.stopped(None, flags).partition("go on with: ")[2]
    assert said.endswith(" (and torchrun's other flags as before, on every node)")
    words = torchrun.parse_args(shlex.split(said.partition(" (")[0])[1:])
    assert words.nproc_per_node == "2" and words.training_script == "train.py"
    assert words.training_script_args == flags


def test_a_process_that_never_comes_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")

    def nobody(*_, **__):
        raise torch.distributed.DistStoreError("timed out")

    monkeypatch.setattr(train.distributed, "init_process_group", nobody)
    with pytest.raises(train.BadInput, match="another process"), train.together(
            train.Config(device="cpu")):
        pass


def test_two_runs_do_not_share_a_folder(base, here, capsys):
    config = train.parse([str(f) for f in flags(base)])
    first = train.prepare(config)
    with pytest.raises(train.BadInput, match="in use by another run"):
        train.prepare(config)
    first.held.close()
    train.prepare(config).held.close()


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(base, here, capsys):
    unfinished(base)
    before, limits = states(here), resource.getrlimit(resource.RLIMIT_FSIZE)
    size = before[-1].stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            train.main([str(f) for f in flags(base, "--updates", "30", "--save-every", "2",
                                              "--end-steps", "64", "--resume")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "make room" in said and "--resume" in said
    assert "Traceback" not in said and states(here) == before
    assert not list((here / "runs/toy/tiny").glob(".*.tmp"))
    load_file(before[-1])


@pytest.mark.parametrize("flag", ["--run", "--out", "--cache"])
def test_a_place_that_cannot_be_written_to_is_said_before_any_work(base, here, capsys, flag):
    (here / "file").write_text("")
    fill(here / "set", ["a"])
    with pytest.raises(SystemExit) as stopped:
        train.main([str(f) for f in flags(base, "--data", "set", flag, "file/deeper")])
    assert stopped.value.code == 2 and "can't be written to" in capsys.readouterr().err
    assert not (here / "runs").exists() and not (here / "guides").exists()


# ------------------------------------------------------------------------------- bad updates

@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), 1e9])
def test_a_bad_update_is_not_made_and_what_made_it_is_named(base, here, monkeypatch, spoilt):
    run_ = train.prepare(train.parse([str(f) for f in flags(base)]))
    for _ in range(12):
        run_.recent.append(run_.step(run_.stages[0]))
    before = {k: v.clone() for k, v in run_.guide.state_dict().items()}
    distill = train.Run.distill

    def broken(self, stage, z, t, c, g):
        result = distill(self, stage, z, t, c, g)
        worst = torch.zeros_like(result.error)
        worst[2] = spoilt
        return replace(result, loss=result.loss * max(spoilt, 1) if spoilt == spoilt else
                       result.loss * spoilt, error=worst)

    monkeypatch.setattr(train.Run, "distill", broken)
    with pytest.raises(train.BadInput) as refused:
        run_.step(run_.stages[0])
    _, t, g = run_.draw(run_.stages[0], run_.generator(0, 12))
    rows = run_.rows(run_.generator(0, 12)).tolist()
    said = str(refused.value)
    assert "update 13" in said and f"t {t[2]}, g {g[2]:.3g}, " in said
    assert repr(run_.data.captions(rows)[2]) in said
    saved = load_file(states(here)[-1])
    assert "state-00-00000012" in said
    assert all(torch.equal(saved[f"guide.{k}"], v) for k, v in before.items())


def test_the_state_before_a_bad_update_costs_no_older_one(base, here, monkeypatch):
    config = unfinished(base, "--keep", "1")
    run_ = train.prepare(replace(config, resume=True))
    run_.step(run_.stages[0])
    monkeypatch.setattr(train, "EXPLODED", -1)
    run_.recent *= 10
    with pytest.raises(train.BadInput, match="from the one before"):
        run_.step(run_.stages[0])
    assert [int(p.stem[-8:]) for p in states(here)] == [6, 7]


def test_running_out_of_cuda_memory_says_what_to_lower(base, here, capsys, monkeypatch):
    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.Run, "distill", full)
    with pytest.raises(SystemExit) as stopped:
        run(base)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert all(flag in said for flag in ("--batch", "--accumulate", "--checkpointing", "--cache"))


def gradients(base, *more):
    run_ = train.prepare(train.parse([str(f) for f in flags(base, *more)]))
    run_.move = lambda stage: None
    run_.step(run_.stages[0])
    run_.held.close()
    return torch.cat([p.grad.flatten() for p in run_.guide.parameters()])


@pytest.mark.parametrize("more", [["--accumulate", "3"], ["--checkpointing"]])
def test_parts_and_checkpointing_leave_the_gradient_as_it_is(base, here, more):
    torch.testing.assert_close(gradients(base, *more), gradients(base), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------- odd flags

ODD = ["0", "-1", "nan", "inf", "1e9", "1000000000", "text", "", "é\n", "/proc/nowhere/x",
       os.fsdecode(b"\xff")]


def test_absurd_values_end_in_a_sentence_or_are_right(base, here, capsys, monkeypatch):
    loaded, cases, right = ppdd.load_base(base), 0, 0
    monkeypatch.setattr(ppdd, "load_base", lambda path, device: loaded)
    monkeypatch.setattr(train.Run, "train", lambda self: None)
    monkeypatch.setattr(train, "Postcards", lambda base, count, seed: type(
        "Stub", (), {"pictured": count, "identity": "", "side": 8})())
    monkeypatch.setattr(ppdd, "fingerprint", lambda *of: "")
    for field in fields(train.Config):
        odd = [[v] for v in ODD]
        if field.name == "g_range":
            odd = [[a, b] for a in ODD for b in ("8", a)]
        if isinstance(field.default, bool):
            odd = [[], ["text"]]
        for values in odd:
            argv = flags(base, "--" + field.name.replace("_", "-"), *values)
            if field.name == "weights":
                argv = ["--device", "cpu", *argv[-2:]] if values[0] else argv[2:-2]
            cases += 1
            try:
                train.main([str(a) for a in argv])
                right += 1
            except SystemExit as stopped:
                said = capsys.readouterr().err
                assert stopped.code == 2 and "Traceback" not in said, (argv, said)
                assert "train.py: " in said or "error: " in said, (argv, said)
                assert len(said.splitlines()[-1]) < 600, (argv, said)
    print(f"{cases} command lines, {right} of them right")
    assert cases > 250 and 20 < right < cases / 2
