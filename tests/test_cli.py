"""support/cli.py: flags of a dataclass, and every failure in one sentence with its exit code."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from support.checkpoint import CheckpointError
from support.cli import (
    BadInput,
    check_bounds,
    is_compile_error,
    is_out_of_memory,
    one_line,
    option,
    parse,
    require,
    run_command,
)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    steps: int = option(8, "sampling steps", low=1, high=1000)
    rate: float = option(0.5, "above nothing, below all", above=0, below=1)
    scale: float = option(2.0, "any number from 0", low=0)
    g: tuple[float, ...] = option((2.0, 9.0), "two numbers", low=-10, high=10)
    batch: tuple[int, ...] = option((), "one or several", low=1, high=64, type=int)
    prompt: tuple[str, ...] = option((), "words")
    sampler: str = option("ddim", "which", choices=("ddim", "plms"))
    max_updates: int = option(0, "no bounds, 100 %%")
    compile: bool = option(False, "a switch")
    files: tuple[str, ...] = option((), "without a flag")


def parsed(*argv: str, positional: tuple[str, ...] = ()) -> Config:
    return parse(Config, "x.py", "Describes itself.", [*argv], positional)


def refusal(capsys, *argv: str, positional: tuple[str, ...] = ()) -> str:
    """What a command line that can't be read comes to: exit code 2, one sentence on stderr."""
    with pytest.raises(SystemExit) as exit:
        parsed(*argv, positional=positional)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.startswith("x.py: ") and err.count("\n") == 1 and err.endswith("\n")
    return err[len("x.py: "):-1]


# ------------------------------------------------------------------------------- reading flags


def test_a_command_line_without_flags_is_the_defaults():
    assert parsed() == Config()


def test_every_kind_of_flag():
    assert parsed("--steps", "4", "--rate", "0.25", "--g", "1", "2", "--batch", "1", "2",
                  "--prompt", "a b", "c", "--sampler", "plms", "--compile", "--max-updates",
                  "-3") == Config(steps=4, rate=0.25, g=(1.0, 2.0), batch=(1, 2),
                                  prompt=("a b", "c"), sampler="plms", compile=True,
                                  max_updates=-3)
    assert parsed("--prompt", "a", "--steps", "2", "--prompt", "b", "c").prompt == ("a", "b", "c")


def test_fields_without_a_flag_come_first_or_between():
    config = parsed("a", "--steps", "3", "b", positional=("files",))
    assert config.files == ("a", "b") and config.steps == 3
    assert parsed(positional=("files",)).files == ()


@pytest.mark.parametrize("argv, message", [
    (["--steps", "x"], "argument --steps: invalid int value: 'x'"),
    (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
    (["--steps"], "argument --steps: expected one argument"),
    (["--g", "1"], "argument --g: expected 2 arguments"),
    (["--sampler", "euler"], "argument --sampler: invalid choice: 'euler'"),
    (["--colour", "red"], "unrecognized arguments: --colour red"),
    (["--steps=--"], "argument --steps: expected one argument"),
    (["--compile=yes"], "argument --compile: ignored explicit argument 'yes'"),
    (["stray"], "unrecognized arguments: stray"),
    (["--colour\n\x1b[31m", "x"], "unrecognized arguments: --colour [31m x")])
def test_a_command_line_that_cannot_be_read(capsys, argv, message):
    assert refusal(capsys, *argv).startswith(message)


def test_help_names_flags_defaults_and_choices(capsys):
    with pytest.raises(SystemExit) as exit:
        parsed("--help")
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "Describes itself." in text
    assert "--max-updates" in text and "sampling steps (8)" in text and "{ddim,plms}" in text
    assert "100 %" in text


def test_fields_share_a_heading_of_help_until_the_next_and_may_have_no_flag(capsys):
    @dataclass(frozen=True)
    class Grouped:
        steps: int = option(8, "how many", group="what to draw")
        seed: int = option(0, "of what")
        hidden: str = option("kept", "of another command")
        device: str = option("", "where", group="machine")

    assert parse(Grouped, "x.py", "", [], (), {"hidden"}) == Grouped()
    with pytest.raises(SystemExit):
        parse(Grouped, "x.py", "", ["--help"], (), {"hidden"})
    headings = capsys.readouterr().out.partition("what to draw:")[2].split("machine:")
    assert ["--seed" in part for part in headings] == [True, False]
    assert "--device" in headings[1] and "hidden" not in "".join(headings)


# ------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("field, good, bad", [
    ("steps", (1, 1000), (0, 1001, -1)),
    ("rate", (1e-9, 0.999), (0.0, 1.0, -1.0, math.nan, math.inf, -math.inf)),
    ("scale", (0.0, 1e30, math.inf), (-1e-9, math.nan, -math.inf)),
    ("g", ((-10.0, 10.0),), ((-11.0, 0.0), (0.0, 11.0), (math.nan, 0.0), (0.0, math.nan))),
    ("batch", ((), (1,), (64, 1)), ((0,), (1, 65)))])
def test_bounds(field, good, bad):
    for value in good:
        check_bounds(replace(Config(), **{field: value}))
    for value in bad:
        with pytest.raises(BadInput, match=f"^--{field} "):
            check_bounds(replace(Config(), **{field: value}))


@pytest.mark.parametrize("argv, message", [
    (["--steps", "0"], "--steps 0: must be from 1 to 1000"),
    (["--steps", "9" * 30], f"--steps {'9' * 30}: must be from 1 to 1000"),
    (["--rate", "nan"], "--rate nan: must be above 0 and below 1"),
    (["--scale", "-1"], "--scale -1.0: must be at least 0"),
    (["--batch", "4", "65"], "--batch 65: must be from 1 to 64"),
    (["--g", "nan", "1"], "--g nan: must be from -10 to 10")])
def test_a_number_out_of_bounds_is_one_sentence(capsys, argv, message):
    assert refusal(capsys, *argv) == message


def test_the_first_fault_is_named():
    require((False, "a"), ("", "b"), (None, "c"), (0, "d"))
    require()
    with pytest.raises(BadInput, match="^b$"):
        require((False, "a"), ([1], "b"), (True, "c"))


def test_one_line_has_no_breaks_and_no_control_characters():
    assert one_line("a\nb\r\n\x1b[31m\tc\u2028d\x85e") == "a b [31m c d e"
    assert one_line("plain é 🎉") == "plain é 🎉"


# ------------------------------------------------------------------------------- running


def outcome(capsys, error: BaseException | None, **options) -> tuple[int, str]:
    """Exit code and stderr of a command that raises."""
    def command():
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as exit:
        run_command("x.py", command, "pass --batch below 8", **options)
    out, err = capsys.readouterr()
    assert out == ""
    return exit.value.code, err


class DynamoError(RuntimeError):
    pass


DynamoError.__module__ = "torch._dynamo.exc"


@pytest.mark.parametrize("error, sentence", [
    (BadInput("--size 3: a multiple of 8"), "--size 3: a multiple of 8"),
    (CheckpointError("x.ckpt is a pickle"), "x.ckpt is a pickle"),
    (BadInput("two\nlines"), "two lines"),
    (ImportError("pip install open_clip_torch"), "pip install open_clip_torch"),
    (SafetensorError("no header"), "no header"),
    (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: No such file or directory"),
    (OSError(28, "No space left on device"), "a file: No space left on device"),
    (OSError(18, "Invalid link", "from", None, "to"), "to: Invalid link"),
    (MemoryError(), "out of memory: pass --batch below 8"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
     "a process that loads images was killed, as happens where memory runs out: pass --batch "
     "below 8"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory: pass --batch below 8"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
     "out of memory: pass --batch below 8"),
    (DynamoError("no compiler\nat all"),
     "--compile can't be used here, leave it out (no compiler)")])
def test_what_a_person_can_mend_is_one_sentence_and_exit_code_2(capsys, error, sentence):
    assert outcome(capsys, error) == (2, f"x.py: {sentence}\n")


def test_ctrl_c_says_what_was_kept_and_exits_with_130(capsys):
    assert outcome(capsys, KeyboardInterrupt()) == (130, "x.py: stopped\n")
    kept = {"interrupted": lambda: "stopped; the images are kept"}
    assert outcome(capsys, KeyboardInterrupt(), **kept) == (
        130, "x.py: stopped; the images are kept\n")
    assert outcome(capsys, KeyboardInterrupt(), interrupted=lambda: "") == (130, "")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ZeroDivisionError(), KeyError("x")])
def test_a_bug_keeps_its_traceback(error):
    def command():
        raise error

    with pytest.raises(type(error)):
        run_command("x.py", command, "")


def test_a_command_that_works_returns_what_it_does():
    assert run_command("x.py", lambda: 3, "") == 3


@pytest.mark.parametrize("script", ["sample.py", "train.py", "eval.py"])
@pytest.mark.parametrize("handler, code", [(signal.SIG_DFL, 130), (signal.SIG_IGN, 7)])
def test_ctrl_c_during_the_imports_is_silent_and_obeys_who_ignores_it(tmp_path, script, handler,
                                                                      code):
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(7)")
    done = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, handler))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_what_counts_as_out_of_memory_and_as_a_failed_compilation():
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("x"))
    assert is_compile_error(DynamoError("x")) and not is_compile_error(RuntimeError("x"))


@pytest.mark.full
def test_no_traceback_is_seen_whatever_the_terminal_can_show():
    """A name that the terminal's encoding lacks is escaped, and Ctrl-C is no traceback."""
    code = """if True:
        import sys
        from dataclasses import dataclass
        from support.cli import BadInput, option, parse, run_command
        @dataclass(frozen=True)
        class Config:
            name: str = option("", "a name")
        config = parse(Config, "x.py", "")
        def command():
            print(config.name)
            if config.name == "stop":
                raise KeyboardInterrupt
            raise BadInput(f"{config.name}: no")
        run_command("x.py", command, "")"""
    for name, shown, code_, ends in (("é🎉", "\\\\xe9\\\\U0001f389", 2, ": no\n"),
                                     ("stop", "stop", 130, "x.py: stopped\n")):
        done = subprocess.run([sys.executable, "-c", code, "--name", name], capture_output=True,
                              text=True, cwd=ROOT, env={"PYTHONIOENCODING": "ascii", "PATH": ""})
        assert done.returncode == code_ and "Traceback" not in done.stderr
        assert done.stdout == shown.replace("\\\\", "\\") + "\n" and done.stderr.endswith(ends)
