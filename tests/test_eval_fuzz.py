"""eval.py's flags with values that nobody should give: one sentence, or settings that hold."""

import time
from collections import Counter
from dataclasses import fields

import pytest
from test_sample_fuzz import ABSURD

import eval as evaluation

COUNTED = Counter()
FLAGS = [f.name for f in fields(evaluation.Config) if f.name not in ("command", "paths")]


def outcome(capsys, *argv: str) -> str:
    """The one sentence that a command ends with, or "" where its settings are taken."""
    capsys.readouterr()
    start, said = time.process_time(), ""
    try:
        evaluation.main([*argv])
    except SystemExit as exit:
        said = capsys.readouterr().err
        assert exit.code == 2 and said.startswith("eval.py: "), said
        assert said.count("\n") == 1, said
    assert time.process_time() - start < 5
    COUNTED["refused" if said else "taken"] += 1
    return said


@pytest.mark.parametrize("flag", FLAGS)
def test_absurd_values_of_every_flag(tmp_path, capsys, monkeypatch, flag):
    """With every command, up to where its work would begin; and fid, whose folders are missing."""
    monkeypatch.chdir(tmp_path)
    commands = dict.fromkeys(evaluation.COMMANDS, lambda config: None)
    for k, value in enumerate(ABSURD):
        assert outcome(capsys, "fid", "nowhere", "elsewhere", f"--{flag.replace('_', '-')}={value}")
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "COMMANDS", commands)
            command = [*commands][k % len(commands)]
            outcome(capsys, command, f"--{flag.replace('_', '-')}={value}")
    assert not [*tmp_path.glob("*.png")]


def test_so_many_were_tried(request):
    chosen = sum(item.path == request.path for item in request.session.items) < len(FLAGS)
    assert chosen or COUNTED["refused"] > 800 and COUNTED["taken"] > 100, COUNTED
