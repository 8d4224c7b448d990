"""Tables 2 and 3: what a command leaves, and what a second one makes of it."""

# ruff: noqa: F811 (fixtures are imported, and named again as arguments)

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import disagreement
from diffusers import PNDMScheduler
from eval_helpers import (  # noqa: F401
    FEW,
    GUIDES,
    ROOT,
    STEPS,
    WITHOUT_GUIDE,
    command,
    drawn_on,
    empty,
    make_styles,
    postcard_folder,
    refusal,
    shorten,
    statistics_of,
    table,
    workspace,
)
from PIL import Image
from small import batch, spy, unet  # noqa: F401

import eval as script
import ppdd
import support.base
from evaluation import metrics, sampling, tables
from evaluation.features import load_clip
from evaluation.sampling import Row
from meng import Student, StudentConfig
from mini import postcards
from mini.judge import load_judge
from support import fast, images
from support.base import MINI, NO_WEIGHTS, base_sha256, load_base
from support.guides import save_guide
from unet import UNet


@pytest.fixture
def two_rows(workspace, monkeypatch) -> Path:
    """As `workspace`, with less to sample: no guidance, and the tiny guide."""
    shorten(monkeypatch, WITHOUT_GUIDE[:1], ("tiny",))
    return workspace


def stored_cell(name: str) -> tuple[Path, dict]:
    file = next(Path("runs/eval").glob(f"*/*/{name}/cell.json"))
    return file, json.loads(file.read_text())


# ----------------------------------------------------------------------- Table 2

@pytest.mark.full
def test_table2(workspace, capsys):
    """Every score is recomputed from the stored images, by other code."""
    command("table2 --g 2 8", *FEW)
    result, page = json.loads(Path("runs/eval/table2.json").read_text()), capsys.readouterr().out
    rows = result["bases"]["mini"]["rows"]
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
    assert NO_WEIGHTS in page and Path("runs/eval/table2.md").read_text() in page and mean in page
    assert "written to runs/eval/table2.json and runs/eval/table2.md\nimages in runs/e" in page
    assert "CLIP-FID (the miniature's CLIP) / CLIP score / caption accuracy in %" in page
    assert " FID" not in page and "2 + 2 guide" in page and rows["full"]["guide"] in page


def scores(cell: str, seed: int) -> dict[str, float]:
    """A cell's scores, from its images: the distance by a nuclear norm, no covariances."""
    first = 10**9 + 10**6 * seed
    files = sorted(Path("runs/eval/mini").glob(f"*/{cell}-seed{seed}/*.png"))
    assert len(files) == 3
    sampled = torch.from_numpy(np.stack([np.asarray(Image.open(f)) for f in files]))
    sampled = sampled.permute(0, 3, 1, 2)
    generator, rng = torch.Generator().manual_seed(first - 1), random.Random(first - 1)
    asked = postcards.sample_attributes(3, generator)
    prompts = [postcards.caption(a, rng, left_out=False) for a in asked]
    generator = torch.Generator().manual_seed(7)
    real = postcards.draw(postcards.sample_attributes(24, generator), generator=generator)
    clip = load_clip("mini")
    x, y = (clip.images(v).double().numpy() for v in (sampled, (real * 255).round().byte()))
    a, b = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * (
        np.linalg.norm(a @ b.T, "nuc"))
    seen = load_judge().read(sampled / 255)
    cosines = (x * clip.texts(prompts).double().numpy()).sum(1)
    return {"CLIP-FID": distance, "CLIP": 100 * cosines.mean(),
            "caption accuracy": 100 * (seen == asked).all(1).double().mean().item(),
            "color": 100 * (seen == asked)[:, 1].double().mean().item()}


@pytest.mark.full
def test_a_killed_run_goes_on(workspace, monkeypatch):
    """Killed between two images of a cell, it ends as an uninterrupted one would."""
    save, left = images.save_png, [8]

    def save_few(path, image):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        save(path, image)

    monkeypatch.setattr(images, "save_png", save_few)
    with pytest.raises(SystemExit) as exit:
        command("table2 --g 8", *FEW)
    assert exit.value.code == 130 and not Path("runs/eval/table2.json").exists()
    assert all("scores" in stored_cell(f"none-2-g0-seed{k}")[1] for k in (0, 1))
    assert "scores" not in stored_cell("cfg-2-g8-seed0")[1]
    kept = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.png")}
    assert len(kept) == 8
    left[0] = -1
    command("table2 --g 8", *FEW)
    resumed = table()
    untouched = [path for path, at in kept.items() if path.stat().st_mtime_ns == at]
    assert len(untouched) == 8                        # 3 + 3, and the whole batch of the third cell
    shutil.rmtree("runs")
    command("table2 --g 8", *FEW)
    assert table() == resumed


@pytest.mark.full
def test_finished_cells_are_kept_and_others_are_not(workspace):
    command("table2 --g 8", *FEW)
    before = table()
    for path in Path("runs").rglob("*.png"):
        path.unlink()
    command("table2 --g 8", *FEW)
    assert table() == before and not list(Path("runs").rglob("*.png"))
    shutil.copytree(ROOT / "mini" / "guides", "guides/mini")
    shutil.copy("guides/mini/tiny-8.safetensors", "guides/mini/tiny.safetensors")
    command("table2 --g 8", *FEW)
    sampled = {path.parent.name for path in Path("runs").rglob("*.png")}
    assert sampled == {"tiny-g8-seed0", "tiny-g8-seed1"}        # only that guide is another one


def test_a_table_is_a_fold_over_its_cells(two_rows):
    """Its numbers are those of the cells' files, whose keys name everything that made them."""
    command("table2 --g 8", *FEW)
    before = table()
    file, cell = stored_cell("tiny-g8-seed1")
    assert {"settings", "commit", "hardware", "measured by", "scores"} == set(cell)
    assert cell["settings"]["g"] == 8 and cell["settings"]["steps"] == STEPS
    seeds = before["bases"]["mini"]["rows"]["tiny"]["cells"]["8"]["seeds"]
    assert seeds["1"] == {"key": file.parent.parent.name, "commit": cell["commit"],
                          **cell["scores"]}
    Path("runs/eval/table2.json").unlink()
    command("table2 --g 8", *FEW)
    assert table() == before


def test_other_metrics_measure_the_same_images_again(two_rows):
    command("table2 --g 8", *FEW)
    sampled = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.png")}
    command("table2 --g 8 --out other.json", *FEW, "--references", 25)
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.png")} == sampled
    one, other = (file["bases"]["mini"]["rows"]["tiny"]["cells"]["8"]["mean"]
                  for file in (table(), table("other.json")))
    assert one["CLIP-FID"] != other["CLIP-FID"] and one["CLIP"] == other["CLIP"]


@pytest.mark.full
def test_two_processes_give_what_one_gives(workspace):
    """torchrun shares out batches: the images and the numbers are those of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                          # with more, sums are ordered otherwise
    command("table2 --g 8", *FEW)
    torch.set_num_threads(threads)
    one = table()
    sampled = {p.relative_to("runs"): p.read_bytes() for p in Path("runs").rglob("*.png")}
    shutil.rmtree("runs")
    Path("short.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
        "import eval as script, support.base, support.guides, torch\n"
        "from evaluation import sampling\nfrom evaluation.sampling import Row\n"
        f"torch.set_num_threads(1)\nsupport.base.MINI = Path({str(support.base.MINI)!r})\n"
        "support.guides.BUNDLED = support.base.MINI.parent / 'guides'\n"
        f"sampling.WITHOUT_GUIDE, sampling.GUIDES = {WITHOUT_GUIDE}, {GUIDES}\n"
        f"sampling.OUR_GUIDES, sampling.STAGE_ONE = (), {STEPS}\nscript.main()\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "2", "short.py", "table2", "--g", "8", *FEW], check=True,
                   env=environment, capture_output=True)
    assert json.loads(Path("runs/eval/table2.json").read_text())["protocol"]["processes"] == 2
    again = {p.relative_to("runs"): p.read_bytes() for p in Path("runs").rglob("*.png")}
    assert again == sampled and table() == one


def test_given_prompts_have_no_accuracy(two_rows):
    Path("prompts.txt").write_text("a red boat\na green tree\na house at night\n")
    command("table2 --g 8 --prompts prompts.txt --guides tiny-16", *FEW)
    rows = table()["bases"]["mini"]["rows"]
    assert rows["tiny-16"]["title"] == "tiny guide, 16 steps"
    assert set(rows["tiny"]["cells"]["8"]["mean"]) == {"CLIP-FID", "CLIP"}
    assert "caption accuracy in %" not in Path("runs/eval/table2.md").read_text()


def test_no_run_drops_what_a_result_holds(two_rows, capsys):
    shutil.copy(ROOT / "mini" / "mini.safetensors", "other.safetensors")
    command("table2 --g 8 --guides tiny-16", *FEW)
    before = Path("runs/eval/table2.json").read_bytes()
    same = ["--guides", "tiny-16"]
    for more, message in (([*same, "--weights", "other.safetensors"], "other bases too (mini)"),
                          ([], "other rows too (tiny-16)"),
                          ([*same, "--references", "25"], "measured by another references, ref")):
        assert message in refusal(capsys, "table2", "--g", "8", *FEW, *more)
        assert Path("runs/eval/table2.json").read_bytes() == before


def test_rows_are_measured_alone_and_the_others_kept(two_rows, capsys, monkeypatch):
    """The others stay as the file has them, and say what they were made with.

    So does a row whose guide is not at hand, but not one of another guide of that name.
    """
    command("table2 --g 2 8 --guides tiny-16", *FEW)
    file = Path("runs/eval/table2.json")

    def times() -> dict:
        rows = json.loads(file.read_text())["bases"]["mini"]["rows"]
        return {name: row["milliseconds"] for name, row in rows.items()}

    before, made = table()["bases"]["mini"]["rows"], json.loads(file.read_text())["protocol"]
    timed = times()
    shutil.rmtree("runs/eval/mini")
    lost = refusal(capsys, "table2", "--g", "8", "--rows", "tiny", *FEW)
    assert "--rows tiny: the file holds other g too (2)" in lost
    command("table2 --g 8 --rows none-2", *FEW)
    rows = table()["bases"]["mini"]["rows"]
    assert list(rows) == ["none-2", "tiny", "tiny-16"]
    assert rows["none-2"] == before["none-2"]
    kept_from = {"torch": made["versions"]["torch"], "commit": made["commit"],
                 "hardware": made["hardware"]}
    for name in ("tiny", "tiny-16"):
        assert rows[name] == before[name] | {"kept from": kept_from}
    assert times() == {name: time | {"kept from": kept_from} for name, time in timed.items()}
    assert {path.name for path in Path("runs/eval/mini").glob("*/*")} == {
        "none-2-g0-seed0", "none-2-g0-seed1"}
    for what in ("scores", "times"):
        assert f"{what} kept from a run at commit {made['commit']}" in (
            file.with_suffix(".md").read_text())
    assert "--rows cfg-3: there is no such row" in refusal(
        capsys, "table2", "--rows", "cfg-3", *FEW)
    result = json.loads(file.read_text())
    file.unlink()
    command("table2 --g 8 --rows none-2", *FEW)
    assert table()["bases"]["mini"]["rows"] == {"none-2": before["none-2"]}
    assert times()["none-2"]["median"] > 0
    command("table2 --g 8 --rows tiny", *FEW)                       # one more, timed now
    assert list(times()) == ["none-2", "tiny"] and "kept from" not in times()["tiny"]
    for key in ("dtype", "hardware"):
        changed = json.loads(file.read_text())
        changed["protocol"][key] = "another"
        changed["bases"]["mini"]["rows"]["none-2"]["milliseconds"] = {"median": 0.0, "spread": 0.0}
        file.write_text(json.dumps(changed))
        command("table2 --g 8 --rows none-2", *FEW)
        assert times()["none-2"]["median"] > 0 and "kept from" not in times()["none-2"]
    changed = json.loads(file.read_text())
    changed["bases"]["mini"]["base hash"] = "another"
    file.write_text(json.dumps(changed))
    assert "--rows leaves out tiny, which" in refusal(capsys, "table2", "--rows", "none-2", *FEW)
    result["bases"]["mini"]["rows"]["tiny"]["guide"] = "tiny.safetensors, SHA-256 0"
    file.write_text(json.dumps(result))
    monkeypatch.setattr(tables.Cells, "run", lambda *_: pytest.fail("sampled before the refusal"))
    assert "--rows leaves out tiny, which" in refusal(capsys, "table2", "--rows", "none-2", *FEW)


def test_a_table_stays_until_a_new_one_is_whole(two_rows, monkeypatch):
    command("table2 --g 8", *FEW)
    before = Path("runs/eval/table2.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables.Cells, "time_rows", killed)
    with pytest.raises(SystemExit):
        command("table2 --g 8", *FEW)
    assert Path("runs/eval/table2.json").read_bytes() == before


def test_a_damaged_image_is_sampled_again(two_rows, capsys):
    command("table2 --g 8", *FEW)
    file, cell = stored_cell("tiny-g8-seed0")
    del cell["scores"]
    file.write_text(json.dumps(cell))
    damaged = file.with_name("00001.png")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    sentence = refusal(capsys, "table2", "--g", "8", *FEW)
    assert str(damaged) in sentence and "sampled again" in sentence
    assert "--skip-bad" not in sentence
    damaged.unlink()
    file.write_text("{")                              # nor does a damaged file of a cell matter
    command("table2 --g 8", *FEW)
    assert damaged.read_bytes() == whole and "scores" in json.loads(file.read_text())


@pytest.mark.full
def test_references_from_a_folder_or_statistics(two_rows, capsys):
    postcard_folder(two_rows / "real", 5, seed=1)
    command("table2 --g 8 --real real", *FEW)
    by_folder = table()["bases"]["mini"]
    assert by_folder["measured by"]["reference images"] == 5
    command("fid real --save real.npz")
    command("table2 --g 8 --real real.npz --out other.json", *FEW)
    stored = table("other.json")["bases"]["mini"]
    for a, b in zip(by_folder["rows"].values(), stored["rows"].values()):
        assert [*a["cells"].values()][0]["mean"] == pytest.approx(
            [*b["cells"].values()][0]["mean"], abs=1e-5)
    line = ["table2", "--g", "8", *FEW, "--real"]
    np.savez("other.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert "features of another network" in refusal(capsys, *line, "other.npz")
    assert "nowhere" in refusal(capsys, *line, "nowhere")
    assert "nowhere.npz" in refusal(capsys, *line, "nowhere.npz")


@pytest.mark.full
def test_a_base_without_guides(workspace, capsys, toy_base):
    """Another small base has the rows that need none, and one line says so for each guide."""
    command("table2 --g 8 --weights", toy_base, *FEW)
    rows = table()["bases"]["toy"]["rows"]
    assert list(rows) == ["none-2", "cfg-2", "cfg-plms-2"]
    assert capsys.readouterr().out.count("a row is left out: ") == len(GUIDES)
    for figure in ("fig5", "fig6", "fig7"):
        sentence = refusal(capsys, figure, "--weights", toy_base)
        assert "there is no guide for toy" in sentence
    assert "no stage-one guide for toy" in refusal(capsys, "match", "--weights", toy_base)


def test_a_missing_guide_leaves_its_row_out(two_rows, capsys, monkeypatch):
    monkeypatch.setattr(sampling, "GUIDES", ("tiny", "tiny-3"))
    command("table2 --g 8", *FEW)
    assert "there is no guides/mini/tiny-3.safetensors" in capsys.readouterr().out
    assert "tiny" in (rows := table()["bases"]["mini"]["rows"]) and "tiny-3" not in rows


def test_sentences(two_rows, capsys, monkeypatch):
    Path("p.txt").write_text("a boat\n")
    assert "train.py --styles-only" in refusal(capsys, "table3")
    assert "train.py --styles-only" in refusal(capsys, "fig8")
    assert "multiple of" in refusal(capsys, "table2", "--size", "60")
    assert "--seeds" in refusal(capsys, "table2", "--seeds", "-1")
    assert "from 0 to" in refusal(capsys, "table2", "--references", "1000000000000")
    Path("runs/eval").mkdir(parents=True)
    Path("runs/eval/table2.json").write_text("{}")
    assert "move it away" in refusal(capsys, "table2", *FEW)
    Path("runs/eval/table2.json").unlink()
    command("table2 --g 8", *FEW)
    before = Path("runs/eval/table2.json").read_bytes()
    assert "another setting (g)" in refusal(capsys, "table2", "--g", "2", *FEW)
    assert Path("runs/eval/table2.json").read_bytes() == before
    assert "does not exist" in refusal(capsys, "fig5", "--guides", "nowhere.safetensors")
    monkeypatch.setattr(support.base.Base, "is_miniature", False)
    assert "--prompts is needed" in refusal(capsys, "table2")
    assert "--real is needed" in refusal(capsys, "table2", "--prompts", "p.txt", "--size", "64")


# ----------------------------------------------------------------------- rows

def test_plms_on_sds_own_spacing_is_diffusers(unet, batch):
    """The schedule of SD 1.5's scheduler_config.json, around the same UNet."""
    z, _, c, empty, _ = batch
    theirs = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                           skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    for steps in (5, 50):
        theirs.set_timesteps(steps)
        expected = z
        with torch.no_grad():
            for t in theirs.timesteps:
                times = t.expand(len(z))
                eps = ppdd.cfg(unet(expected, times, c), unet(expected, times, empty), 5.0)
                expected = theirs.step(eps, t, expected).prev_sample
        grid = sampling.leading_grid(steps)
        assert grid[0] == 1 + 1000 // steps * (steps - 1) and grid[-2:] == [1, 0]
        ours = fast.sample(unet, z, c, 5.0, steps, empty=empty, sampler="plms", grid=grid)
        assert disagreement(ours, expected) < 1e-3
        trailing = fast.sample(unet, z, c, 5.0, steps, empty=empty, sampler="plms")
        assert disagreement(trailing, expected) > 1e-2


def test_rivals_guide_in_some_steps_and_take_a_guide_s_passes(unet, batch, monkeypatch):
    """Each has the passes that its name says, and the steps are those that it is described by."""
    z, _, c, empty, _ = batch
    calls = spy(monkeypatch, UNet, "encode")
    rivals = [row for row in sampling.WITHOUT_GUIDE if row.guided]
    assert [row.passes[0] for row in rivals] == [50, 16, 8] * 2
    for row in rivals:
        assert row.name.endswith(f"-{row.passes[0]}") and row.passes[1] == 0
        first, last = row.guided
        ratio = [ppdd.SIGMA[t + 1] / ppdd.ALPHA[t + 1] for t in ppdd.step_grid(row.steps)[:-1]]
        if "interval" in row.name:
            low, high = sampling.INTERVAL
            assert [k for k, r in enumerate(ratio) if low < r <= high] == [*range(first, last)]
        else:
            assert first == 0 and abs(last - row.steps / 2) <= 0.5
        calls.clear()
        fast.sample(unet, z, c, 5.0, row.steps, empty=empty, guided=range(first, last))
        images = [3 * (1 + (first <= k < last)) for k in range(row.steps)]
        assert [len(given) for given, *_ in calls["encode"]] == images


def test_unguided_steps_are_the_plain_prediction(unet, batch):
    z, _, c, empty, _ = batch
    grid = ppdd.step_grid(3)
    expected = z
    with torch.no_grad():
        for k, (t, s) in enumerate(zip(grid, grid[1:])):
            times = torch.full((3,), t)
            eps = unet(expected, times, c)
            if k == 1:
                eps = ppdd.cfg(eps, unet(expected, times, empty), 5.0)
            expected = ppdd.ddim_step(expected, eps, t, s)
    found = fast.sample(unet, z, c, 5.0, 3, empty=empty, guided=range(1, 2))
    assert disagreement(found, expected) < 1e-4


def test_a_row_s_settings_are_in_its_key_and_old_keys_stay(workspace):
    config = sampling.resolve_defaults(script.Config("table2", count=3, device="cpu"))
    cells = tables.Cells(config, load_base(MINI))
    plain = sampling.Row("a", "a", "cfg", 4)
    ways = [plain, plain._replace(guided=(0, 2)), plain._replace(guided=(1, 2)),
            plain._replace(leading=True)]
    settings = [cells.settings(tables.Cell(row, 8.0, 0)) for row in ways]
    assert len({json.dumps(s) for s in settings}) == len(ways)
    assert list(settings[0]) == ["base", "kind", "steps", "sampler", "guide", "g",
                                 "first noise seed", "prompts", "size", "batch", "device", "dtype",
                                 "torch"]


# ----------------------------------------------------------------------- scores, noise

@pytest.mark.full
def test_accuracy_is_the_judge_s(workspace, monkeypatch):
    """Real postcards of what the prompts say are right, and those of other prompts are not.

    Those to compare with are drawn once, for the distance and for the judge.
    """
    drawn, draw = [], postcards.draw
    monkeypatch.setattr(postcards, "draw", lambda a, *more: drawn.append(len(a)) or draw(a, *more))
    config = sampling.resolve_defaults(script.Config("table2", count=200, references=200,
                                                     device="cpu"))
    cells = tables.Cells(config, load_base(MINI))
    for name, shift, low, high in (("right", 0, 99, 100), ("wrong", 1, 0, 5)):
        cell = tables.Cell(sampling.Row(name, name, "none", STEPS), 0.0, 0)
        prompts, attributes = cells.prompts.of(0)
        for k, image in enumerate(postcards.draw(attributes.roll(shift, 0))):
            image = images.to_image((image * 255).round().byte())
            images.save_png(cells.folder(cell) / f"{k:05d}.png", image)
        result = cells.metrics.score(cells.folder(cell), prompts, attributes)
        assert low <= result["caption accuracy"] <= high
    assert cells.metrics.describe()[metrics.JUDGE_ACCURACY] > 99
    assert sum(drawn) == 2 * 200 + 200


def test_seeds_never_share_noise(workspace, monkeypatch):
    seen, noise = [], ppdd.noise
    monkeypatch.setattr(ppdd, "noise", lambda seeds, shape: noise(seen.extend(seeds) or
                                                                  seen[-len(seeds):], shape))
    config = sampling.resolve_defaults(script.Config("table2", count=3, batch=2, device="cpu"))
    cells = tables.Cells(config, load_base(MINI))
    for seed in range(2):
        cells.sample(tables.Cell(WITHOUT_GUIDE[0], 0.0, seed), lambda n: None)
    assert len(seen) == len(set(seen)) == 6
    assert cells.prompts.of(0)[0] != cells.prompts.of(1)[0]


# ----------------------------------------------------------------------- Table 3

@pytest.mark.full
def test_table3(workspace):
    make_styles(workspace)
    command("table3", *FEW)
    bases = table("runs/eval/table3.json")["bases"]
    assert list(bases) == ["watercolor", "cartoon", "realistic"]
    for style, base in bases.items():
        assert list(base["rows"]) == ["none-2", "cfg-2", *GUIDES]
        assert base["measured by"]["references"].endswith(f"style {style}")
        assert all(list(row["cells"]) in (["8"], ["0"]) for row in base["rows"].values())
    assert "| cartoon | tiny guide, 2 steps |" in Path("runs/eval/table3.md").read_text()
    command("table3 --quick", *FEW[:2])
    quick = table("runs/eval/table3-quick.json")["bases"]
    assert list(quick) == list(bases) and "references" in quick["cartoon"]["measured by"]


def fresh_student(name: str, steps: int) -> Path:
    """A student of the miniature that learned nothing: it makes what the base makes unguided."""
    base, path = load_base(MINI), Path("guides/mini") / f"{name}.safetensors"
    student = Student(base.unet.config)
    student.start_from(base.unet)
    save_guide(path, student, StudentConfig(), {"base": "mini", "steps": steps})
    return path


def test_few_steps_have_the_student_beside_guides(workspace, monkeypatch):
    fresh_student("whole-1", 1)
    monkeypatch.setattr(sampling, "CFG_IN_FEW", (Row("cfg-1", "CFG, DDIM, 1 step", "cfg", 1),))
    monkeypatch.setattr(sampling, "FEW_STEPS", ("whole-1", "tiny-2", "tiny-1"))
    command("few", *FEW)
    rows = table("runs/eval/few.json")["bases"]["mini"]["rows"]
    assert list(rows) == ["none-2", "cfg-2", "cfg-1", "whole-1", "tiny-2"]
    assert rows["whole-1"]["title"] == "student, 1 step"
    assert (rows["whole-1"]["UNet passes"], rows["whole-1"]["guide passes"]) == (1, 0)
    config = sampling.resolve_defaults(script.Config("few", count=3, batch=2, device="cpu"))
    cells = tables.Cells(config, load_base(MINI))
    student = sampling.guide_row(config, cells.base, "whole-1")
    free = Row("none-1", "", "none", 1)
    images = [sampling.generate(cells.base, row, ["a red boat"] * 2, 8.0, (1, 2), 64)
              for row in (student, free)]
    assert (images[0].int() - images[1].int()).abs().max() <= 1
    command("figfew")
    drawn_on("runs/eval/figfew.png")


def test_a_student_is_moved_to_each_fine_tune(workspace):
    """One that learned nothing becomes the fine-tune itself; as it is, it stays the plain base."""
    path = fresh_student("whole", 0)
    config = sampling.resolve_defaults(
        script.Config("table3", device="cpu", guides=(str(path),), bases=("x",)))
    fine_tune = load_base(MINI)
    with torch.no_grad():
        for parameter in fine_tune.unet.parameters():
            parameter.mul_(1.01)
    rows = {row.name: row for row in sampling.plugged_in_rows(config, fine_tune)}
    assert rows["whole"].title == "student, 2 steps"
    assert rows["whole-moved"].title == "student moved by its difference, 2 steps"
    assert rows["whole"].unusual == {} and rows["whole-moved"].unusual == {
        "moved from": base_sha256(MINI)}
    z, t, g = torch.randn(2, 4, 8, 8), torch.tensor([9, 700]), torch.tensor([2.0, 8.0])
    c = fine_tune.embed(["a boat", "a car"])
    plain = load_base(MINI).unet
    for name, like in (("whole", plain), ("whole-moved", fine_tune.unet)):
        student = rows[name].on(fine_tune).guide
        assert (student(z, t, c, g) - like(z, t, c)).abs().max() < 2e-2      # fp16 in the file
    assert (plain(z, t, c) - fine_tune.unet(z, t, c)).abs().max() > 0.05


@pytest.mark.full
def test_table3_of_given_bases(two_rows, capsys, toy_base):
    """Each base may have real images of its own; what can't work is said before any work."""
    for k, name in enumerate(("a", "b")):
        shutil.copy(ROOT / "mini" / "mini.safetensors", f"{name}.safetensors")
        postcard_folder(two_rows / name, 5 + k, style=postcards.STYLES[k + 1])
    both = ["--bases", "a.safetensors", "b.safetensors"]
    command("table3", *FEW, *both, "--real", "a", "b")
    bases = table("runs/eval/table3.json")["bases"]
    assert [base["measured by"]["reference images"] for base in bases.values()] == [5, 6]
    for flags, message in (
            ([*both, "--real", "a", "b", "a"], "or 2, one each"), (both[:2], "bases too (b)"),
            ([*both, "nowhere.safetensors"], "nowhere.safetensors does not exist"),
            ([*both, "./a.safetensors"], "a name of its own"),
            (["--bases", toy_base, "--weights", toy_base], "no guide for toy")):
        assert message in refusal(capsys, "table3", *FEW, *flags)
    assert "--real: table2 has one base" in refusal(capsys, "table2", "--real", "a", "b", *FEW)


@pytest.mark.full
def test_quick_has_files_of_its_own(workspace):
    Path("runs/eval").mkdir(parents=True)
    Path("runs/eval/table2.json").write_text("the real one")
    command("table2 --quick", *FEW[:2])
    assert Path("runs/eval/table2.json").read_text() == "the real one"
    rows = json.loads(Path("runs/eval/table2-quick.json").read_text())["bases"]["mini"]["rows"]
    assert list(rows["full"]["cells"]) == ["2", "8"]
    assert list(rows["full"]["cells"]["8"]["seeds"]) == ["0", "1"]


def test_the_real_images_of_table_3_are_of_the_bases_own_style(workspace):
    config = sampling.resolve_defaults(script.Config("table3", references=3, device="cpu"))
    mini = load_base(MINI)
    for name, style in (("cartoon", "cartoon"), ("mine", "postcard")):
        file = Path(f"{name}.safetensors")
        file.touch()
        base = replace(mini, path=file)
        measured = metrics.Metrics(config, base, sampling.Prompts(config, base), postcards.SIZE)
        generator = torch.Generator().manual_seed(metrics.REFERENCE_SEED)
        attributes = postcards.sample_attributes(3, generator)
        drawn = (postcards.draw(attributes, style, generator) * 255).round().byte()
        (images, asked), = measured.postcards
        assert torch.equal(images, drawn) and torch.equal(asked, attributes)
        _, features = measured.extractor
        assert measured.references.mean == pytest.approx(features(drawn).double().mean(0).numpy())


def test_a_score_is_given_as_mean_and_standard_deviation_over_the_seeds():
    summary = tables.summary({"0": {"CLIP": 1.0}, "1": {"CLIP": 2.0}, "2": {"CLIP": 6.0}})
    assert summary["mean"] == {"CLIP": 3} and summary["spread"] == {"CLIP": round(7**0.5, 6)}
    assert tables.summary({"0": {"CLIP": 1.0}})["spread"] == {"CLIP": None}


def test_a_score_is_of_each_image_beside_its_own_prompt(workspace, monkeypatch):
    """Caption accuracy is the share of images in which all six attributes are as asked."""
    config = sampling.resolve_defaults(script.Config("table2", count=3, batch=2, device="cpu"))
    cells = tables.Cells(config, load_base(MINI))
    prompts, asked = cells.prompts.of(0)
    seen = asked.clone()
    seen[0, 2:4] += 1
    seen[1, 3] += 1

    def number(images):                                # image k is of the grey 80 k
        return (images[:, 0, 0, 0] / 80).long()

    def features(images):
        return torch.eye(3)[number(images)]

    def texts(given):
        return torch.eye(3)[[prompts.index(text) for text in given]]

    fakes = {"judge": SimpleNamespace(read=lambda images: seen[number(images * 255 + 1)]),
             "clip": SimpleNamespace(images=features, texts=texts), "extractor": ("X", features),
             "references": statistics_of(torch.eye(3))}
    for name, fake in fakes.items():
        monkeypatch.setitem(cells.metrics.__dict__, name, fake)
    for k in range(3):
        images.save_png(Path(f"cell/{k:05d}.png"), Image.new("RGB", (64, 64), (80 * k,) * 3))
    shares = {"caption accuracy": 100 / 3, "subject": 100, "color": 100, "place": 200 / 3,
              "time": 100 / 3, "position": 100, "size": 100}
    assert cells.metrics.score(Path("cell"), prompts, asked) == pytest.approx(
        {"X": 0, "CLIP": 100} | shares, abs=1e-5)


def test_milliseconds_are_an_image_s_and_the_first_round_only_warms_up(workspace, monkeypatch):
    config = sampling.resolve_defaults(script.Config("table2", count=2, device="cpu"))
    cells, clock, seconds = tables.Cells(config, load_base(MINI)), [0], iter([99, 2, 4, 12])
    monkeypatch.setattr(sampling, "generate", lambda *_: clock.append(clock[-1] + next(seconds)))
    monkeypatch.setattr(tables, "time", SimpleNamespace(perf_counter=lambda: clock[-1]))
    timed = cells.time_rows(list(WITHOUT_GUIDE[:1]))["none-2"]
    assert timed["rounds"] == [1000, 2000, 6000]
    assert timed["median"] == 2000 and timed["spread"] == round(7e6**0.5, 2)


def test_a_row_counts_its_passes():
    rows = [sampling.Row("", "", *row) for row in (
        ("none", 50), ("cfg", 50), ("cfg", 50, "plms"), ("full", 8), ("tiny", 8),
        ("tiny", 1, "plms"))]
    assert [row.passes for row in rows] == [(50, 0), (100, 0), (102, 0), (8, 8), (8, 0), (1, 0)]


def test_a_row_is_measured_at_every_g_that_it_is_made_for():
    rows = [*WITHOUT_GUIDE[:2], WITHOUT_GUIDE[1]._replace(only_g=8.0)]
    assert [row.g_values((2.0, 8.0)) for row in rows] == [[0.0], [2.0, 8.0], [8.0]]


def test_a_row_is_sampled_as_it_says(workspace):
    base = load_base(MINI)
    prompts, z = ["a red boat"], ppdd.noise([5], (4, 8, 8))
    c, nothing = base.embed(prompts), base.embed([""])
    row = next(row for row in WITHOUT_GUIDE if row.name == "cfg-plms-2")
    made = sampling.generate(base, row, prompts, 8.0, [5], 64)
    expected = base.decode(ppdd.sample(base.unet, z, c, 8.0, 2, empty=nothing, sampler="plms"))
    assert (made.int() - expected.int()).abs().max() <= 1


def test_fresh_captions_name_all_six_attributes():
    texts, attributes = sampling.full_captions(20, seed=3)
    rng, again = random.Random(3), torch.Generator().manual_seed(3)
    assert torch.equal(attributes, postcards.sample_attributes(20, again))
    assert texts == [postcards.caption(a, rng, left_out=False) for a in attributes]
