"""eval.py's commands under bad input, absurd flags, full memory and names without an encoding."""

# ruff: noqa: F811 (fixtures are imported, and named again as arguments)

import io
import json
import os
import re
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from eval_helpers import clean_refusal, command, empty, postcard_folder, refusal  # noqa: F401
from PIL import Image
from toys import ABSURD

import eval as script
from evaluation.report import earlier_result, image_file, result_file, write_result
from support.machine import provenance

FLAGS = [f.name for f in fields(script.Config) if f.name not in ("command", "paths")]
COUNTED = Counter()


@pytest.mark.parametrize("argv, message", [
    ("fud a b", "fud: no such command"), ("fid a", "two folders"),
    ("fid a a a", "two folders"), ("fid a nowhere", "nowhere: there is no such folder"),
    ("fid a empty", "empty: there are no images"), ("fid a none.npz", "none.npz: there is no"),
    ("fid a bad.npz", "bad.npz is no .npz with mu and sigma"),
    ("fid a a --batch 0", "--batch 0: must be from 1 to 4096"),
    ("fid a a --inception no.pth", "no.pth is no file"), ("fid a a --device abacus", "--device"),
    ("fid a a --device cuda:99", "--device cuda:99: there is none"), ("clip", "takes one folder"),
    ("fid a a --inception bad.npz", "bad.npz has SHA-256"),
    ("fid a a --clip-model x", "--clip-model x"), ("fid a a --count 3", "fid takes no --count"),
    ("clip a --prompts two.txt", "has 2 prompts, and there are 1 images"),
    ("clip a --prompts none.txt", "no such file"), ("table1 a", "unrecognized arguments: a"),
    ("table1 --size huge", "--size huge"), ("--count 3 table2", "give the command first"),
    ("speed --weights mini", "arguments: --weights"), ("table1 --real=x", "no --real: .*--help"),
    ("table2 --quick --update-results", "not with --quick"),
    ("fid big big", "ViT-g-14.*--inception"), ("table2 --seed x", "invalid int"),
    ("fid a a --out empty", "empty: "), ("table2 --g nan", "--g nan: must be from -1000 to 1000"),
])
def test_bad_input_is_answered_with_a_sentence(empty, capsys, argv, message):
    postcard_folder(empty / "a", 1)
    (empty / "empty").mkdir()
    (empty / "big").mkdir()
    Image.new("RGB", (80, 80)).save(empty / "big/1.png")
    (empty / "bad.npz").write_bytes(b"PK no zip")
    (empty / "two.txt").write_text("one\ntwo\n")
    assert re.search(message, clean_refusal(capsys, *argv.split()))


def replace_command(monkeypatch, name: str, run) -> None:
    monkeypatch.setitem(script.COMMANDS, name, script.COMMANDS[name]._replace(run=run))


def test_commands_and_their_flags_are_listed(capsys):
    script.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [*script.COMMANDS]
    names = {f.name for kind in (script.Config, script.SpeedConfig) for f in fields(kind)}
    assert all(names >= {*command.takes.split()} for command in script.COMMANDS.values())
    with pytest.raises(SystemExit) as exit:
        script.main(["table1", "--help"])
    flags = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert exit.value.code == 0 and flags == {"--help", "--size", "--out", "--update-results"}


def test_a_trial_writes_to_runs_alone(empty, capsys):
    """A result of the project's own is only overwritten where that is asked for."""
    command("method")
    postcard_folder(empty / "a", 2)
    command("fid a a")
    assert sorted(os.listdir(".")) == ["a", "runs"]
    assert sorted(os.listdir("runs/eval")) == ["fid.json", "method.png"]
    command("method --update-results")
    command("fid a a --update-results")
    assert os.listdir("results") == ["fid.json"] and os.listdir("docs") == ["method.png"]
    printed = re.findall(r"written to (.*)", capsys.readouterr().out)
    assert printed == ["runs/eval/method.png", "runs/eval/fid.json", "docs/method.png",
                       "results/fid.json"]


def test_which_file_is_written_and_which_is_read(empty):
    def files(**settings) -> list[str]:
        config = script.Config(command="quality", **settings)
        return [str(file) for file in (result_file(config), image_file(config, "a.webp"),
                                       earlier_result(config, "table2"))]

    assert files() == ["runs/eval/quality.json", "runs/eval/a.webp", "results/table2.json"]
    assert files(quick=True) == ["runs/eval/quality-quick.json", "runs/eval/a-quick.webp",
                                 "runs/eval/table2-quick.json"]
    Path("runs/eval").mkdir(parents=True)
    Path("runs/eval/table2.json").touch()
    assert files(out="b.x") == ["b.x", "b.x", "runs/eval/table2.json"]
    assert files(update_results=True) == ["results/quality.json", "docs/a.webp",
                                          "results/table2.json"]


def test_quick_says_that_it_is_not_to_be_compared(empty, capsys, monkeypatch):
    replace_command(monkeypatch, "table2", lambda config: None)
    command("table2 --quick")
    assert "not comparable with the README's table" in capsys.readouterr().out
    command("table2")
    assert capsys.readouterr().out == ""


def test_torchrun_is_for_tables(empty, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process: leave out torchrun" in refusal(capsys, "match")


def test_full_memory_is_a_sentence_and_a_bug_is_not(empty, capsys, monkeypatch):
    def fails(config):
        raise errors.pop()

    errors = [RuntimeError("shapes differ"), MemoryError(), torch.OutOfMemoryError("CUDA"),
              RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …")]
    replace_command(monkeypatch, "match", fails)
    while len(errors) > 1:
        assert "out of memory: pass a smaller --batch" in refusal(capsys, "match")
    with pytest.raises(RuntimeError, match="shapes differ"):
        script.main(["match"])


def test_names_that_no_encoding_has_are_written_and_printed(empty, monkeypatch):
    name = os.fsdecode(b"a\xff")
    replace_command(monkeypatch, "match", lambda config: write_result(
        Path("r.json"), {"folder": name}, f"{name} Θ\n"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    script.main(["match"])
    assert json.loads(Path("r.json").read_text())["folder"] == name
    assert Path("r.md").read_text(encoding="utf-8") == "a\\udcff Θ\n"


def test_a_result_is_never_half_written(empty):
    write_result(Path("results/a.json"), {"a": 1})
    with pytest.raises(ValueError):
        write_result(Path("results/a.json"), {"a": float("nan")})
    assert os.listdir("results") == ["a.json"]
    assert json.loads((empty / "results/a.json").read_text()) == {"a": 1}


def test_a_broken_package_beside_ours_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "gone-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    versions = provenance(script.Config(device="cpu"), "nowhere")["versions"]
    assert versions["torch"] in torch.__version__ and versions["nowhere"] is None


# ----------------------------------------------------------------------- absurd values of flags

def outcome(capsys, *argv: str) -> str:
    """The one sentence that a command ends with, or "" where its settings are accepted."""
    capsys.readouterr()
    start, sentence = time.process_time(), ""
    try:
        script.main([*argv])
    except SystemExit as exit:
        sentence = capsys.readouterr().err
        assert exit.code == 2 and sentence.startswith("eval.py"), sentence
        assert sentence.count("\n") == 1, sentence
    assert time.process_time() - start < 5
    COUNTED["refused" if sentence else "accepted"] += 1
    return sentence


@pytest.mark.parametrize("flag", FLAGS)
def test_absurd_values_of_every_flag(empty, capsys, monkeypatch, flag):
    """With a command that takes it, up to where its work would begin; fid's folders are missing."""
    for name in script.COMMANDS.keys() - {"fid"}:
        replace_command(monkeypatch, name, lambda config: None)
    takers = [name for name, entry in script.COMMANDS.items()
              if flag in (*entry.takes.split(), "out", "update_results") and name != "speed"]
    for k, value in enumerate(ABSURD):
        given = f"--{flag.replace('_', '-')}={value}"
        outcome(capsys, "fid", "nowhere", "elsewhere", given)
        outcome(capsys, takers[k % len(takers)], given)
    assert not [*empty.glob("*.png")]


def test_so_many_were_tried(request):
    chosen = sum(item.path == request.path for item in request.session.items) < len(FLAGS)
    parallel = "PYTEST_XDIST_WORKER" in os.environ          # each worker counts its own share
    assert chosen or parallel or COUNTED["refused"] > 800 and COUNTED["accepted"] > 100, COUNTED
