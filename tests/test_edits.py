"""`eval.py edits` and `inversion`: Meng et al.'s applications on postcards."""

# ruff: noqa: F811 (fixtures are imported, and named again as arguments)

import json
from pathlib import Path

import pytest
import torch
from eval_helpers import (  # noqa: F401
    STEPS,
    command,
    drawn_on,
    empty,
    make_styles,
    refusal,
    workspace,
)
from PIL import Image

import eval as script
import meng
import ppdd
from evaluation import edits, sampling
from mini import postcards
from support.base import MINI, load_base


@pytest.mark.full
def test_edits_change_what_they_are_to_and_keep_the_rest(workspace):
    config = sampling.resolve_defaults(script.Config(command="edits", device="cpu"))
    base = load_base(MINI)
    row = sampling.guide_row(config, base, "tiny-8")
    real = postcards.draw(edits.ATTRIBUTES[:1], generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 8:56, 8:56] = 1
    over, inside = edits.EDITS[0]
    little, much, painted = (
        edits.edit(config, base, row, real * 2 - 1, prompt, strength, used).convert("L")
        for prompt, strength, used in ((over, 0.2, None), (over, 0.9, None), (inside, 1.0, mask)))

    def change(image: Image.Image, box=(0, 0, 64, 64)) -> float:
        own = real[0].mul(255).round().byte().permute(1, 2, 0).numpy()
        pair = [torch.frombuffer(bytearray(x.convert("L").crop(box).tobytes()), dtype=torch.uint8)
                for x in (image, Image.fromarray(own))]
        return (pair[0].float() - pair[1].float()).abs().mean().item()

    assert change(little) < 10 < change(much)                   # sunset becomes night
    assert change(painted, (0, 0, 64, 6)) < 6 < change(painted, (20, 12, 44, 44))


@pytest.mark.full
def test_a_postcard_keeps_its_content_where_the_other_base_is_the_same(workspace, capsys):
    assert "train.py --styles-only" in refusal(capsys, "restyle")
    make_styles(workspace)
    command("restyle")
    drawn_on("runs/eval/restyle.png")
    config = sampling.resolve_defaults(script.Config(command="restyle", device="cpu"))
    base, other = load_base(MINI), load_base(workspace / "mini/styles/cartoon.safetensors")
    real = postcards.draw(edits.ATTRIBUTES, generator=torch.Generator().manual_seed(0))
    x, c = base.encode(real * 2 - 1, 0), base.embed(["a red boat", "a white house"])
    row = sampling.guide_row(config, base, "tiny-8")
    z = sampling.run(other, row, edits.to_noise(base, row, x, c, 2.0), c, 2.0)
    assert (base.decode(z).float() - base.decode(x).float()).abs().mean() < 20


def test_inversion_is_measured_from_the_vae_s_own_reconstruction(workspace):
    command("inversion --count 2 --g 0.5 8")
    result = json.loads(Path("runs/eval/inversion.json").read_text())
    rows = result["rows"]
    assert list(rows) == ["cfg-2", "cfg-2-end", "full", "tiny", "tiny-8-g8"]
    assert list(rows["tiny-8-g8"]["by g"]) == ["8"] and result["protocol"]["images"] == 2
    title, errors = rows["cfg-2"]["title"], [*rows["cfg-2"]["by g"].values()]
    page = Path("runs/eval/inversion.md").read_text()
    assert f"| {title} | {errors[0]} | {errors[1]} |" in page and errors[0] < errors[1]
    base = load_base(MINI)
    texts, attributes = (prompts := sampling.Prompts(
        script.Config(command="inversion", count=2), base)).of(0)
    generator = torch.Generator().manual_seed(prompts.first_noise(0))
    x = base.encode(postcards.draw(attributes, generator=generator) * 2 - 1, 0)
    c, empty_c = base.embed(texts), base.embed([""]).expand(2, -1, -1)

    def predict(z, t):
        t = torch.full((2,), t)
        return ppdd.cfg(base.unet(z, t, c), base.unet(z, t, empty_c), 8.0)

    grid = ppdd.step_grid(STEPS)
    z = ppdd.ddim(predict, meng.invert(predict, x, grid[::-1]), grid)
    error = (base.decode(z).float() - base.decode(x).float()).abs().mean().item()
    assert errors[1] == pytest.approx(error, rel=0.02)
    z = ppdd.ddim(predict, meng.invert(predict, x, grid[::-1], at_end=True), grid)
    error = (base.decode(z).float() - base.decode(x).float()).abs().mean().item()
    assert rows["cfg-2-end"]["by g"]["8"] == pytest.approx(error, rel=0.02)
    assert abs(error / errors[1] - 1) > 0.05            # the two are told apart


def test_other_bases_are_refused(workspace, capsys, monkeypatch):
    monkeypatch.setattr(type(load_base(MINI)), "is_miniature", False)
    make_styles(workspace)
    for name in ("edits", "inversion", "restyle"):
        assert "it is for the miniature" in refusal(capsys, name)
