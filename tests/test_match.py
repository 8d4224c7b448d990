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


def test_no_guidance_is_nothing_to_match(workspace, capsys):
    assert "nothing to match" in refusal(capsys, "match", "--g", "0")
    assert "nothing to match" in refusal(capsys, "match", "--g", "8", "1e-9")
