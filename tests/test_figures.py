"""The paper's figures: a sheet for each command, and what its colours mean."""

# ruff: noqa: F811 (fixtures are imported, and named again as arguments)

import shutil
import sys

import pytest
import torch
from eval_helpers import (  # noqa: F401
    ROOT,
    STEPS,
    command,
    drawn_on,
    empty,
    make_styles,
    refusal,
    workspace,
)

import eval as script
from evaluation import figures, sampling
from support import fast
from support.base import MINI, load_base


@pytest.mark.parametrize("figure", ["fig5", "fig6", pytest.param("fig7", marks=pytest.mark.full)])
def test_figures(workspace, figure):
    command(figure, "--prompt", "a big red boat at sea", "a tree", "--out", "sheet.png")
    assert drawn_on("sheet.png").min() < 64


def test_fig8(workspace):
    make_styles(workspace)
    command("fig8 --prompt boat tree")
    # Three styles, each with CFG and three guides.
    assert drawn_on("runs/eval/fig8.png").shape[0] > 12 * 192


def test_maps_are_what_the_full_guide_returned(workspace, monkeypatch):
    """At every step and injection point, mean over channels; afterwards the guide is as before.

    No step is recorded as a CUDA graph: a replay would not pass by.
    """
    base, config = load_base(MINI), script.Config(device="cpu")
    row = sampling.guide_row(config, base, "full")
    control = row.guide.control
    plain = sampling.generate(base, row, ["a boat"], 8.0, [0], 64)
    monkeypatch.setattr(fast, "captured", lambda *_: pytest.fail("recorded"))
    maps, images = figures.residual_maps(base, row, ["a boat"], 8.0, 0, 64, lambda r: r.mean(1))
    assert len(maps) == STEPS and {len(step) for step in maps} == {len(figures.point_names(base))}
    assert maps[0][0].shape == (1, 8, 8) and not torch.equal(maps[0][0], maps[1][0])
    assert torch.equal(images, plain)
    assert row.guide.control == control


def test_quality(workspace, monkeypatch, capsys):
    assert "make it with `python eval.py table2`" in refusal(capsys, "quality")
    (workspace / "results").mkdir()
    shutil.copy(ROOT / "results" / "table2.json", "results")
    command("quality")
    assert drawn_on("runs/eval/quality.png").shape[1] > 1000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refusal(capsys, "quality")


def test_a_tint_is_white_at_zero():
    assert figures.color_map(torch.zeros(1, 1)).getpixel((0, 0)) == (255, 255, 255)
    red, _, blue = figures.color_map(torch.ones(1, 1)).getpixel((0, 0))
    assert red > blue
