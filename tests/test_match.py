"""`eval.py match`: the share that a guide leaves unexplained, as training reports it."""

# ruff: noqa: F811 (fixtures are imported, and named again as arguments)

import json
from pathlib import Path

import pytest
import torch
from eval_helpers import STEPS, command, empty, refusal, workspace  # noqa: F401

import eval as script
import ppdd
from evaluation import match, sampling
from mini import postcards
from support.base import MINI, load_base
from support.guides import save_guide


@pytest.mark.full
def test_match(workspace):
    """A zeroed guide leaves all of the correction, whatever the latents."""
    path = Path("guides/mini/zero.safetensors")
    guide = ppdd.build_guide(load_base(MINI).unet.config, ppdd.GuideConfig())
    save_guide(path, guide, ppdd.GuideConfig(), {"base": "mini", "steps": 0})
    command("match --count 3 --batch 2 --g 2 8 --guides zero --quick")
    guides = json.loads(Path("runs/eval/match-quick.json").read_text())["guides"]
    assert list(guides) == ["full", "tiny", "zero"]
    for source in match.SOURCES:
        assert guides["zero"][source]["all"] == pytest.approx(100)
        assert guides["zero"][source]["by t"].keys() == guides["full"][source]["by t"].keys()
        assert set(guides["zero"][source]["by g"].values()) == {100.0}
    assert guides["full"][match.SOURCES[0]]["all"] < 95
    page = Path("runs/eval/match-quick.md").read_text()
    assert "| zero | CFG's own trajectories | 100.0 |" in page


def test_rows_are_matched_alone(workspace, capsys):
    command("match --count 2 --g 8 --rows tiny cfg-plms-2 --quick")
    result = json.loads(Path("runs/eval/match-quick.json").read_text())
    assert [*result["guides"]] == ["tiny"]
    assert [*result["distance"]] == ["cfg-plms-2", "tiny"]
    for rows, message in ((["cfg-plms-2"], "name a guide of stage one"),
                          (["other"], "there is no such row"),
                          (["tiny"], "give their file with --out")):
        more = ["--out", "rows.json"] if rows != ["tiny"] else []
        assert message in refusal(capsys, "match", "--rows", *rows, *more)


def test_match_is_what_training_calls_unexplained(workspace, monkeypatch):
    """For every guide and g, on the states of a plain CFG sampling and on noised images; the base
    runs twice for all of them together."""
    base = load_base(MINI)
    config = script.Config(command="match", count=2, device="cpu", g=(2.0, 8.0))
    prompts, grid = sampling.Prompts(config, base), ppdd.step_grid(STEPS)
    rows = [sampling.guide_row(config, base, name) for name in ("full", "tiny")]
    passes, encode = [], base.unet.encode
    monkeypatch.setattr(base.unet, "encode", lambda *given: passes.append(1) or encode(*given))
    sums = match.squared_errors(config, base, prompts, rows, slice(0, 2), grid)
    assert sums.shape == (2, 2, 2, match.BINS, 2)
    assert len(passes) == STEPS * 2 * (1 + len(config.g))
    texts, attributes = prompts.of(0)
    c, empty, first = base.embed(texts), base.embed([""]).expand(2, -1, -1), prompts.first_noise(0)
    real = match.noised_postcards(base, prompts.style, attributes, grid, first)
    for k, g in enumerate(config.g):
        z, guidance = ppdd.noise([first, first + 1], (4, 8, 8)), torch.full((2,), g)
        for i, t in enumerate(grid[:-1]):
            for j, at in enumerate((real[i], z)):
                for r, row in enumerate(rows):
                    distilled = ppdd.cfg_distillation(base.unet, row.guide, at,
                                                      torch.full((2,), t), c, empty, guidance)
                    expected = torch.stack([distilled.error.sum(), distilled.correction.sum()])
                    assert torch.allclose(sums[r, j, k, t // 100].float(), expected, rtol=1e-3)
            z = ppdd.ddim_step(z, distilled.target, t, grid[i + 1])
        assert (z - ppdd.sample(base.unet, ppdd.noise([first, first + 1], (4, 8, 8)), c, g, STEPS,
                                empty=empty)).abs().max() < 1e-3


def test_the_distance_is_of_the_final_latents_to_those_of_cfg(workspace):
    base = load_base(MINI)
    config = script.Config(command="match", count=2, device="cpu", g=(2.0, 8.0))
    prompts = sampling.Prompts(config, base)
    rows = [sampling.guide_row(config, base, name) for name in ("tiny", "tiny-8-g8")]
    rows = [row._replace(steps=STEPS) for row in rows]
    cfg = sampling.WITHOUT_GUIDE[1]._replace(steps=STEPS)
    sums = match.latents_apart(config, base, prompts, [*rows, cfg], slice(0, 2), STEPS)
    c, empty = base.embed(prompts.of(0)[0]), base.embed([""]).expand(2, -1, -1)
    first = prompts.first_noise(0)
    z = ppdd.noise([first, first + 1], (4, 8, 8))
    expected, unguided, guided = (ppdd.sample(base.unet, z, c, 8.0, STEPS, **way) for way in
                                  ({"empty": empty}, {}, {"guide": rows[0].guide}))
    distances = [(other - expected).square().sum().item() for other in (guided, unguided)]
    assert sums[0, 1].tolist() == pytest.approx(distances, rel=1e-3)
    assert sums[1, 0].tolist() == [0, 0] and sums[1, 1, 0] > 0 and sums[2, :, 0].max() < 1e-6
    shares = match._distances(rows[0], config.g, sums[0])["by g"]
    assert shares["8"] == pytest.approx(100 * (distances[0] / distances[1]) ** 0.5, abs=0.1)
    assert list(match._distances(rows[1], config.g, sums[1])["by g"]) == ["8"]


def test_no_guidance_is_nothing_to_match(workspace, capsys):
    assert "nothing to match" in refusal(capsys, "match", "--g", "0")
    assert "nothing to match" in refusal(capsys, "match", "--g", "8", "1e-9")


# ----------------------------------------------------------------------- Section 5.4


@pytest.mark.full
def test_features(workspace, monkeypatch):
    monkeypatch.setattr(sampling, "STAGE_ONE", match.PARTS)         # a step for each part
    command("features --count 3 --batch 2 --g 2 8")
    guides = json.loads(Path("runs/eval/features.json").read_text())["guides"]
    assert list(guides) == ["full", "tiny"]
    for guide in guides.values():
        for g in ("2", "8"):
            assert len(guide["norm"][g]) == match.PARTS
    assert "on edges" not in guides["tiny"] and list(guides["full"]["on edges"]) == ["2", "8"]
    page = Path("runs/eval/features.md").read_text()
    assert page.count("| tiny | 8 |") == 1 and page.count("| full | 8 |") == 2


def test_what_a_guide_adds_is_measured_at_each_step(workspace, monkeypatch):
    """Norm and share of maps that are known: all on the edges, then everywhere alike."""
    image = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    image[..., 8:] = 255                                      # an edge between two columns of cells
    edges = match.edge_mask(image, (8, 8))
    assert edges.sum((1, 2)).tolist() == [13, 13] and edges[..., 2:].sum() == 0
    steps = [[2 * edges, torch.zeros(2, 4, 4)], [torch.full((2, 8, 8), 9.0), torch.zeros(2, 4, 4)]]
    monkeypatch.setattr(match, "residual_maps", lambda *_: (steps, image))
    base = load_base(MINI)
    config = script.Config("features", count=2, device="cpu")
    prompts, row = sampling.Prompts(config, base), sampling.guide_row(config, base, "tiny")
    norm, share = match.full_features(config, base, row, prompts, 8.0).values()
    assert norm.tolist() == pytest.approx([(2 * 13 / 64) ** 0.5, 3])
    assert share.tolist() == pytest.approx([64 / 13, 1])
    (norm,) = match.tiny_features(config, base, row, prompts, 8.0).values()
    c, t = base.embed(prompts.of(0)[0]), torch.tensor([ppdd.step_grid(row.steps)[1]])
    added = torch.cat(row.guide(torch.full((2,), 8.0), base.unet.embed_time(t), c), dim=1)
    assert norm[1].item() == pytest.approx(added.flatten(1).norm(dim=1).mean().item(), rel=1e-4)


def test_a_share_is_a_ratio_of_sums_and_no_mean_of_ratios():
    sums = torch.ones(2, match.BINS, 2, dtype=torch.float64)
    sums[0, 0] = torch.tensor([3.0, 90.0])
    sums[1, 9] = torch.tensor([0.0, 9.0])
    shares = match._shares((2.0, 8.0), sums)
    assert shares["all"] == round(100 * 21 / 117, 2)
    assert shares["by g"] == {"2": round(100 * 12 / 99, 2), "8": round(100 * 9 / 18, 2)}
    assert [*shares["by t"].items()][::9] == [("0–99", round(100 * 4 / 91, 2)),
                                              ("900–999", round(100 * 1 / 10, 2))]


def test_a_postcard_is_encoded_with_one_noise_and_noised_with_another_for_each_t():
    base, grid = load_base(MINI), ppdd.step_grid(2)
    attributes = postcards.sample_attributes(3, torch.Generator().manual_seed(0))
    noised = match.noised_postcards(base, "cartoon", attributes, grid, seed=5)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        moments = base.vae.encode(2 * postcards.draw(attributes, "cartoon", generator) - 1)
    noise = torch.randn(3, 3, 4, 8, 8, generator=generator)
    x = base.vae.sample(moments, noise[2])
    for z, eps, t in zip(noised, noise, grid[:-1], strict=False):
        torch.testing.assert_close(z, ppdd.add_noise(x, eps, torch.full((3,), t)))
    assert len(noised) == 2


def test_errors_are_summed_over_all_t_of_a_bin(monkeypatch):
    base, grid = load_base(MINI), ppdd.step_grid(20)
    config = script.Config(command="match", count=1, device="cpu", g=(2.0, 8.0))
    monkeypatch.setattr(match, "noised_postcards", lambda *_: [torch.zeros(1, 4, 8, 8)] * 20)
    monkeypatch.setattr(match, "compare_with_teacher", lambda base, rows, gs, z, *_: (
        torch.ones(1, len(gs), 2), torch.zeros_like(z)))
    sums = match.squared_errors(config, base, sampling.Prompts(config, base), [None], slice(0, 1),
                                grid)
    assert torch.equal(sums, torch.full((1, 2, 2, match.BINS, 2), 2.0).double())
