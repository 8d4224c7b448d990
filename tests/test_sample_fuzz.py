"""sample.py under prompts and flags that nobody should give: a right picture or one sentence."""

import json
import os
import random
import resource
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image
from test_sample import command, difference, here, refusal, toys  # noqa: F401 (fixtures)

import ppdd
import sample

COUNTED = Counter()
SMALL = "--steps 1 --size 16 --guide none --n 1"

# --------------------------------------------------------------------------------------- prompts

PROMPTS = {
    "empty": "", "blank": "   ", "long": "a red boat " * 1000, "one word": "x" * 10_000,
    "emoji": "👨\u200d👩\u200d👧 a cat 🐱🏳\ufe0f\u200d🌈",
    "right to left": "صورة قطة \u202eabc\u202c תמונה", "accents": "e\u0301" * 3000,
    "control": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f", "zero": "a\0b",
    "newlines": "a\nb\r\nc\rd", "separators": "a\u2028b\u2029c\x85d\x0bе",
    "forged": "a\nSteps: 99, Sampler: X, CFG scale: 1, Seed: 7",
    "forged negative": "a\nNegative prompt: b\nSteps: 99, Sampler: X, CFG scale: 1",
    "path": "../../../etc/passwd", "absolute": "/tmp/x", "device": "CON", "dots": "...",
    "dash": "a --n", "quotes": "\"a\", 'b': c\\", "markup": "<lora:x:1> (a:1.3) [b]",
    "json": '{"prompt": "x"}', "percent": "100% %s {} ${HOME} `id`",
    "special": "<|endoftext|>" * 100, "private": "\ue000\ufffe", "astral": "\U0010ffff\U00020000",
    "bom": "\ufeffa cat"}


def read_as_others_do(parameters: str) -> tuple[str, str, dict]:
    """Prompt, negative prompt and settings, as popular interfaces take them apart."""
    *lines, last = parameters.strip().split("\n")
    cut = next((i for i, s in enumerate(lines) if s.startswith("Negative prompt:")), len(lines))
    settings = dict(part.split(": ", 1) for part in last.split(", "))
    return "\n".join(lines[:cut]), "\n".join(lines[cut:]), settings


@pytest.mark.parametrize("name", PROMPTS)
def test_any_prompt_is_painted_and_kept(here, name):  # noqa: F811
    prompt, before = PROMPTS[name], {*Path().iterdir()}
    start = time.process_time()
    [picture] = command(f"{SMALL} --guide cfg --negative", prompt, f"--prompt={prompt}")
    assert time.process_time() - start < 5
    assert {*Path().iterdir()} - before == {Path("out")} and picture.parent == Path("out")
    assert all(c in "abcdefghijklmnopqrstuvwxyz0123456789-" for c in picture.stem)
    text = Image.open(picture).text
    assert json.loads(text["ppdd"])["prompt"] == [prompt]                            # as it was
    assert len(text["parameters"].split("\n")) == 2 + bool(prompt)
    said, negative, settings = read_as_others_do("x" + text["parameters"])
    assert settings["Steps"] == "1" and settings["Seed"] == "0"
    assert said == "x" + sample.BREAKS.sub(" ", prompt) or not prompt.strip()
    assert negative == (f"Negative prompt: {sample.BREAKS.sub(' ', prompt)}" if prompt else "")
    again = sample.Config(**json.loads(text["ppdd"]) | {"out": "again"})
    sample.run(again)
    assert difference(picture, Path("again") / picture.name) == 0
    COUNTED["prompts"] += 1


@pytest.mark.parametrize("name", ["emoji", "right to left", "newlines", "zero", "long", "empty"])
def test_any_prompt_beside_a_comparison(here, name):  # noqa: F811
    sample.main([*"--compare --steps 1 --size 16 --prompt x".split(), f"--prompt={PROMPTS[name]}"])
    assert Path("out/compare.png").exists()


@pytest.mark.parametrize("data, prompts", [
    (b"\xef\xbb\xbfa cat\r\nb\r\n\r\n", ["a cat", "b"]), (b"a\rb\n\n \t\nc", ["a", "b", "c"]),
    ("a\u2028b\x0cc\x85d\n".encode(), ["a\u2028b\x0cc\x85d"]), (b"a\0b\n", ["a\0b"]),
    (b"a" * 100_000, ["a" * 100_000]), (b"\xff\xfea\0", None), (b"caf\xe9\n", None), (b"", None),
    (b"\xef\xbb\xbf", None), (b"\n" * 1000, None), (b"\xed\xa0\x80", None), (b"\xc0\xaf", None)])
def test_any_file_of_prompts(here, capsys, data, prompts):  # noqa: F811
    Path("p.txt").write_bytes(data)
    if prompts:
        assert sample.read_prompts("p.txt") == prompts
    else:
        assert "--prompts p.txt" in refusal(capsys, "--prompts", "p.txt")
    COUNTED["prompts"] += 1


# ----------------------------------------------------------------------------------------- flags

ABSURD = ["0", "-1", "1.5", "nan", "inf", "-inf", "1e9", "1e400", "9" * 20, "9" * 5000, "text", "",
          " ", "a\nb", "\x1b[31m", "é", "🎉", "٣", "0x10", "1_000", "--", "~", "~no-one/x",
          "/dev/null", "/dev/zero", "/proc/self/mem", "x" * 5000, "../..", "*", "%s", "{}",
          "cpu:-1", "cuda:-1", "cuda:99", "1x1", "0x0", "-8x-8", "nowhere.safetensors",
          ".safetensors", "a:b"]
FLAGS = [f.name for f in fields(sample.Config) if f.name not in ("prompt", "negative")]
SLOW = {("n", "1_000"), ("steps", "1_000")}                      # right, and thousands of pictures


def outcome(capsys, *argv: str) -> str:
    """The one sentence that a command ends with, or "" where it does what it should."""
    capsys.readouterr()
    start = time.process_time()
    try:
        sample.main([*argv])
        said = ""
    except SystemExit as exit:
        said = capsys.readouterr().err.split("prediction/s]\n")[-1]
        assert exit.code == 2 and said.startswith("sample.py: ") and said.count("\n") == 1, said
    assert time.process_time() - start < 5
    COUNTED["refused" if said else "right"] += 1
    return said


@pytest.mark.parametrize("flag", FLAGS)
def test_absurd_values_of_every_flag(here, capsys, monkeypatch, flag):  # noqa: F811
    """In process: exit 2 with one sentence, or a picture; quick, small, and nothing outside."""
    Path("deep/below").mkdir(parents=True)
    monkeypatch.chdir("deep/below")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in (v for v in ABSURD if (flag, v) not in SLOW):
        outcome(capsys, *f"{SMALL} --prompt x".split(), f"--{flag}={value}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024          # KiB
    assert flag in ("out", "export") or not list(here.glob("*.png"))


def test_random_command_lines(here, capsys):  # noqa: F811
    rng, flags = random.Random(0), [*FLAGS, "prompt", "negative", "nonsense", "st"]
    for _ in range(100):
        argv = []
        for flag in rng.choices(flags, k=rng.randint(1, 4)):
            value = rng.choice([v for v in ABSURD if (flag, v) not in SLOW])
            argv += rng.choice([[f"--{flag}", value], [f"--{flag}"], [f"--{flag}={value}"],
                                [value]])
        outcome(capsys, *SMALL.split(), *argv)


def test_help(here, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as exit:
        sample.main(["--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{f.name}" in said for f in fields(sample.Config))


def test_no_memory_is_said(here, capsys, monkeypatch):  # noqa: F811
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(ppdd, "sample", fail)
        assert "out of memory: pass --batch below 8" in outcome(capsys, "--prompt", "x")


def test_names_that_are_odd(here, toys, capsys):  # noqa: F811
    Path("a, b\nc.safetensors").symlink_to(toys / "toy.safetensors")
    [picture] = command(f"{SMALL} --prompt tree --weights", "a, b\nc.safetensors")
    settings = Image.open(picture).text["parameters"].split("\n")
    assert len(settings) == 2 and 'Model: "a, b c", Guide: none' in settings[1]
    name = os.fsdecode(b"\xff.safetensors")
    Path(name).symlink_to(toys / "toy.safetensors")
    assert "not UTF-8: rename it" in outcome(capsys, "--weights", name, "--prompt", "x")
    assert outcome(capsys, *SMALL.split(), "--prompt", "x", "--out", os.fsdecode(b"\xff")) == ""


def test_so_many_were_tried(request):
    chosen = sum(item.path == request.path for item in request.session.items) < 70
    assert chosen or COUNTED["refused"] > 400 and COUNTED["right"] > 100, COUNTED
    assert chosen or COUNTED["prompts"] == len(PROMPTS) + 12
