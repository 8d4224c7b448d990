"""sample.py: what a person gets for a command, for bad ones too, and parity with diffusers."""

# ruff: noqa: F811 (the fixtures' names)

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from references import diffusers_pipeline, tokenizer  # noqa: F401 (a fixture)
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter
from torch._inductor.exc import InvalidCxxCompiler
from toys import (  # noqa: F401 (fixtures)
    DEEP,
    TEXT,
    UNET,
    VAE_CONFIG,
    command,
    difference,
    here,
    pixels,
    refusal,
    toys,
    write_base,
    write_guide,
)

import mini
import ppdd
import sample
import support.base
import support.distributed
import support.guides
from clip_text import TextConfig
from mini import postcards
from mini.judge import load_judge
from support.base import Base, load_base
from support.guides import find_guide, load_guide
from support.images import slug
from unet import UNetConfig
from vae import VAEConfig

ROOT = Path(__file__).resolve().parent.parent
# ----------------------------------------------------------------------- what a command gives

def test_the_command_alone(here, capsys):
    images = command("")
    printed = capsys.readouterr().out
    assert [p.name[:4] for p in images] == [f"{k:03d}-" for k in range(8)]
    assert images[0].name == f"000{slug(mini.EXAMPLES[0])}.png"
    assert all(pixels(p).shape == (64, 64, 3) for p in images)
    assert Image.open("out/grid.png").width == 4 * 266 + 10
    assert all(f"{path}\n" in printed for path in images)
    assert "v1-5-pruned-emaonly.safetensors" in printed and "--weights FILE" in printed
    assert "g = 8 (guidance scale 9 elsewhere)" in printed
    assert "tiny-8.safetensors, distilled on toy for 8 steps" in printed and "grid.png" in printed
    assert not list(Path("out").glob(".*"))


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
@pytest.mark.parametrize("guide", ["tiny", "full", "cfg", "none", "named"])
def test_every_guide_and_sampler_is_the_paper_s(here, guide, sampler):
    file = {"tiny": "tiny-8", "full": "full-8", "named": "tiny-8-g8"}.get(guide)
    file = file and f"guides/toy/{file}.safetensors"
    line = f"--steps 3 --size 32 --sampler {sampler} --prompt tree --guide "
    [image] = command(line + (file if guide == "named" else guide))
    base, module = load_base(support.base.MINI), file and load_guide(file, UNET)
    z = ppdd.sample(base.unet, ppdd.noise([0], (4, 4, 4)), base.embed(["tree"]), 8.0, 3, module,
                    base.embed([""]) if guide == "cfg" else None, sampler)
    expected = base.decode(z)[0].permute(1, 2, 0).numpy().astype(int)
    assert abs(pixels(image) - expected).max() <= 1
    assert guide == "none" or difference(image, command(line + "none")[-1]) > 10


def test_a_batch_size_never_changes_an_image(here):
    command("--steps 2 --batch 1 --n 3 --out one --prompt tree boat")
    command("--steps 2 --batch 4 --n 3 --out four --prompt tree boat")
    pairs = list(zip(sorted(Path("one").glob("0*")), sorted(Path("four").glob("0*"))))
    assert len(pairs) == 6 and all(difference(*pair) <= 1 for pair in pairs)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(here):
    line = "--guide cfg --steps 2 --prompt boat"
    plain, empty, negative = command(line) + command(line, "--negative", "")[1:] + command(
        line, "--negative", "blurry")[2:]
    assert difference(plain, empty) == 0 < difference(plain, negative)


def test_image_k_has_seed_plus_k(here):
    images = command("--steps 2 --seed 5 --n 2 --prompt tree boat")
    command("--steps 2 --seed 7 --prompt boat")                  # the third image: first boat
    assert difference(images[2], Path("out/004-boat.png")) <= 1
    assert difference(images[2], images[3]) > 10


def test_a_wide_image(here):
    [image] = command("--steps 1 --sampler plms --size 96x48 --prompt tree")
    assert Image.open(image).size == (96, 48)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("guide", ["tiny", "full", "cfg"])
def test_half_precision_is_near(here, dtype, guide):
    a, = command(f"--steps 2 --guide {guide} --prompt tree")
    b = command(f"--steps 2 --guide {guide} --prompt tree --dtype {dtype}")[1]
    assert 0 < abs(pixels(a) - pixels(b)).mean() < 16


@pytest.fixture
def backend(monkeypatch) -> CompileCounter:
    """Stands in for PyTorch's compiler, which needs a C++ one; counts the graphs it is given."""
    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, *, dynamic: real(
        function, fullgraph=True, dynamic=dynamic, backend=counter))
    return counter


@pytest.mark.full
@pytest.mark.parametrize("guide", ["tiny", "cfg"])
def test_step_and_decoder_are_compiled_once_for_any_prompt_and_seed(here, backend, guide):
    line = f"--size 32 --steps 2 --guide {guide} --batch 1 --prompt tree boat"
    plain = command(line)
    quick = command(line + " --compile")[2:]
    assert len(quick) == 2 and max(map(difference, plain, quick)) <= 1
    assert backend.frame_count == 2


def test_where_nothing_can_be_compiled_a_sentence_says_so(here, backend, monkeypatch, capsys):
    def fail(*_):
        raise InvalidCxxCompiler

    monkeypatch.setattr(CompileCounter, "__call__", fail)
    line = "--size 32 --steps 1 --guide none --prompt tree --compile"
    with pytest.raises(SystemExit) as exit:
        command(line)
    *_, message = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and message.startswith("sample.py: --compile can't be used here")
    assert "C++ compiler" in message and not list(Path("out").iterdir())


@pytest.mark.parametrize("line, count", [
    ("--guide full", 3), ("--guide cfg", 2), pytest.param("--compile", 0, marks=pytest.mark.full),
    ("--guide full --export controlnet", 0)])
def test_what_samples_is_packed_and_what_is_compiled_or_exported_is_not(here, backend, monkeypatch,
                                                                        line, count):
    packed = []
    monkeypatch.setattr(sample, "prepack", lambda *modules: packed.extend(modules))
    command("--steps 1 --prompt tree " + line)
    assert len(packed) == count


def test_nothing_is_lost_on_a_second_run(here):
    before = {p: p.read_bytes() for p in command("--steps 1 --prompt tree boat --guide none")}
    grid = Path("out/grid.png").read_bytes()
    Path("out/0007-mine.png").touch()
    after = command("--steps 1 --prompt tree --guide none --seed 9")
    assert {p: p.read_bytes() for p in before} == before and Path("out/008-tree.png") in after
    assert Path("out/grid.png").read_bytes() == grid and Path("out/grid-2.png").exists()


@pytest.mark.parametrize("prompt, name", [
    ("../../etc/passwd", "000-etc-passwd.png"), ("Crème brûlée, 8K!", "000-creme-brulee-8k.png"),
    ("猫", "000.png"), ("", "000.png"), ("x" * 500, f"000-{'x' * 60}.png"),
    ("a b", "000-a-b.png"),
])
def test_file_names_stay_in_the_folder(here, prompt, name):
    [image] = command("--steps 1 --guide none --size 16 --prompt", prompt)
    assert image == Path("out") / name
    assert Image.open(image).text["parameters"].startswith(f"{prompt}\nSteps: 1, ")


def test_prompts_from_a_file(here):
    Path("mine.txt").write_bytes("\ufeffa tree\r\n\r\n  eine große Katze \r\n猫".encode())
    images = command("--steps 1 --size 16 --prompts mine.txt --prompt boat")
    prompts = [Image.open(p).text["parameters"].split("\n")[0] for p in images]
    assert prompts == ["boat", "a tree", "eine große Katze", "猫"]


def test_flags_may_be_repeated(here):
    assert len(command("--steps 1 --size 16 --prompt a b --prompt c")) == 3


# ----------------------------------------------------------------------- what an image holds

def test_parameters_are_those_of_popular_interfaces(here, toys):
    [image] = command("--steps 4 --g 6.5 --seed 3 --size 32x64 --guide cfg --negative",
                        "dull, grey", "--prompt", "a tree: red, big")
    lines = Image.open(image).text["parameters"].split("\n")
    assert lines[:2] == ["a tree: red, big", "Negative prompt: dull, grey"]
    assert dict(part.split(": ") for part in lines[2].split(", ")) == {
        "Steps": "4", "Sampler": "DDIM", "CFG scale": "7.5", "Seed": "3", "Size": "32x64",
        "Model hash": support.base.base_sha256(toys / "toy.safetensors")[:10], "Model": "toy",
        "Guide": "cfg", "g": "6.5", "Version": "ppdd"}


def test_the_config_in_an_image_makes_it_again(here):
    images = command("--steps 3 --seed 4 --n 2 --batch 4 --prompt tree boat")
    sheet, first = Image.open("out/grid.png").text, Image.open(images[0]).text
    assert sheet["parameters"] == first["parameters"] and sheet["sheet"] == "grid"
    assert "sheet" not in first
    config = sample.Config(**json.loads(Image.open(images[3]).text["ppdd"]))
    assert (tuple(config.prompt), config.seed, config.n) == (("boat",), 7, 1)
    assert config.size == "64x64" and config.dtype == "fp32"
    sample.run(replace(config, out="again"))
    assert difference(images[3], Path("again/000-boat.png")) <= 1


def test_no_guidance_has_g_0(here, capsys):
    [image] = command("--steps 1 --guide none --prompt tree")
    assert "g = 0 (guidance scale 1 elsewhere)" in capsys.readouterr().out
    assert "CFG scale: 1, " in Image.open(image).text["parameters"]


def test_a_comma_in_a_name_is_quoted(here, toys):
    Path("a, b.safetensors").symlink_to(toys / "toy.safetensors")
    [image] = command("--steps 1 --guide none --prompt tree --weights", "a, b.safetensors")
    assert 'Model: "a, b", Guide: none' in Image.open(image).text["parameters"]


# ----------------------------------------------------------------------- which guide

@pytest.fixture
def toy(here):
    return load_base(support.base.MINI)


def chosen(base: Base, kind: str = "tiny", **settings) -> Path | None:
    return find_guide(base, kind, settings.get("steps", 8), settings.get("guides", ""))


@pytest.mark.parametrize("steps, name", [(1, "-8"), (4, "-8"), (8, "-8"), (11, "-8"), (12, "-16"),
                                         (16, "-16"), (23, "-32"), (32, "-32"), (45, "-32"),
                                         (46, ""), (64, ""), (1000, "")])
def test_the_guide_distilled_for_the_steps_is_taken(toy, steps, name):
    assert chosen(toy, steps=steps) == Path(f"guides/toy/tiny{name}.safetensors")
    assert chosen(toy, "full", steps=steps) == Path(f"guides/toy/full{name}.safetensors")


def test_stage_one_stands_in_for_all(toy, here):
    write_guide(here / "mine/t.safetensors", UNET, "tiny", 64)
    assert chosen(toy, guides="mine", steps=8) == Path("mine/t.safetensors")
    Path("mine/t.safetensors").unlink()
    write_guide(here / "mine/h.safetensors", UNET, "tiny", 16)
    assert chosen(toy, guides="mine", steps=100) == Path("mine/h.safetensors")


def test_the_order_of_folders(toy, here, toys):
    Path("guides").unlink()
    assert chosen(toy) is None
    bundled = write_guide(here / "mini/guides/tiny-8.safetensors", UNET, "tiny", 8, base="other")
    assert chosen(toy) == bundled
    other = write_guide(Path("guides/a/tiny.safetensors"), UNET, "tiny", 0, base="other")
    assert chosen(toy) == bundled and chosen(toy, steps=50) == other     # the steps decide
    bundled = write_guide(here / "mini/guides/mine.safetensors", UNET, "tiny", 0)
    assert chosen(toy) == bundled                                        # its own base's
    gated = write_guide(Path("guides/toy/a.safetensors"), UNET, "tiny", 0, form="gated")
    assert chosen(toy) == gated
    own = write_guide(Path("guides/toy/tiny.safetensors"), UNET, "tiny", 0)
    assert chosen(toy) == own                                            # the paper's form
    given = write_guide(Path("given/x/any.safetensors"), UNET, "tiny", 32, base="other")
    assert chosen(toy, guides="given") == given and chosen(toy, "full") is None


def test_what_is_no_guide_or_does_not_fit_is_passed_over(toy, here):
    Path("mine").mkdir()
    Path("mine/a.safetensors").write_bytes(b"<html>")
    save_file({"x": torch.zeros(1)}, "mine/b.safetensors")
    write_guide(here / "mine/c.safetensors", DEEP, "tiny", 8)
    write_guide(here / "mine/d.safetensors", UNET, "tiny", 8, g_range=(5, 5))
    assert chosen(toy, guides="mine") == Path("guides/toy/tiny-8.safetensors")


def test_a_guide_is_plugged_into_another_base(here, toys, capsys):
    shutil.copy(toys / "toy.safetensors", "styled.safetensors")
    command("--weights styled.safetensors --steps 8 --prompt tree")
    printed = capsys.readouterr().out
    assert "distilled on toy for 8 steps, plugged into styled as it is" in printed
    assert "miniature" not in printed


def test_a_g_outside_the_trained_range_is_warned_of(here, capsys):
    command("--steps 1 --g 12 --prompt tree")
    assert capsys.readouterr().err.startswith("warning: tiny-8 was trained for g from 2 to 9\n")
    command("--steps 1 --g 7 --prompt tree --guide guides/toy/tiny-8-g8.safetensors")
    assert "warning: tiny-8-g8 was trained for g from 8 to 8\n" in capsys.readouterr().err


def test_what_a_guide_was_not_made_for_is_warned_of_once(here, capsys):
    command("--steps 2 --n 3 --sampler plms --prompt tree boat")
    fewer, plms = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert fewer == "warning: tiny-8 was distilled for 8 steps; 2 are fewer"
    assert plms == "warning: tiny-8 was distilled for DDIM's steps, not for PLMS"
    command("--steps 16 --sampler stochastic --prompt tree")
    assert ("warning: tiny-8 was trained without --stochastic: half of the steps start between its "
            "own\n") in capsys.readouterr().err
    command("--steps 8 --prompt tree")
    command("--steps 2 --sampler plms --guide guides/toy/tiny.safetensors --prompt tree")
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("size, warned", [("48", False), ("96x64", False), ("32", True),
                                          ("64x112", True)])
def test_sides_far_from_the_base_s_own_are_warned_of(here, capsys, size, warned):
    command(f"--steps 1 --guide none --prompt tree --size {size}")
    assert ("trained on images of 64 pixels" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("guide", ["tiny", "full", "guides/toy/tiny-8.safetensors"])
def test_g_0_is_sampled_without_the_guide(here, capsys, guide):
    plain, = command("--steps 2 --guide none --prompt tree")
    image = command(f"--steps 2 --g 0 --prompt tree --guide {guide}")[1]
    assert capsys.readouterr().err.count("warning: g = 0 is no guidance: sampling without") == 1
    assert difference(plain, image) == 0 and "Guide: none" in Image.open(image).text["parameters"]


def test_words_that_the_miniature_never_saw_are_named_once(here, capsys):
    command("--steps 1 --guide none --n 2 --prompt", "A tiny cat's boat, 8K", "a cat, in TOWN, cat")
    printed = capsys.readouterr().out
    assert printed.count("the miniature draws 8 subjects (boat, house, tree, cactus, balloon, "
                         "rocket, car, mushroom); it never saw the words: cat's, cat\n") == 1
    rng = random.Random(0)
    captions = [postcards.caption(a, rng) for a in postcards.sample_attributes(300)]
    assert mini.notes_on(captions) == []
    assert mini.notes_on([" ".join(f"x{k}" for k in range(12))])[0].endswith(", x9, and 2 more")


def test_what_a_prompt_loses_is_said(here, capsys):
    command("--steps 1 --guide none --prompt", "a tree (red:1.3)", "boat " * 80)
    printed = capsys.readouterr().out
    assert "'boat boat boat boat boat'" in printed and "'(red:1.3)'" in printed


def test_a_trained_negative_prompt_is_printed(here, capsys):
    write_guide(here / "mine/t.safetensors", UNET, "tiny", 8, uncond="dull")
    command("--steps 1 --guides mine --prompt tree")
    assert "away from 'dull'" in capsys.readouterr().out


def test_a_student_samples_in_place_of_the_base_s_unet(here, toys, capsys):
    """What it paints does not depend on the UNet of the base."""
    about = {"settings": {"guide": "whole"}}
    student = write_guide(here / "mine/whole-8.safetensors", UNET, "whole", 8, **about)
    images = command("--steps 2 --guides mine --guide whole --prompt tree --n 2")
    assert len(images) == 2 and "distilled on toy for 8 steps" in capsys.readouterr().out
    again = command(f"--steps 2 --guide {student} --prompt tree")[-1]
    assert difference(images[0], again) == 0
    other = command(f"--steps 2 --guide {student} --prompt tree --g 3")[-1]
    assert difference(images[0], other) > 0
    assert difference(images[0], command("--steps 2 --guide none --prompt tree")[-1]) > 0


def test_a_student_is_moved_to_another_base(here, toys, capsys):
    """To its own it is moved as it is; to another, by its difference from what it came from."""
    line = f"--steps 2 --prompt tree --guide {here}/mine.safetensors --weights"
    write_guide(here / "mine.safetensors", UNET, "whole", 8, settings={"guide": "whole"})
    other = write_base(here / "other.safetensors", UNET, VAE_CONFIG, TEXT, torch.float32, seed=7)
    toy, deep = f"{toys}/toy.safetensors", f"{toys}/deep.safetensors"
    plain = command(f"{line} {toy}")[-1]
    assert difference(plain, command(f"{line} {toy} --transplant {toy}")[-1]) <= 1
    capsys.readouterr()
    own = command(f"{line} {other}")[-1]
    assert "a UNet of its own: that of other is not used" in capsys.readouterr().out
    moved = command(f"{line} {other} --transplant {toy}")[-1]
    said = capsys.readouterr()
    assert f"moved by its difference from {toy} to other" in said.out and "hash" not in said.err
    write_guide(here / "mine.safetensors", UNET, "whole", 8, base_hash="1",
                settings={"guide": "whole"})
    command(f"{line} {other} --transplant {toy}")
    assert f"whose hash is not that of {toy}" in capsys.readouterr().err
    assert difference(own, moved) > 0
    words = [*line.split(), toy, "--transplant"]
    assert "has other sizes than that of" in refusal(capsys, *words, deep)
    tiny = ("--guide", "tiny", "--transplant", toy)
    assert "works on other bases as it is" in refusal(capsys, "--prompt", "tree", *tiny)


# ----------------------------------------------------------------------- the comparison

def test_a_comparison(here):
    for kind, form in (("tiny", "seeing"), ("whole", "sum")):
        write_guide(here / f"mine/{kind}.safetensors", UNET, kind, 8, form=form)
    assert command("--compare --steps 2 --prompt tree boat --guides mine") == []
    sheet = Image.open("out/compare.png")
    assert sheet.width == 200 + len(sample.METHODS) * 267 + 11 and sheet.height > 104 + 2 * 267
    assert list(json.loads(sheet.text["milliseconds"])) == list(sample.METHODS.values())
    command("--steps 2 --guide cfg --prompt tree boat")
    parameters = sheet.text["parameters"].split("\n")
    assert parameters[0] == "tree" and 'no guidance, CFG, full guide' in parameters[1]
    cell = sheet.crop((200 + 267, 104 + 267, 200 + 267 + 256, 104 + 267 + 256))
    boat = Image.open("out/001-boat.png").resize((256, 256), Image.Resampling.NEAREST)
    assert abs(np.asarray(cell).astype(int) - np.asarray(boat)).max() <= 1
    command("--compare --steps 2 --prompt tree")
    assert Path("out/compare-2.png").exists()


def test_a_comparison_shows_five_examples_and_honours_n(here, capsys):
    command("--compare --steps 1 --guide full")
    command("--compare --steps 1 --n 2 --prompt tree --seed 3")
    assert capsys.readouterr().err.count("--guide full is ignored: --compare shows every") == 1
    config = sample.Config(**json.loads(Image.open("out/compare.png").text["ppdd"]))
    assert tuple(config.prompt) == mini.EXAMPLES[:5]
    two, [image] = Image.open("out/compare-2.png"), command("--steps 1 --seed 4 --prompt tree")
    cell = two.crop((200 + 3 * 267, 104 + 267, 200 + 3 * 267 + 256, 104 + 267 + 256))
    expected = Image.open(image).resize((256, 256), Image.Resampling.NEAREST)
    assert abs(np.asarray(cell).astype(int) - np.asarray(expected)).max() <= 1


def attributes_of(prompt: str) -> list[int]:
    """The attributes that a prompt names, by the tables from which captions are made."""
    tables = [postcards.PHRASES.get(name) or [(value,) for value in values]
              for name, values in postcards.ATTRIBUTES.items()]
    return [next(k for k, phrases in enumerate(table)
                 if any(re.search(rf"\b{phrase}\b", prompt) for phrase in phrases))
            for table in tables]


def test_the_examples_show_the_difference(tmp_path, monkeypatch):
    """Each example misses something without guidance, and CFG and both guides show all of it."""
    monkeypatch.chdir(tmp_path)
    attributes, judge = torch.tensor([attributes_of(p) for p in mini.EXAMPLES]), load_judge()
    assert all(len(set(attributes[:, column].tolist())) == 8 for column in (0, 1))
    for guide in ("none", "cfg", "full", "tiny"):
        command(f"--weights mini --device cpu --guide {guide} --out {guide}")
        images = [pixels(path) for path in sorted(Path(guide).glob("0*.png"))]
        seen = judge.read(torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 255)
        right = (seen == attributes).all(1)
        assert not right.any() if guide == "none" else right.all(), guide


def test_a_comparison_without_a_guide_and_with_a_named_one(here, capsys):
    Path("guides").unlink()
    write_guide(here / "mine.safetensors", UNET, "tiny", 8)
    command("--compare --steps 1 --prompt tree --guide mine.safetensors")
    printed = capsys.readouterr().out
    assert printed.count("a column is left out") == 2
    assert all(f"train.py --guide {kind}" in printed for kind in ("full", "tiny"))
    times = json.loads(Image.open("out/compare.png").text["milliseconds"])
    assert list(times) == ["no guidance", "CFG", "mine"]


# ----------------------------------------------------------------------- bad input

@pytest.mark.parametrize("line, part", [
    ("--steps 0", "from 1 to 1000"), ("--steps 1001", "from 1 to 1000"), ("--steps -3", "-3"),
    ("--steps eight", "eight"), ("--g nan", "--g nan"), ("--g inf", "--g inf"), ("--g", "--g"),
    ("--guide huge", "tiny, seeing, whole or the path"),
    ("--guide no.safetensors", "safetensors does not exist"),
    ("--guide toy.safetensors", "is not a guide"), ("--guides nowhere", "No such file"),
    ("--guides toy.safetensors", "a file, not a folder"),
    ("--guide deep-8.safetensors", "another size"), ("--n 0", "--n 0"), ("--n 1000000", "--n"),
    ("--batch 0", "--batch 0"), ("--batch 99999", "--batch"), ("--seed -1", "--seed -1"),
    ("--seed 99999999999999999999", "--seed"), ("--size 100", "multiples of 16 with toy"),
    ("--size 0", "multiples of 16"), ("--size 64x0", "multiples of 16"), ("--size -64", "--size"),
    ("--size 64x64x64", "768x512"), ("--size big", "768x512"), ("--size 9600", "at most 4096"),
    ("--size 99999999", "768x512"), ("--sampler euler", "euler"), ("--dtype fp8", "fp8"),
    ("--negative dull", "train.py --uncond"), ("--negative dull --guide none", "--guide cfg"),
    ("--negative dull --guide cfg --compare", "--guide cfg"),
    ("--prompts no.txt", "no.txt: there is no such file"),
    ("--prompts empty.txt", "no prompt in it"), ("--prompts latin.txt", "not a text in UTF-8"),
    ("--prompts .", "directory"), ("--out empty.txt", "empty.txt: File exists"),
    ("--out empty.txt/x", "empty.txt/x: Not a directory"), ("--prompt \udcff", "not text"),
    ("--device cuda:99", "none here"), ("--device gpu", "cuda:1"), ("--device meta", "none here"),
    ("--weights no.safetensors", "no.safetensors does not exist"),
    ("--weights latin.txt", "latin.txt is"), ("--weights .", "pass the folder"),
    ("--weights lora.safetensors", "LoRA"), ("--compare --n 17", "32 rows"),
    ("--compare --compile", "leave one out"), ("--compare --g 0", "all columns would be the same"),
    ("--compare --export x", "leave out --compare"), ("--nonsense", "nonsense"),
])
def test_bad_input_is_answered_with_one_sentence(here, toys, capsys, line, part):
    Path("empty.txt").write_text(" \n\n")
    Path("latin.txt").write_bytes("né".encode("latin-1"))
    Path("toy.safetensors").symlink_to(toys / "toy.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, "lora.safetensors")
    write_guide(here / "deep-8.safetensors", DEEP, "tiny", 8)
    message = refusal(capsys, "--prompt", "tree", "boat", *line.split(" "))
    assert part in message
    assert not list(Path().glob("out/*"))


def test_a_missing_gpu_is_named(here, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "none here" in refusal(capsys, "--device", "cuda")


def test_a_missing_guide_names_the_command_that_trains_one(here, toys, capsys):
    deep = f"{toys}/deep.safetensors"
    message = refusal(capsys, "--weights", deep, "--vae", deep, "--guide", "full")
    assert f"`python train.py --guide full --weights {deep} --vae {deep}`" in message
    assert "--weights mini" in message


def test_a_deeper_base_wants_rounder_sizes(here, toys, capsys):
    deep = f"{toys}/deep.safetensors"
    assert "multiples of 32 with deep" in refusal(capsys, "--weights", deep, "--size", "48")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(here, capsys):
    Path("out").mkdir(mode=0o500)
    assert "Permission denied" in refusal(capsys)


@pytest.mark.parametrize("line", ["--weights toy.safetensors", "--guides mine",
                                  "--weights folder", "--guide guides/toy/tiny-8.safetensors"])
def test_what_may_not_be_read_is_said_to_be_so(here, toys, capsys, monkeypatch, line):
    Path("toy.safetensors").symlink_to(toys / "toy.safetensors")
    Path("mine").mkdir()
    Path("folder/unet").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)                  # root may do all
    assert "Permission denied" in refusal(capsys, *line.split())


@pytest.mark.parametrize("line", ["--weights no.safetensors", *(
    pytest.param(line, marks=pytest.mark.full) for line in ("--steps 0", "--g much"))])
def test_no_traceback_is_seen(here, line):
    done = subprocess.run([sys.executable, ROOT / "sample.py", *line.split()], text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("sample.py: ")


@pytest.mark.full
def test_torchrun_shares_the_images(here, toys):
    """The same images under the same names, two processes each sampling some of the batches."""
    line = f"--weights {toys}/toy.safetensors --steps 2 --size 16 --n 5 --batch 2 --prompt a b"
    alone = command(f"{line} --device cpu")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--",                       # or torchrun takes --n for its own
         ROOT / "sample.py", *line.split(), "--device", "cpu", "--out", "shared"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("10 images in shared") == 1, done.stderr
    assert [done.stdout.count(start) for start in ("base: ", "g = 8", "guide: ")] == [1, 1, 1]
    shared = sorted(Path("shared").glob("[0-9]*.png"))
    assert [p.name for p in shared] == [p.name for p in alone] and len(alone) == 10
    assert all(difference(*pair) <= 1 for pair in zip(alone, shared))
    assert difference(Path("out/grid.png"), Path("shared/grid.png")) <= 1


def test_each_process_has_a_gpu_and_its_images_do_not_say_which(here, capsys, monkeypatch):
    chosen = []
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, f"{value}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert sample.resolve_defaults(sample.Config()).device == "cuda"
    assert support.distributed._own_gpu("cuda") == "cuda:3" and chosen == [3]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "4 processes and 2 GPUs: start at most one" in refusal(capsys)


def test_a_process_that_ends_is_reported_in_one_sentence(here, capsys, monkeypatch):
    def closed(*_, **__):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")

    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, f"{value}")
    monkeypatch.setattr(torch.distributed, "init_process_group", closed)
    assert "another process ended" in refusal(capsys, "--device", "cpu")


def test_importing_does_nothing(here):
    code = ("import sys, sample; print({'open_clip', 'torchvision', 'diffusers', 'transformers'} "
            "& {*sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.full
def test_starting_imports_nothing_big_but_torch(here):
    """PyTorch loads 900 modules more, SymPy's and Dynamo's, where one can easily do without."""
    code = "import sys, sample; sample.main(); print({'sympy', 'torch._dynamo'} & {*sys.modules})"
    line = ["--weights", support.base.MINI, "--guide", "guides/toy/tiny-8.safetensors",
            "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *line], text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert done.stdout.endswith("\nset()\n")


# ----------------------------------------------------------------------- diffusers' own pipeline

def their_image(file: Path, folder: Path, tokenizer, configs: tuple, side: int) -> np.ndarray:
    """The image that diffusers makes of the same single file."""
    pipe = diffusers_pipeline(file, folder, tokenizer, configs)
    image = pipe("a big red boat on the sea", num_inference_steps=2, guidance_scale=7.5, width=side,
                 height=side, generator=torch.Generator().manual_seed(3)).images[0]
    return np.asarray(image).astype(int)


def memory_gib() -> float:
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    return np.prod([os.sysconf(n) for n in names], dtype=float) / 2**30 if os.name == "posix" else 0


def check_parity(file: Path, tmp_path: Path, tokenizer, configs: tuple, side: int) -> None:
    line = f"--guide cfg --steps 2 --g 6.5 --dtype fp32 --seed 3 --size {side} --device cpu"
    sample.main([*line.split(), "--weights", f"{file}", "--out", f"{tmp_path}/out",
                 "--prompt", "a big red boat on the sea"])
    ours = pixels(tmp_path / "out/000-a-big-red-boat-on-the-sea.png")
    theirs = their_image(file, tmp_path, tokenizer, configs, side)
    assert ours.std() > 20 and (abs(ours - 127.5) < 127).mean() > 0.5      # an image, not a blot
    print("largest difference", abs(ours - theirs).max(), "mean", abs(ours - theirs).mean())
    assert abs(ours - theirs).max() <= 2


def test_small_parity(here, tmp_path, tokenizer):
    configs = UNET, VAE_CONFIG, TEXT
    file = write_base(tmp_path / "small.safetensors", *configs, torch.float16)
    check_parity(file, tmp_path, tokenizer, configs, 64)


@pytest.mark.full
@pytest.mark.skipif(memory_gib() < 12, reason="needs 12 GiB of memory")
def test_full_size_parity(tmp_path, tokenizer):
    """All of SD 1.5's sizes at 512 × 512: 2 GiB on disk, 10 in memory, minutes on two cores."""
    configs = UNetConfig(), VAEConfig(), TextConfig()
    file = write_base(tmp_path / "v1-5-random.safetensors", *configs, torch.float16)
    try:
        check_parity(file, tmp_path, tokenizer, configs, 512)
    finally:
        file.unlink()
