"""sample.py under prompts and flags that nobody should give: a right image or one sentence."""

# ruff: noqa: F811 (the fixtures' names)

import json
import os
import random
import resource
import time
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image
from toys import ABSURD, command, difference, here, refusal, toys  # noqa: F401 (fixtures)

import sample
from support.captions import read_prompts
from support.cli import flag_of, one_line

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
def test_any_prompt_is_sampled_and_kept(here, name):
    prompt, before = PROMPTS[name], {*Path().iterdir()}
    start = time.process_time()
    [image] = command(f"{SMALL} --guide cfg --negative", prompt, f"--prompt={prompt}")
    assert time.process_time() - start < 5
    assert {*Path().iterdir()} - before == {Path("out")} and image.parent == Path("out")
    assert all(c in "abcdefghijklmnopqrstuvwxyz0123456789-" for c in image.stem)
    text = Image.open(image).text
    assert json.loads(text["ppdd"])["prompt"] == [prompt]                            # as it was
    assert len(text["parameters"].split("\n")) == 2 + bool(prompt)
    positive, negative, settings = read_as_others_do("x" + text["parameters"])
    assert settings["Steps"] == "1" and settings["Seed"] == "0"
    assert positive == "x" + one_line(prompt) or not prompt.strip()
    assert negative == (f"Negative prompt: {one_line(prompt)}" if prompt else "")
    again = sample.Config(**json.loads(text["ppdd"]) | {"out": "again"})
    sample.run(again)
    assert difference(image, Path("again") / image.name) == 0


@pytest.mark.parametrize("name", ["emoji", "right to left", "newlines", "zero", "long", "empty"])
def test_any_prompt_beside_a_comparison(here, name):
    sample.main([*"--compare --steps 1 --size 16 --prompt x".split(), f"--prompt={PROMPTS[name]}"])
    assert Path("out/compare.png").exists()


@pytest.mark.parametrize("data, prompts", [
    (b"\xef\xbb\xbfa cat\r\nb\r\n\r\n", ["a cat", "b"]), (b"a\rb\n\n \t\nc", ["a", "b", "c"]),
    ("a\u2028b\x0cc\x85d\n".encode(), ["a b c d"]), (b"a\0b\n", ["a\0b"]),
    (b"a" * 100_000, ["a" * 100_000]), (b"\xff\xfea\0", ["a"]), (b"caf\xe9\n", None), (b"", None),
    (b"\xef\xbb\xbf", None), (b"\n" * 1000, None), (b"\xed\xa0\x80", None), (b"\xc0\xaf", None)])
def test_any_file_of_prompts(here, capsys, data, prompts):
    Path("p.txt").write_bytes(data)
    if prompts:
        assert read_prompts("p.txt") == prompts
    else:
        assert "--prompts p.txt" in refusal(capsys, "--prompts", "p.txt")


# ----------------------------------------------------------------------------------------- flags

FLAGS = [flag_of(f.name)[2:] for f in fields(sample.Config) if f.name not in ("prompt", "negative")]
# No value of ABSURD is right for these.
NAMES_ONLY = ("guide", "sampler", "dtype", "compile", "compare", "invert")
SLOW = {("n", "1_000"), ("steps", "1_000")}                      # right, and thousands of images


def outcome(capsys, *argv: str) -> str:
    """The one sentence that a command ends with, or "" where it does what it should."""
    capsys.readouterr()
    start = time.process_time()
    try:
        sample.main([*argv])
        message = ""
    except SystemExit as exit:
        message = capsys.readouterr().err.split("prediction/s]\n")[-1]
        assert exit.code == 2 and message.startswith("sample.py: "), message
        assert message.count("\n") == 1, message
    assert time.process_time() - start < 5
    return message


@pytest.mark.parametrize("flag", [
    pytest.param(flag, marks=pytest.mark.full) if flag in ("out", "export", "lora") else flag
    for flag in FLAGS])
def test_absurd_values_of_every_flag(here, capsys, monkeypatch, flag):
    """In process: exit 2 with one sentence, or an image; quick, small, and nothing outside."""
    Path("deep/below").mkdir(parents=True)
    monkeypatch.chdir("deep/below")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusals = [outcome(capsys, *f"{SMALL} --prompt x".split(), f"--{flag}={value}")
                for value in ABSURD if (flag, value) not in SLOW]
    assert sum(map(bool, refusals)) > 5 and all(refusals) == (flag in NAMES_ONLY)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024          # KiB
    assert flag in ("out", "export") or not list(here.glob("*.png"))


def test_random_command_lines(here, capsys):
    rng, flags = random.Random(1), [*FLAGS, "prompt", "negative", "nonsense", "st"]
    refused = 0
    for _ in range(200):
        argv = []
        for flag in rng.choices(flags, k=rng.randint(1, 3)):
            value = rng.choice([v for v in ABSURD if (flag, v) not in SLOW])
            argv += rng.choice([[f"--{flag}", value], [f"--{flag}"], [f"--{flag}={value}"],
                                [value]])
        refused += bool(outcome(capsys, *SMALL.split(), *argv))
    assert 100 < refused < 200


def test_help(here, capsys):
    with pytest.raises(SystemExit) as exit:
        sample.main(["--help"])
    assert exit.value.code == 0
    message = capsys.readouterr().out
    assert all(flag_of(f.name) in message for f in fields(sample.Config))
    assert all(f"\n{group}:\n" in message
               for group in ("what to draw", "what to edit", "base and guide", "output", "machine"))


def test_a_lack_of_memory_is_reported(here, capsys, monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(sample, "fast_sample", fail)
        assert "out of memory: pass --batch below 8" in outcome(capsys, "--prompt", "x")


def test_names_that_are_odd(here, toys, capsys):
    Path("a, b\nc.safetensors").symlink_to(toys / "toy.safetensors")
    [image] = command(f"{SMALL} --prompt tree --weights", "a, b\nc.safetensors")
    settings = Image.open(image).text["parameters"].split("\n")
    assert len(settings) == 2 and 'Model: "a, b c", Guide: none' in settings[1]
    name = os.fsdecode(b"\xff.safetensors")
    Path(name).symlink_to(toys / "toy.safetensors")
    assert "not UTF-8: rename it" in outcome(capsys, "--weights", name, "--prompt", "x")
    assert outcome(capsys, *SMALL.split(), "--prompt", "x", "--out", os.fsdecode(b"\xff")) == ""
