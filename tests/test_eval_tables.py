"""eval.py's tables and figures: what a command leaves, and what a second one makes of it."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import TEXT, UNET, VAE_CONFIG, write_base

import eval as tables
import ppdd
from eval import Row, load_clip
from mini import postcards
from mini.judge import load_judge

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2
PLAIN = (Row("none-2", "no guidance, 2 steps", "none", STEPS, only_g=0.0),
         Row("cfg-2", "CFG, DDIM, 2 steps", "cfg", STEPS),
         Row("cfg-plms-2", "CFG, PLMS, 2 steps", "cfg", STEPS, "plms"))
GUIDES = ("full", "tiny", "tiny-8-g8")
FEW = "--count 3 --batch 2 --seeds 2 --references 24 --repeats 1".split()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder, a miniature without styles in mini/, and short runs."""
    (tmp_path / "mini").mkdir()
    for name in ("mini.safetensors", "clip.json", "clip.safetensors", "guides"):
        (tmp_path / "mini" / name).symlink_to(ROOT / "mini" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))                # no Inception there
    monkeypatch.setattr(ppdd, "MINI", tmp_path / "mini" / "mini.safetensors")
    for name, value in (("PLAIN", PLAIN), ("GUIDES", GUIDES), ("OURS", ()), ("STAGE_ONE", STEPS)):
        monkeypatch.setattr(tables, name, value)
    return tmp_path


def command(line: str, *more: str) -> None:
    tables.main([*line.split(), *more])


def refusal(capsys, *argv: str) -> str:
    """The sentence on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        tables.main([*argv])
    said = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and said[-1].startswith("eval.py: "), said
    return said[-1]


def result(file: str = "results/table2.json") -> dict:
    """A result less what no two runs share: its times, and what says how it was run."""
    read = json.loads(Path(file).read_text())
    for base in read["bases"].values():
        for row in base["rows"].values():
            row.pop("milliseconds", None)
    read["protocol"] = {k: v for k, v in read["protocol"].items()
                        if k not in ("processes", "settings", "hardware")}
    return read


def make_styles(here: Path) -> None:
    (here / "mini" / "styles").mkdir()
    for style in postcards.STYLES[1:]:
        shutil.copy(ROOT / "mini" / "mini.safetensors", here / f"mini/styles/{style}.safetensors")


def drawn_on(path: str) -> np.ndarray:
    """A figure's pixels; it must not be blank."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.std() > 10
    return pixels


# ----------------------------------------------------------------------- Table 2

def test_table2(here, capsys):
    """Every score is recomputed from the stored pictures, by other code."""
    command("table2 --g 2 8", *FEW)
    told, page = json.loads(Path("results/table2.json").read_text()), capsys.readouterr().out
    rows = told["bases"]["mini"]["rows"]
    assert {name: list(row["cells"]) for name, row in rows.items()} == {
        "none-2": ["0"], "cfg-2": ["2", "8"], "cfg-plms-2": ["2", "8"], "full": ["2", "8"],
        "tiny": ["2", "8"], "tiny-8-g8": ["8"]}
    assert [(row["UNet passes"], row["guide passes"]) for row in rows.values()] == [
        (2, 0), (4, 0), (6, 0), (2, 2), (2, 0), (8, 0)]
    assert all(row["milliseconds"]["median"] > 0 for row in rows.values())
    cell, expected = rows["full"]["cells"]["8"], [scores("full-g8", seed) for seed in (0, 1)]
    for k, seed in enumerate(("0", "1")):
        found = {name: cell["seeds"][seed][name] for name in expected[k]}
        assert found == pytest.approx(expected[k], rel=1e-3, abs=2e-3)
    for name in expected[0]:
        values = [cell["seeds"][seed][name] for seed in ("0", "1")]
        assert cell["mean"][name] == pytest.approx(np.mean(values), abs=1e-3)
        assert cell["spread"][name] == pytest.approx(np.std(values, ddof=1), abs=1e-3)
    mean = f"{cell['mean']['CLIP-FID']:.4f} ± {cell['spread']['CLIP-FID']:.4f} / "
    page = page.removeprefix(f"{ppdd.NO_WEIGHTS}\n")
    assert page == Path("results/table2.md").read_text() + "\n" and mean in page
    assert "CLIP-FID (the miniature's CLIP) / CLIP score / accuracy in %" in page
    assert " FID" not in page and "2 + 2 guide" in page and rows["full"]["guide"] in page


def scores(cell: str, seed: int) -> dict[str, float]:
    """A cell's scores, from its pictures: the distance by a nuclear norm, no covariances."""
    first = 10**9 + 10**6 * seed
    files = sorted(Path("runs/eval/mini").glob(f"*/{cell}-seed{seed}/*.png"))
    assert len(files) == 3
    pictures = torch.from_numpy(np.stack([np.asarray(Image.open(f)) for f in files]))
    pictures = pictures.permute(0, 3, 1, 2)
    generator, rng = torch.Generator().manual_seed(first - 1), random.Random(first - 1)
    asked = postcards.sample_attributes(3, generator)
    prompts = [postcards.caption(a, rng, left_out=False) for a in asked]
    generator = torch.Generator().manual_seed(7)
    real = postcards.draw(postcards.sample_attributes(24, generator), generator=generator)
    clip = load_clip("mini")
    x, y = (clip.images(v).double().numpy() for v in (pictures, (real * 255).round().byte()))
    a, b = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * (
        np.linalg.norm(a @ b.T, "nuc"))
    seen = load_judge().read(pictures / 255)
    cosines = (x * clip.texts(prompts).double().numpy()).sum(1)
    return {"CLIP-FID": distance, "CLIP": 100 * cosines.mean(),
            "accuracy": 100 * (seen == asked).all(1).double().mean().item(),
            "color": 100 * (seen == asked)[:, 1].double().mean().item()}


def test_a_killed_run_goes_on(here, monkeypatch):
    """Killed between two pictures of a cell, it ends as an uninterrupted one would."""
    save, left = tables.save_png, [8]

    def save_few(path, image):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        save(path, image)

    monkeypatch.setattr(tables, "save_png", save_few)
    with pytest.raises(SystemExit) as exit:
        command("table2 --g 8", *FEW)
    assert exit.value.code == 130
    done = result()["bases"]["mini"]["rows"]
    assert list(done["none-2"]["cells"]["0"]["seeds"]) == ["0", "1"] and not done["cfg-2"]["cells"]
    kept = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.png")}
    assert len(kept) == 8
    left[0] = -1
    command("table2 --g 8", *FEW)
    resumed = result()
    untouched = [path for path, at in kept.items() if path.stat().st_mtime_ns == at]
    assert len(untouched) == 8                        # 3 + 3, and the whole batch of the third cell
    shutil.rmtree("results"), shutil.rmtree("runs")
    command("table2 --g 8", *FEW)
    assert result() == resumed


def test_finished_cells_are_kept_and_others_are_not(here):
    command("table2 --g 8", *FEW)
    before = result()
    shutil.rmtree("runs")
    command("table2 --g 8", *FEW)
    assert result() == before and not Path("runs").exists()
    shutil.copytree(ROOT / "mini" / "guides", "guides/mini")
    shutil.copy("guides/mini/tiny-8.safetensors", "guides/mini/tiny.safetensors")
    command("table2 --g 8", *FEW)
    painted = {path.parent.name for path in Path("runs").rglob("*.png")}
    assert painted == {"tiny-g8-seed0", "tiny-g8-seed1"}        # only that guide is another one


def test_two_processes_give_what_one_gives(here):
    """torchrun shares out batches: the pictures and the numbers are those of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                          # with more, sums are ordered otherwise
    command("table2 --g 8", *FEW)
    torch.set_num_threads(threads)
    one = result()
    pictures = {p.relative_to("runs"): p.read_bytes() for p in Path("runs").rglob("*.png")}
    shutil.rmtree("results"), shutil.rmtree("runs")
    Path("short.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
        "import eval as tables, ppdd, torch\nfrom eval import Row\ntorch.set_num_threads(1)\n"
        f"ppdd.MINI, tables.STAGE_ONE = Path({str(ppdd.MINI)!r}), {STEPS}\n"
        f"tables.PLAIN, tables.GUIDES, tables.OURS = {PLAIN}, {GUIDES}, ()\ntables.main()\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "2", "short.py", "table2", "--g", "8", *FEW], check=True,
                   env=environment, capture_output=True)
    assert json.loads(Path("results/table2.json").read_text())["protocol"]["processes"] == 2
    again = {p.relative_to("runs"): p.read_bytes() for p in Path("runs").rglob("*.png")}
    assert again == pictures and result() == one


def test_given_prompts_have_no_accuracy(here):
    Path("prompts.txt").write_text("a red boat\na green tree\na house at night\n")
    command("table2 --g 8 --prompts prompts.txt --guides tiny-16", *FEW)
    measured = result()["bases"]["mini"]
    assert measured["rows"]["tiny-16"]["title"] == "tiny guide, 16 steps"
    assert set(measured["rows"]["tiny"]["cells"]["8"]["mean"]) == {"CLIP-FID", "CLIP"}
    assert "accuracy in %" not in Path("results/table2.md").read_text()


@pytest.fixture
def two_rows(here, monkeypatch) -> Path:
    """As `here`, with less to paint: no guidance, and the tiny guide."""
    monkeypatch.setattr(tables, "PLAIN", PLAIN[:1])
    monkeypatch.setattr(tables, "GUIDES", ("tiny",))
    return here


def test_no_run_drops_what_a_result_holds(two_rows, capsys):
    shutil.copy(ROOT / "mini" / "mini.safetensors", "other.safetensors")
    command("table2 --g 8 --guides tiny-16", *FEW)
    before = Path("results/table2.json").read_bytes()
    same = ["--guides", "tiny-16"]
    for more, said in (([*same, "--weights", "other.safetensors"], "other bases too (mini)"),
                       ([], "other rows too (tiny-16)"),
                       ([*same, "--references", "25"], "measured by another references, ref")):
        assert said in refusal(capsys, "table2", "--g", "8", *FEW, *more)
        assert Path("results/table2.json").read_bytes() == before


def test_times_stay_until_all_rows_are_timed_again(two_rows, monkeypatch):
    command("table2 --g 8", *FEW)
    before = json.loads(Path("results/table2.json").read_text())

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "time_rows", killed)
    with pytest.raises(SystemExit):
        command("table2 --g 8", *FEW)
    after = json.loads(Path("results/table2.json").read_text())
    assert after["bases"] == before["bases"]


def test_a_damaged_picture_is_painted_again(two_rows, capsys):
    command("table2 --g 8", *FEW)
    Path("results/table2.json").unlink()
    damaged = next(Path("runs").glob("eval/mini/*/tiny-g8-seed0/00001.png"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    said = refusal(capsys, "table2", "--g", "8", *FEW)
    assert str(damaged) in said and "painted again" in said and "--skip-bad" not in said
    damaged.unlink()
    command("table2 --g 8", *FEW)
    assert damaged.read_bytes() == whole


def test_references_from_a_folder_or_statistics(here, capsys):
    Path("real").mkdir()
    drawn = postcards.draw(postcards.sample_attributes(5, torch.Generator().manual_seed(1)))
    for k, picture in enumerate((drawn * 255).round().byte()):
        tables.to_image(picture).save(f"real/{k}.png")
    command("table2 --g 8 --real real", *FEW)
    assert result()["bases"]["mini"]["measured by"]["reference pictures"] == 5
    assert "nowhere" in refusal(capsys, "table2", "--real", "nowhere", *FEW)
    assert "nowhere.npz" in refusal(capsys, "table2", "--real", "nowhere.npz", *FEW)


def test_a_base_without_guides(here, capsys):
    """Another small base has the rows that need none, and one line says so for each guide."""
    write_base(here / "toy.safetensors", UNET, VAE_CONFIG, TEXT, torch.float32)
    command("table2 --g 8 --weights toy.safetensors", *FEW)
    assert list(result()["bases"]["toy"]["rows"]) == ["none-2", "cfg-2", "cfg-plms-2"]
    assert capsys.readouterr().out.count("a row is left out: ") == len(GUIDES)
    for figure in ("fig5", "fig6", "fig7"):
        said = refusal(capsys, figure, "--weights", "toy.safetensors")
        assert "there is no guide for toy" in said
    assert "no stage-one guide for toy" in refusal(capsys, "match", "--weights", "toy.safetensors")


def test_a_missing_guide_leaves_its_row_out(here, capsys, monkeypatch):
    monkeypatch.setattr(tables, "GUIDES", ("tiny", "tiny-3"))
    command("table2 --g 8", *FEW)
    assert "there is no guides/mini/tiny-3.safetensors" in capsys.readouterr().out
    assert "tiny" in (rows := result()["bases"]["mini"]["rows"]) and "tiny-3" not in rows


def test_sentences(here, capsys, monkeypatch):
    Path("p.txt").write_text("a boat\n")
    assert "train.py --styles-only" in refusal(capsys, "table3")
    assert "train.py --styles-only" in refusal(capsys, "fig8")
    assert "table2" in refusal(capsys, "quality")
    assert "multiple of" in refusal(capsys, "table2", "--size", "60")
    assert "--seeds" in refusal(capsys, "table2", "--seeds", "-1")
    assert "from 1 to" in refusal(capsys, "table2", "--references", "1000000000000")
    assert "nothing to match" in refusal(capsys, "match", "--g", "0")
    assert "nothing to match" in refusal(capsys, "match", "--g", "8", "1e-9")
    Path("results").mkdir()
    Path("results/table2.json").write_text("{}")
    assert "move it away" in refusal(capsys, "table2", *FEW)
    Path("results/table2.json").unlink()
    command("table2 --g 8", *FEW)
    before = Path("results/table2.json").read_bytes()
    assert "another setting (g)" in refusal(capsys, "table2", "--g", "2", *FEW)
    assert Path("results/table2.json").read_bytes() == before
    assert "does not exist" in refusal(capsys, "fig5", "--guides", "nowhere.safetensors")
    monkeypatch.setattr(tables, "is_mini", lambda base: False)
    assert "--prompts is needed" in refusal(capsys, "table2")
    assert "--real is needed" in refusal(capsys, "table2", "--prompts", "p.txt", "--size", "64")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refusal(capsys, "quality")


def test_full_memory_is_a_sentence_and_a_bug_is_not(here, capsys, monkeypatch):
    def fails(config):
        raise errors.pop()

    errors = [RuntimeError("shapes differ"), MemoryError(), torch.OutOfMemoryError("CUDA"),
              RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …")]
    monkeypatch.setitem(tables.COMMANDS, "match", fails)
    while len(errors) > 1:
        assert "out of memory: pass a smaller --batch" in refusal(capsys, "match")
    with pytest.raises(RuntimeError, match="shapes differ"):
        tables.main(["match"])


def test_names_that_no_encoding_has_are_written_and_printed(here, monkeypatch):
    name = os.fsdecode(b"a\xff")
    monkeypatch.setitem(tables.COMMANDS, "match", lambda config: tables.finish(
        Path("r.json"), {"folder": name}, f"{name} Θ\n"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    tables.main(["match"])
    assert json.loads(Path("r.json").read_text())["folder"] == name
    assert Path("r.md").read_text(encoding="utf-8") == "a\\udcff Θ\n"


def test_accuracy_is_the_judge_s(here, monkeypatch):
    """Real postcards of what the prompts say are right, and those of other prompts are not.

    Those to compare with are drawn once, for the distance and for the judge.
    """
    drawn, draw = [], postcards.draw
    monkeypatch.setattr(postcards, "draw", lambda a, *more: drawn.append(len(a)) or draw(a, *more))
    base = ppdd.load_base(ppdd.MINI)
    config = tables.fill(tables.Config(command="table2", count=200, device="cpu"))
    bench = tables.Bench(config, base)
    for name, shift, low, high in (("right", 0, 99, 100), ("wrong", 1, 0, 5)):
        cell = tables.Cell(tables.Row(name, name, "none", STEPS), 0.0, 0)
        _, attributes = bench.prompts(0)
        for k, picture in enumerate(postcards.draw(attributes.roll(shift, 0))):
            path = bench.folder(cell) / f"{k:05d}.png"
            tables.save_png(path, tables.to_image((picture * 255).round().byte()))
        assert low <= bench.score(cell)["accuracy"] <= high
    assert bench.measured_by()[tables.JUDGED] > 99
    assert sum(drawn) == 2 * 200 + config.references


def test_seeds_never_share_noise(here, monkeypatch):
    seen, noise = [], ppdd.noise
    monkeypatch.setattr(ppdd, "noise", lambda seeds, shape: noise(seen.extend(seeds) or
                                                                  seen[-len(seeds):], shape))
    base = ppdd.load_base(ppdd.MINI)
    config = tables.fill(tables.Config(command="table2", count=3, batch=2, device="cpu"))
    bench = tables.Bench(config, base)
    for s in range(2):
        bench.paint(tables.Cell(PLAIN[0], 0.0, s), lambda n: None)
    assert len(seen) == len(set(seen)) == 6
    assert bench.prompts(0)[0] != bench.prompts(1)[0]


# ----------------------------------------------------------------------- the others

def test_table3_and_fig8(here):
    make_styles(here)
    command("table3", *FEW)
    bases = result("results/table3.json")["bases"]
    assert list(bases) == ["watercolor", "cartoon", "realistic"]
    for style, base in bases.items():
        assert list(base["rows"]) == ["none-2", "cfg-2", "full", "tiny"]
        assert base["measured by"]["references"].endswith(f"style {style}")
        assert all(list(row["cells"]) in (["8"], ["0"]) for row in base["rows"].values())
    assert "| cartoon | tiny guide, 2 steps |" in Path("results/table3.md").read_text()
    command("fig8 --prompt boat tree")
    assert drawn_on("docs/fig8.png").shape[0] > 9 * 192
    command("table3 --quick", *FEW[:2])
    quick = result("runs/eval/table3-quick.json")["bases"]
    assert list(quick) == list(bases) and "references" in quick["cartoon"]["measured by"]


def test_table3_of_given_bases(two_rows, capsys):
    """Each base may have real pictures of its own; what can't work is said before any work."""
    for k, name in enumerate(("a", "b")):
        shutil.copy(ROOT / "mini" / "mini.safetensors", f"{name}.safetensors")
        Path(name).mkdir()
        drawn = postcards.draw(postcards.sample_attributes(5 + k), postcards.STYLES[k + 1])
        for i, picture in enumerate((drawn * 255).round().byte()):
            tables.to_image(picture).save(f"{name}/{i}.png")
    both = ["--bases", "a.safetensors", "b.safetensors"]
    write_base(two_rows / "toy.safetensors", UNET, VAE_CONFIG, TEXT, torch.float32)
    command("table3", *FEW, *both, "--real", "a", "b")
    bases = result("results/table3.json")["bases"]
    assert [base["measured by"]["reference pictures"] for base in bases.values()] == [5, 6]
    for flags, said in (
            ([*both, "--real", "a", "b", "a"], "or 2, one each"), (both[:2], "bases too (b)"),
            ([*both, "nowhere.safetensors"], "nowhere.safetensors does not exist"),
            ([*both, "./a.safetensors"], "a name of its own"),
            (["--bases", "toy.safetensors", "--weights", "toy.safetensors"], "no guide for toy")):
        assert said in refusal(capsys, "table3", *FEW, *flags)
    assert "--real: table2 has one base" in refusal(capsys, "table2", "--real", "a", "b", *FEW)


def test_quick_has_files_of_its_own(here):
    Path("results").mkdir()
    Path("results/table2.json").write_text("the real one")
    command("table2 --quick --out results/table2.json", *FEW[:2])
    assert Path("results/table2.json").read_text() == "the real one"
    told = json.loads(Path("results/table2-quick.json").read_text())["bases"]["mini"]["rows"]
    assert list(told["full"]["cells"]) == ["2", "8"]
    assert list(told["full"]["cells"]["8"]["seeds"]) == ["0", "1"]


def test_match(here):
    """A zeroed guide leaves all of the correction, whatever the latents."""
    path = Path("guides/mini/zero.safetensors")
    guide = ppdd.build_guide(ppdd.load_base(ppdd.MINI).unet.config, ppdd.GuideConfig())
    ppdd.save_guide(path, guide, ppdd.GuideConfig(), {"base": "mini", "steps": 0})
    command("match --count 3 --batch 2 --g 2 8 --guides zero --quick")
    told = json.loads(Path("runs/eval/match-quick.json").read_text())["guides"]
    assert list(told) == ["full", "tiny", "zero"]
    for source in tables.SOURCES:
        assert told["zero"][source]["all"] == pytest.approx(100)
        assert told["zero"][source]["by t"].keys() == told["full"][source]["by t"].keys()
        assert set(told["zero"][source]["by g"].values()) == {100.0}
    assert told["full"][tables.SOURCES[0]]["all"] < 95
    page = Path("runs/eval/match-quick.md").read_text()
    assert "| zero | CFG's own trajectories | 100.0 |" in page


def test_match_is_what_training_calls_unexplained(here, monkeypatch):
    """For every guide and g, on the states of a plain CFG sampling and on noised pictures; the
    base runs twice for all of them together."""
    base = ppdd.load_base(ppdd.MINI)
    config = tables.Config(command="match", count=2, device="cpu", g=(2.0, 8.0))
    bench, grid = tables.Bench(config, base), ppdd.step_grid(STEPS)
    guides = [tables.guide_row(config, base, name) for name in ("full", "tiny")]
    passes, encode = [], base.unet.encode
    monkeypatch.setattr(base.unet, "encode", lambda *given: passes.append(1) or encode(*given))
    sums = tables.unexplained(bench, guides, slice(0, 2), grid)              # (2, 2, 2, BINS, 2)
    assert len(passes) == STEPS * 2 * (1 + len(config.g))
    prompts, attributes = bench.prompts(0)
    c, empty, first = base.embed(prompts), base.embed([""]).expand(2, -1, -1), bench.first(0)
    real = tables.noised(bench, attributes, grid, first)
    for k, g in enumerate(config.g):
        z, drawn = ppdd.noise([first, first + 1], (4, 8, 8)), torch.full((2,), g)
        for i, t in enumerate(grid[:-1]):
            for j, at in enumerate((real[i], z)):
                for r, row in enumerate(guides):
                    told = ppdd.cfg_distillation(base.unet, row.guide, at, torch.full((2,), t), c,
                                                 empty, drawn)
                    expected = torch.stack([told.error.sum(), told.correction.sum()])
                    assert torch.allclose(sums[r, j, k, t // 100].float(), expected, rtol=1e-3)
            z = ppdd.ddim_step(z, told.target, t, grid[i + 1])
        assert (z - ppdd.sample(base.unet, ppdd.noise([first, first + 1], (4, 8, 8)), c, g, STEPS,
                                empty=empty)).abs().max() < 1e-3


@pytest.mark.parametrize("figure", ["fig5", "fig6", "fig7"])
def test_figures(here, figure):
    command(figure, "--prompt", "a big red boat at sea", "a tree", "--out", "sheet.png")
    assert drawn_on("sheet.png").min() < 64


def test_quality(here):
    command("table2 --g 8", *FEW)
    command("quality")
    assert drawn_on("docs/quality.png").shape[1] > 1000


def test_a_tint_is_white_at_zero():
    assert tables.tinted(torch.zeros(1, 1)).getpixel((0, 0)) == (255, 255, 255)
    red, _, blue = tables.tinted(torch.ones(1, 1)).getpixel((0, 0))
    assert red > blue
