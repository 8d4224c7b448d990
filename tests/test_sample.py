"""sample.py: what a person gets for a command, for bad ones too, and parity with diffusers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomised, write_single_file
from PIL import Image
from safetensors.torch import save_file
from test_clip_text import reference_tokenizer  # noqa: F401 (a fixture)
from torch._dynamo.testing import CompileCounter
from torch._inductor.exc import InvalidCxxCompiler

import ppdd
import sample
from clip_text import TextConfig, TextEncoder
from ppdd import GuideConfig
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parent.parent
UNET = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention=(True, True),
                  num_heads=4, context_dim=32, norm_groups=8)
DEEP = replace(UNET, channel_mult=(1, 2, 2), attention=(True, True, False))
VAE_CONFIG = VAEConfig(ch=16, ch_mult=(1, 2, 2, 2), num_res_blocks=1, norm_groups=8)
TEXT = TextConfig(width=32, layers=2, heads=4)


def write_base(path: Path, unet: UNetConfig, vae: VAEConfig, text: TextConfig, dtype) -> Path:
    """A random Stable Diffusion of these sizes, as an official single file."""
    encoder = "cond_stage_model.transformer.text_model."
    tensors = {encoder + "embeddings.position_ids": torch.arange(text.positions)[None]}
    for prefix, build in ((encoder, lambda: TextEncoder(text)),
                          ("first_stage_model.", lambda: VAE(vae))):
        state = randomised(build).state_dict()
        tensors |= {prefix + name: p.to(dtype).contiguous() for name, p in state.items()}
    metadata = {"unet_config": asdict(unet), "vae_config": asdict(vae), "text_config": asdict(text)}
    return write_single_file(path, randomised(lambda: UNet(unet)), "model.diffusion_model.", dtype,
                             metadata, **tensors)


def write_guide(path: Path, unet: UNetConfig, kind: str, steps: int, base: str = "toy",
                g_range: tuple = (2, 9), form: str = "sum", **about) -> Path:
    """A random guide that changes a picture."""
    config = GuideConfig(kind=kind, width=64, form=form)
    guide = randomised(lambda: ppdd.build_guide(unet, config), seed=steps)
    ppdd.save_guide(path, guide, config, {"base": base, "steps": steps, "g_range": g_range} | about)
    return path


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> Path:
    """A folder with a base, toy.safetensors, a deeper one, and guides of the first."""
    folder = tmp_path_factory.mktemp("toys")
    write_base(folder / "toy.safetensors", UNET, VAE_CONFIG, TEXT, torch.float32)
    write_base(folder / "deep.safetensors", DEEP, VAE_CONFIG, TEXT, torch.float32)
    for kind in ("tiny", "full"):
        for steps, suffix in ((0, ""), (32, "-32"), (16, "-16"), (8, "-8")):
            write_guide(folder / f"guides/toy/{kind}{suffix}.safetensors", UNET, kind, steps)
    write_guide(folder / "guides/toy/tiny-8-g8.safetensors", UNET, "tiny", 8, g_range=(8, 8))
    return folder


@pytest.fixture
def here(toys, tmp_path, monkeypatch) -> Path:
    """An empty current folder but for guides/; the toy is what the miniature would be."""
    (tmp_path / "guides").symlink_to(toys / "guides")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(ppdd, "MINI", toys / "toy.safetensors")
    monkeypatch.setattr(sample, "__file__", str(tmp_path / "sample.py"))   # no bundled guides
    return tmp_path


def command(line: str, *more: str) -> list[Path]:
    """Runs the command, and returns the numbered pictures of its folder, in order."""
    sample.main([*line.split(), *more])
    return sorted(Path("out").glob("[0-9]*.png")) if Path("out").is_dir() else []


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def difference(a: Path, b: Path) -> int:
    return abs(pixels(a) - pixels(b)).max()


def refusal(capsys, *argv: str) -> str:
    """The sentence on stderr of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as exit:
        sample.main([*argv])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.startswith("sample.py: ") and said.count("\n") == 1, said
    return said


# ----------------------------------------------------------------------- what a command gives

def test_the_command_alone(here, capsys):
    pictures = command("")
    said = capsys.readouterr().out
    assert [p.name[:4] for p in pictures] == [f"{k:03d}-" for k in range(8)]
    assert pictures[0].name == "000-a-big-red-boat-on-the-sea-at-sunset-in-the-middle.png"
    assert all(pixels(p).shape == (64, 64, 3) for p in pictures)
    assert Image.open("out/grid.png").size == (4 * 200 + 8, 2 * 200 + 8)
    assert "v1-5-pruned-emaonly.safetensors" in said and "--weights FILE" in said
    assert "g = 8 (guidance scale 9 elsewhere)" in said
    assert "tiny-8.safetensors, distilled on toy for 8 steps" in said and "grid.png" in said
    assert not list(Path("out").glob(".*"))


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
@pytest.mark.parametrize("guide", ["tiny", "full", "cfg", "none", "named"])
def test_every_guide_and_sampler_is_the_paper_s(here, guide, sampler):
    file = {"tiny": "tiny-8", "full": "full-8", "named": "tiny-8-g8"}.get(guide)
    file = file and f"guides/toy/{file}.safetensors"
    said = f"--steps 3 --size 32 --sampler {sampler} --prompt tree --guide "
    [picture] = command(said + (file if guide == "named" else guide))
    base, module = ppdd.load_base(ppdd.MINI), file and ppdd.load_guide(file, UNET)
    z = ppdd.sample(base.unet, ppdd.noise([0], (4, 4, 4)), base.embed(["tree"]), 8.0, 3, module,
                    base.embed([""]) if guide == "cfg" else None, sampler)
    expected = base.decode(z)[0].permute(1, 2, 0).numpy().astype(int)
    assert abs(pixels(picture) - expected).max() <= 1
    assert guide == "none" or difference(picture, command(said + "none")[-1]) > 10


def test_a_batch_never_changes_a_picture(here):
    command("--steps 2 --batch 1 --n 3 --out one --prompt tree boat")
    command("--steps 2 --batch 4 --n 3 --out four --prompt tree boat")
    pairs = list(zip(sorted(Path("one").glob("0*")), sorted(Path("four").glob("0*"))))
    assert len(pairs) == 6 and all(difference(*pair) <= 1 for pair in pairs)


def test_picture_k_has_seed_plus_k(here):
    pictures = command("--steps 2 --seed 5 --n 2 --prompt tree boat")
    command("--steps 2 --seed 7 --prompt boat")                  # the third picture: first boat
    assert difference(pictures[2], Path("out/004-boat.png")) <= 1
    assert difference(pictures[2], pictures[3]) > 10


def test_a_wide_picture(here):
    [picture] = command("--steps 1 --sampler plms --size 96x48 --prompt tree")
    assert Image.open(picture).size == (96, 48)


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
    monkeypatch.setattr(torch, "compile", lambda function, *, dynamic, mode: real(
        function, fullgraph=True, dynamic=dynamic, backend=counter))
    sample.predictor.cache_clear()
    yield counter
    sample.predictor.cache_clear()


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
    *_, said = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and said.startswith("sample.py: --compile can't be used here")
    assert "C++ compiler" in said and not list(Path("out").iterdir())


@pytest.mark.parametrize("line, count", [
    ("--guide full", 3), ("--guide cfg", 2), ("--compile", 0),
    ("--guide full --export controlnet", 0)])
def test_what_samples_is_packed_and_what_is_compiled_or_exported_is_not(here, backend, monkeypatch,
                                                                        line, count):
    packed = []
    monkeypatch.setattr(ppdd, "pack", lambda *modules: packed.extend(modules))
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
    [picture] = command("--steps 1 --guide none --size 16 --prompt", prompt)
    assert picture == Path("out") / name
    assert Image.open(picture).text["parameters"].startswith(f"{prompt}\nSteps: 1, ")


def test_prompts_from_a_file(here):
    Path("mine.txt").write_bytes("\ufeffa tree\r\n\r\n  eine große Katze \r\n猫".encode())
    pictures = command("--steps 1 --size 16 --prompts mine.txt --prompt boat")
    prompts = [Image.open(p).text["parameters"].split("\n")[0] for p in pictures]
    assert prompts == ["boat", "a tree", "eine große Katze", "猫"]


def test_flags_may_be_repeated(here):
    assert len(command("--steps 1 --size 16 --prompt a b --prompt c")) == 3


# ----------------------------------------------------------------------- what a picture holds

def test_parameters_are_those_of_popular_interfaces(here, toys):
    [picture] = command("--steps 4 --g 6.5 --seed 3 --size 32x64 --guide cfg --negative",
                        "dull, grey", "--prompt", "a tree: red, big")
    lines = Image.open(picture).text["parameters"].split("\n")
    assert lines[:2] == ["a tree: red, big", "Negative prompt: dull, grey"]
    assert dict(part.split(": ") for part in lines[2].split(", ")) == {
        "Steps": "4", "Sampler": "DDIM", "CFG scale": "7.5", "Seed": "3", "Size": "32x64",
        "Model hash": ppdd.fingerprint(toys / "toy.safetensors")[:10], "Model": "toy",
        "Guide": "cfg", "g": "6.5", "Version": "ppdd"}


def test_the_config_in_a_picture_makes_it_again(here):
    pictures = command("--steps 3 --seed 4 --n 2 --batch 4 --prompt tree boat")
    sheet, first = Image.open("out/grid.png").text, Image.open(pictures[0]).text
    assert sheet["parameters"] == first["parameters"] and sheet["sheet"] == "grid"
    assert "sheet" not in first
    config = sample.Config(**json.loads(Image.open(pictures[3]).text["ppdd"]))
    assert (tuple(config.prompt), config.seed, config.n) == (("boat",), 7, 1)
    assert config.size == "64x64" and config.dtype == "fp32"
    sample.run(replace(config, out="again"))
    assert difference(pictures[3], Path("again/000-boat.png")) <= 1


def test_no_guidance_says_so(here, capsys):
    [picture] = command("--steps 1 --guide none --prompt tree")
    assert "g = 0 (guidance scale 1 elsewhere)" in capsys.readouterr().out
    assert "CFG scale: 1, " in Image.open(picture).text["parameters"]


def test_a_comma_in_a_name_is_quoted(here, toys):
    Path("a, b.safetensors").symlink_to(toys / "toy.safetensors")
    [picture] = command("--steps 1 --guide none --prompt tree --weights", "a, b.safetensors")
    assert 'Model: "a, b", Guide: none' in Image.open(picture).text["parameters"]


# ----------------------------------------------------------------------- which guide

@pytest.fixture
def toy(here):
    return ppdd.load_base(ppdd.MINI)


def chosen(base: ppdd.Base, kind: str = "tiny", **settings) -> Path | None:
    return sample.find_guide(sample.Config(**settings), base, kind)


@pytest.mark.parametrize("steps, name", [(1, "-8"), (4, "-8"), (8, "-8"), (11, "-8"), (12, "-16"),
                                         (16, "-16"), (23, "-32"), (32, "-32"), (48, "-32"),
                                         (49, ""), (64, ""), (1000, "")])
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


def test_a_guide_folds_into_another_base(here, toys, capsys):
    shutil.copy(toys / "toy.safetensors", "styled.safetensors")
    command("--weights styled.safetensors --steps 8 --prompt tree")
    said = capsys.readouterr().out
    assert "distilled on toy for 8 steps, folded into styled as it is" in said
    assert "miniature" not in said


def test_a_g_the_guide_does_not_know_is_warned_of(here, capsys):
    command("--steps 1 --g 12 --prompt tree")
    assert capsys.readouterr().err.startswith("warning: tiny-8 was trained for g from 2 to 9\n")
    command("--steps 1 --g 7 --prompt tree --guide guides/toy/tiny-8-g8.safetensors")
    assert "warning: tiny-8-g8 was trained for g from 8 to 8\n" in capsys.readouterr().err


def test_a_negative_prompt_baked_in_is_told(here, capsys):
    write_guide(here / "mine/t.safetensors", UNET, "tiny", 8, uncond="dull")
    command("--steps 1 --guides mine --prompt tree")
    assert "away from 'dull'" in capsys.readouterr().out


# ----------------------------------------------------------------------- the comparison

def test_a_comparison(here):
    assert command("--compare --steps 2 --prompt tree boat") == []
    sheet = Image.open("out/compare.png")
    assert sheet.size == (206 + 4 * 270 + 14, 112 + 2 * 270 + 84)
    assert list(json.loads(sheet.text["milliseconds"])) == list(sample.COLUMNS.values())
    command("--steps 2 --guide cfg --prompt tree boat")
    parameters = sheet.text["parameters"].split("\n")
    assert parameters[0] == "tree" and 'no guidance, CFG, full guide' in parameters[1]
    cell = sheet.crop((206 + 270, 112 + 270, 206 + 270 + 256, 112 + 270 + 256))
    boat = Image.open("out/001-boat.png").resize((256, 256), Image.Resampling.NEAREST)
    assert abs(np.asarray(cell).astype(int) - np.asarray(boat)).max() <= 1
    command("--compare --steps 2 --prompt tree")
    assert Path("out/compare-2.png").exists()


def test_a_comparison_without_a_guide_and_with_a_named_one(here, capsys):
    Path("guides").unlink()
    write_guide(here / "mine.safetensors", UNET, "tiny", 8)
    command("--compare --steps 1 --prompt tree --guide mine.safetensors")
    said = capsys.readouterr().out
    assert said.count("a column is left out") == 2 and "train.py --guide full" in said
    times = json.loads(Image.open("out/compare.png").text["milliseconds"])
    assert list(times) == ["no guidance", "CFG", "mine"]


# ----------------------------------------------------------------------- bad input

@pytest.mark.parametrize("line, part", [
    ("--steps 0", "from 1 to 1000"), ("--steps 1001", "from 1 to 1000"), ("--steps -3", "-3"),
    ("--steps eight", "eight"), ("--g nan", "--g nan"), ("--g inf", "--g inf"), ("--g", "--g"),
    ("--guide huge", "tiny, full, cfg"), ("--guide no.safetensors", "safetensors does not exist"),
    ("--guide toy.safetensors", "is not a guide"), ("--guides nowhere", "no such folder"),
    ("--guide deep-8.safetensors", "another size"), ("--n 0", "--n 0"), ("--n 1000000", "--n"),
    ("--batch 0", "--batch 0"), ("--batch 99999", "--batch"), ("--seed -1", "--seed -1"),
    ("--seed 99999999999999999999", "--seed"), ("--size 100", "multiples of 16 with toy"),
    ("--size 0", "multiples of 16"), ("--size 64x0", "multiples of 16"), ("--size -64", "--size"),
    ("--size 64x64x64", "768x512"), ("--size big", "768x512"), ("--size 9600", "at most 4096"),
    ("--size 99999999", "768x512"), ("--sampler euler", "euler"), ("--dtype fp8", "fp8"),
    ("--negative dull", "train.py --uncond"), ("--negative dull --guide none", "--guide cfg"),
    ("--negative dull --guide cfg --compare", "--guide cfg"),
    ("--prompts no.txt", "no.txt: No such"), ("--prompts empty.txt", "no prompt in it"),
    ("--prompts latin.txt", "not a UTF-8"),
    ("--prompts .", "directory"), ("--out empty.txt", "empty.txt: File exists"),
    ("--out empty.txt/x", "empty.txt/x: Not a directory"), ("--prompt \udcff", "not text"),
    ("--device cuda:99", "none here"), ("--device gpu", "cuda:1"), ("--device meta", "none here"),
    ("--weights no.safetensors", "no.safetensors does not exist"),
    ("--weights latin.txt", "latin.txt is"), ("--weights .", "pass the folder"),
    ("--weights lora.safetensors", "LoRA"), ("--compare --n 17", "32 rows"),
    ("--compare --compile", "leave one out"), ("--nonsense", "nonsense"),
])
def test_bad_input_is_answered_with_one_sentence(here, toys, capsys, line, part):
    Path("empty.txt").write_text(" \n\n")
    Path("latin.txt").write_bytes("né".encode("latin-1"))
    Path("toy.safetensors").symlink_to(toys / "toy.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, "lora.safetensors")
    write_guide(here / "deep-8.safetensors", DEEP, "tiny", 8)
    said = refusal(capsys, "--prompt", "tree", "boat", *line.split(" "))
    assert part in said
    assert not list(Path().glob("out/*"))


def test_no_cuda_is_said(here, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "none here" in refusal(capsys, "--device", "cuda")


def test_no_guide_is_told_how_to_make_one(here, toys, capsys):
    said = refusal(capsys, "--weights", f"{toys}/deep.safetensors")
    assert "`python train.py --guide tiny`" in said and "--weights mini" in said


def test_a_deeper_base_wants_rounder_sizes(here, toys, capsys):
    deep = f"{toys}/deep.safetensors"
    assert "multiples of 32 with deep" in refusal(capsys, "--weights", deep, "--size", "48")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(here, capsys):
    Path("out").mkdir(mode=0o500)
    assert "Permission denied" in refusal(capsys)


@pytest.mark.parametrize("line", ["--steps 0", "--weights no.safetensors", "--g much"])
def test_no_traceback_is_seen(here, line):
    done = subprocess.run([sys.executable, ROOT / "sample.py", *line.split()], text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("sample.py: ")


def test_torchrun_shares_pictures_out(here, toys):
    """The same pictures under the same names, two processes each painting some of the batches."""
    line = f"--weights {toys}/toy.safetensors --steps 2 --size 16 --n 5 --batch 2 --prompt a b"
    alone = command(f"{line} --device cpu")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--",                       # or torchrun takes --n for its own
         ROOT / "sample.py", *line.split(), "--device", "cpu", "--out", "shared"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("10 × PNG in shared") == 1, done.stderr
    assert [done.stdout.count(said) for said in ("base: ", "g = 8", "guide: ")] == [1, 1, 1]
    shared = sorted(Path("shared").glob("[0-9]*.png"))
    assert [p.name for p in shared] == [p.name for p in alone] and len(alone) == 10
    assert all(difference(*pair) <= 1 for pair in zip(alone, shared))
    assert difference(Path("out/grid.png"), Path("shared/grid.png")) <= 1


def test_each_process_has_a_gpu_and_its_pictures_do_not_say_which(capsys, monkeypatch):
    chosen = []
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, f"{value}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert sample.settle(sample.Config()).device == "cuda" and chosen == [3]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "4 processes and 2 GPUs: start at most one" in refusal(capsys)


def test_a_process_that_ends_is_told_of_in_one_sentence(here, capsys, monkeypatch):
    def closed(*_):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", closed)
    assert "another process ended" in refusal(capsys, "--device", "cpu")


def test_importing_does_nothing(here):
    code = ("import sys, sample; print({'open_clip', 'torchvision', 'diffusers', 'transformers'} "
            "& {*sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_starting_imports_nothing_big_but_torch(here):
    """PyTorch loads 900 modules more, SymPy's and Dynamo's, where one can easily do without."""
    code = "import sys, sample; sample.main(); print({'sympy', 'torch._dynamo'} & {*sys.modules})"
    line = ["--weights", ppdd.MINI, "--guide", "guides/toy/tiny-8.safetensors", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *line], text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert done.stdout.endswith("\nset()\n")


# ----------------------------------------------------------------------- diffusers' own pipeline

def their_picture(file: Path, folder: Path, tokenizer, configs: tuple, side: int) -> np.ndarray:
    """The picture that diffusers makes of the same single file, with its configurations offline."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from test_unet import diffusers_unet
    from test_vae import diffusers_vae
    from transformers import CLIPTextConfig
    unet, vae, text = configs
    with torch.device("meta"):
        diffusers_unet(unet).save_config(folder / "unet")
        diffusers_vae(vae).save_config(folder / "vae")
    CLIPTextConfig(
        hidden_size=text.width, intermediate_size=4 * text.width, num_hidden_layers=text.layers,
        num_attention_heads=text.heads, bos_token_id=49406, eos_token_id=49407,
    ).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    parts = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "scheduler": DDIMScheduler}
    index = {name: ["diffusers", part.__name__] for name, part in parts.items()} | {
        "_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None],
        "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe = StableDiffusionPipeline.from_single_file(
        file, config=str(folder), local_files_only=True, safety_checker=None)
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
    theirs = their_picture(file, tmp_path, tokenizer, configs, side)
    assert ours.std() > 20 and (abs(ours - 127.5) < 127).mean() > 0.5      # a picture, not a blot
    print("largest difference", abs(ours - theirs).max(), "mean", abs(ours - theirs).mean())
    assert abs(ours - theirs).max() <= 2


@pytest.fixture
def tokenizer(request):
    tokenizer = request.getfixturevalue("reference_tokenizer")
    tokenizer.model_max_length = 77
    return tokenizer


def test_small_parity(here, tmp_path, tokenizer):
    configs = UNET, VAE_CONFIG, TEXT
    file = write_base(tmp_path / "small.safetensors", *configs, torch.float16)
    check_parity(file, tmp_path, tokenizer, configs, 64)


@pytest.mark.skipif(memory_gib() < 12, reason="needs 12 GiB of memory")
def test_full_size_parity(tmp_path, tokenizer):
    """All of SD 1.5's sizes at 512 × 512: 2 GiB on disk, 10 in memory, minutes on two cores."""
    configs = UNetConfig(), VAEConfig(), TextConfig()
    file = write_base(tmp_path / "v1-5-random.safetensors", *configs, torch.float16)
    try:
        check_parity(file, tmp_path, tokenizer, configs, 512)
    finally:
        file.unlink()
