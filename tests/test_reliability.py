"""Nothing lost: kills, signals, full disks, forbidden places, and any value for any flag.

`PPDD_KILLS=50 python -m pytest tests/test_reliability.py -k kill --full` kills 50 times in place of
2 or 3, and writes results/reliability.json.
"""

import io
import json
import os
import platform
import random
import resource
import shutil
import signal
import tarfile
import time
from dataclasses import fields
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from eval_helpers import FEW, WITHOUT_GUIDE, shorten
from PIL import Image
from processes import message, start, start_function
from safetensors.torch import load_file
from train_helpers import (
    RUN,
    assert_same_guides,
    begin,
    checkpoints,
    flags,
    guides,
    refusal,
    write_images,
)

import eval as tables
import sample
import support.base
import support.data
import train
from support.base import load_base
from support.cli import flag_of
from support.files import write_json
from support.machine import commit

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("PPDD_KILLS", 0))
READERS = {".json": lambda file: json.loads(file.read_text()), ".safetensors": load_file,
           ".png": lambda file: Image.open(file).load()}

# ------------------------------------------------------------------------------- kill -9


def time_of(process, folder):
    """Seconds that a process took, from here on, to its good end."""
    began = time.monotonic()
    process.join()
    assert process.exitcode == 0, message(folder)
    return time.monotonic() - began


def kill_after(process, seconds, folder):
    """Kills a process that is still there by then; whether it was."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), message(folder)
    return process.exitcode != 0


def write_shard(file, captions):
    """A tar as img2dataset writes it."""
    with tarfile.open(file, "w") as tar:
        for i, caption in enumerate(captions):
            image = io.BytesIO()
            Image.new("RGB", (64, 64), (9 * i, 80, 7)).save(image, "PNG")
            for name, content in ((f"{i:05d}.png", image.getvalue()),
                                  (f"{i:05d}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("data", [
    "cache", *(pytest.param(name, marks=pytest.mark.full) for name in ("folder", "tar"))])
def test_a_run_killed_at_any_moment_goes_on_and_ends_bit_for_bit_the_same(toy_base, tmp_path, data):
    captions = [f"caption {i}" for i in range(20)]
    if data == "tar":
        write_shard(tmp_path / "set.tar", captions)
        argv = ["--data", tmp_path / "set.tar"]
    else:
        write_images(tmp_path / "set", captions)
        (tmp_path / "set" / "003.png").write_bytes(b"no image")
        argv = ["--data", tmp_path / "set", *["--cache", "cache"] * (data == "cache")]
    argv = flags(toy_base, *argv, "--updates", 8, "--halving-updates", 4, "--start-steps", 32,
                 "--end-steps", 16, "--save-every", 1, "--trajectories", 0.5)
    whole = tmp_path / "whole"
    whole.mkdir()
    start(whole, ["--batch", "-1"]).join()                # the server's own start takes longer
    seconds = time_of(start(whole, argv), whole)
    rng = random.Random(0)
    wanted, kills, late, runs = KILLS or 2, 0, 0, 0
    while kills < wanted:
        folder, runs, done = tmp_path / f"killed-{runs}", runs + 1, False
        folder.mkdir()
        while not done:
            process = start(folder, [*argv, *["--resume"] * bool(checkpoints(folder))])
            wait = rng.uniform(0.1, 0.9) * seconds if kills < wanted else None
            done = not kill_after(process, wait, folder)
            kills += not done
            late += not done and bool(checkpoints(folder))
        assert_same_guides(guides(folder), guides(whole))
        shutil.rmtree(folder)
    if KILLS and data == "cache":
        write_json(ROOT / "results" / "reliability.json", {
            "kills": kills, "of them after the first update": late, "runs": runs, "seed": 0,
            "equal": True, "commit": commit(), "hardware": f"CPU, {platform.machine()}, 1 thread",
            "torch": torch.__version__,
            "command": " ".join(["train.py", *(Path(word).name for word in argv)])})


def tabulate():
    """A small Table 2, in a process of its own."""
    shorten(pytest.MonkeyPatch(), WITHOUT_GUIDE[:2], ("tiny",))
    tables.main(["table2", "--weights", "mini", "--device", "cpu", "--g", "8", *FEW])


def export():
    sample.main(["--guide", "full", "--weights", "mini", "--export", "out"])


def scores_of(folder):
    """Every score of a table: what was sampled is the same, to the last digit shown."""
    rows = json.loads((folder / "runs/eval/table2.json").read_text())["bases"]["mini"]["rows"]
    assert set(rows) == {"none-2", "cfg-2", "tiny"}
    return {name: {g: cell["mean"] for g, cell in row["cells"].items()}
            for name, row in rows.items()}


def vectors_of(folder):
    return {file.name: {k: v.tolist() for k, v in load_file(file).items() if v.ndim == 1}
            for file in (folder / "out").glob("*.safetensors")}


@pytest.mark.full
@pytest.mark.parametrize("work, result_of", [(tabulate, scores_of), (export, vectors_of)])
def test_a_table_and_an_export_killed_at_any_moment_are_whole_after_all(tmp_path, work, result_of):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    start_function(whole, os.getpid).join()              # the server's own start takes longer
    seconds, rng = time_of(start_function(whole, work), whole), random.Random(1)
    for _ in range(KILLS or 3):
        kill_after(start_function(killed, work), rng.uniform(0.1, 0.8) * seconds, killed)
        for file in killed.rglob("[!.]*.*"):             # what has its name is whole
            if file.suffix in READERS:
                READERS[file.suffix](file)
    time_of(start_function(killed, work), killed)
    assert result_of(killed) == result_of(whole)


# ------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("data", [
    "postcards", pytest.param("folder", marks=pytest.mark.full)])
def test_a_signal_saves_at_once_and_says_how_to_go_on(toy_base, here, capsys, monkeypatch, number,
                                                      data):
    argv = flags(toy_base, "--max-updates", 4, "--end-steps", 32)
    if data == "folder":                                 # read by processes, as with a GPU
        monkeypatch.setattr(support.data, "worker_count", lambda device: 2)
        write_images(here / "set", [f"caption {i}" for i in range(9)])
        argv += ["--data", "set"]
    train.main([*argv, "--out", "whole", "--run", "whole-run"])
    train_step = train.Trainer.train_step

    def interrupted(self):
        if self.update == 2 and self.stage == 1:
            workers = active_children()                  # a terminal's Ctrl-C reaches them all
            assert len(workers) == (2 if data == "folder" else 0)
            for pid in (*(worker.pid for worker in workers), os.getpid()):
                os.kill(pid, number)
        return train_step(self)

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    sentence = capsys.readouterr().err
    assert stopped.value.code == 130 and signal.getsignal(number) is handler
    assert "Traceback" not in sentence and not active_children()
    assert checkpoints(here)[-1].name == "state-01-00000003.safetensors"
    assert "go on with: python train.py --weights" in sentence
    assert sentence.rstrip().endswith("--resume")
    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    train.main([*argv, "--resume"])
    assert_same_guides(guides(here), guides(here, "whole/toy"))


@pytest.mark.parametrize("cache", [False, True])
def test_ctrl_c_while_data_is_prepared_is_one_sentence_and_can_be_repeated(
        toy_base, here, capsys, monkeypatch, cache):
    write_images(here / "set", [f"caption {i}" for i in range(9)])
    argv = flags(toy_base, "--data", "set", "--max-updates", 1, "--end-steps", 64,
                 *["--cache", "cache"] * cache)
    where = "encode_shard" if cache else "_fill_index"
    kind = train.CachedImages if cache else train.CaptionedImages
    # What was started in the background ignores Ctrl-C; this must hold for a suite that was, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(kind, where, lambda *_: os.kill(os.getpid(), signal.SIGINT))
            train.main(argv)
    finally:
        signal.signal(signal.SIGINT, before)
    printed = capsys.readouterr().err
    assert stopped.value.code == 130 and "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("train.py: stopped; go on with: python train.py")
    assert "--resume" not in printed
    train.main(argv)
    assert set(guides(here)) == {"tiny"}


def test_a_second_signal_does_not_wait(toy_base, here):
    """Once in the middle of an update, as from a terminal; then in the same update again."""
    process = start(here, flags(toy_base, "--updates", 100_000, "--save-every", 1))
    while not checkpoints(here):
        assert process.is_alive(), message(here)
        time.sleep(0.01)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.01)
    process.join(60)
    assert process.exitcode == 130 and "Traceback" not in message(here)
    assert "go on with: python train.py" in message(here)
    load_file(checkpoints(here)[-1])


# ------------------------------------------------------------------------------- disks, places


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(toy_base, here, capsys):
    begun = begin(toy_base, "--updates", 30)
    begun.save()
    begun.folder.unlock()
    before, limits = checkpoints(here), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[-1].stat().st_size // 2, limits[1]))
    try:
        sentence = refusal(capsys, flags(toy_base, "--updates", 30, "--save-every", 2, "--resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "make room" in sentence and "--resume" in sentence
    assert checkpoints(here) == before and not list((here / RUN).glob(".*.tmp"))
    load_file(before[-1])


@pytest.mark.parametrize("part", ["log", "draw_grid", "save_guide", "save"])
def test_no_space_for_any_file_is_one_sentence(toy_base, here, capsys, monkeypatch, part):
    def fail(*_):
        raise OSError(28, "No space left on device", "file")

    monkeypatch.setattr(train.Trainer, part, fail)
    argv = flags(toy_base, "--max-updates", 1, "--save-every", 1)
    sentence = refusal(capsys, [*argv, *["--grid-every", "1"] * (part == "draw_grid")])
    assert "No space left" in sentence and "make room" in sentence


@pytest.mark.parametrize("flag", ["--run", "--out", "--cache"])
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(toy_base, here, capsys, flag):
    (here / "file").write_text("")
    write_images(here / "set", ["a"])
    sentence = refusal(capsys, flags(toy_base, "--data", "set", flag, "file/deeper"))
    assert "file/deeper can't be written to" in sentence
    assert not (here / "runs").exists() and not (here / "guides").exists()


# ------------------------------------------------------------------------------- odd flags

ODD = ["0", "-1", "nan", "inf", "1e9", "1000000000", "text", "", "é\n", "/proc/nowhere/x",
       os.fsdecode(b"\xff")]


def odd_command_lines(toy_base):
    """Every odd value for every flag, the others as they should be."""
    for field in fields(train.Config):
        if field.name == "g_range":
            values = [[a, b] for a in ODD for b in ("8", a)]
        elif isinstance(field.default, bool):
            values = [[], ["text"]]
        else:
            values = [[value] for value in ODD]
        for words in values:
            argv = flags(toy_base, flag_of(field.name), *words)
            if field.name == "weights":
                argv = ["--device", "cpu", *argv[-2:]] if words[0] else argv[2:-2]
            yield argv


class StubData:
    """Postcards that are never drawn."""

    identity = ""
    side = 8

    def __init__(self, base, count, seed):
        self.image_count = count


def test_absurd_values_end_in_a_sentence_or_are_right(toy_base, here, capsys, monkeypatch):
    loaded = load_base(toy_base)
    monkeypatch.setattr(train, "load_base", lambda path, **_: loaded)
    monkeypatch.setattr(train, "Postcards", StubData)
    monkeypatch.setattr(train.Trainer, "train", lambda self: None)
    monkeypatch.setattr(support.base, "base_sha256", lambda *_: "")
    cases, right = 0, 0
    for argv in odd_command_lines(toy_base):
        cases += 1
        try:
            train.main(argv)
            right += 1
        except SystemExit as stopped:
            printed = capsys.readouterr().err
            assert stopped.code == 2 and "Traceback" not in printed, (argv, printed)
            sentence = printed.splitlines()[-1]
            assert sentence.startswith("train.py: ") and len(sentence) < 600, (argv, printed)
    assert cases > 250 and 20 < right < cases / 2
