"""Table 1: parameters and arithmetic, against the paper and against sums by hand."""

# ruff: noqa: F811 (fixtures are imported, and named again as arguments)

import json
from functools import partial

import pytest
import torch
from eval_helpers import command, empty, result_of  # noqa: F401

from evaluation import cost
from evaluation.cost import count_macs
from support import fast
from support.base import MINI, load_base


@pytest.fixture(scope="module")
def table1(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("table1") / "table1.json"
    command("table1 --out", path)
    return json.loads(path.read_text())


@pytest.mark.full
def test_table1_is_the_paper_s_or_says_why_not(table1):
    for row in table1["rows"]:
        if max(map(abs, row.get("difference, %", {"": 100}).values())) > 0.1:
            note = table1["notes"][row["network"]]
            assert "paper" in note or "vectors" in note
        else:
            assert row["network"] in ("base UNet", "teacher", "full guide")
    rows = {row["network"]: row for row in table1["rows"]}
    assert len(rows) == 7 and rows["teacher"]["GMACs"] == 2 * rows["base UNet"]["GMACs"]
    assert rows["base UNet"]["parameters"] == 859_520_964
    assert rows["full guide"]["parameters"] == 361_279_120
    assert rows["tiny guide, on maps"]["parameters"] == 8_273_920 + 16 * 768
    embeds_g = 320 * 1280 + 1280 * 1280
    assert rows["student"]["parameters"] == 859_520_964 + embeds_g + 2 * 1280
    assert rows["student"]["GMACs"] == pytest.approx(
        rows["base UNet"]["GMACs"] + embeds_g / 1e9, rel=1e-12)
    # Θ_z3 and look at every position of 64², 32², 16² and 8²; what makes v once.
    at_each = 640 * (320 * (3 * 64**2 + 32**2) + 640 * (2 * 32**2 + 16**2)
                     + 1280 * (2 * 16**2 + 4 * 8**2))
    once = 320 * (1280 + 768)
    assert rows["seeing guide"]["GMACs"] == pytest.approx((at_each + once) / 1e9, rel=1e-4)


@pytest.mark.full
def test_table1_s_arithmetic_by_hand(table1):
    rows = {row["network"]: row for row in table1["rows"]}
    assert rows["base UNet"]["GMACs"] == pytest.approx(338.61, abs=0.01)
    assert rows["base UNet"]["GMACs with attention"] == pytest.approx(402, abs=0.5)
    assert rows["full guide"]["GMACs"] == pytest.approx(116.42, abs=0.01)
    assert table1["GMACs once per image"]["VAE decoder"] == pytest.approx(1257, abs=0.5)
    # attention of a level: both products, to the N positions themselves and to the 77 tokens
    blocks = {64: (320, 5), 32: (640, 5), 16: (1280, 5), 8: (1280, 1)}
    products = sum(n * 2 * side**2 * (side**2 + 77) * c for side, (c, n) in blocks.items()) / 1e9
    row = rows["base UNet"]
    assert row["GMACs with attention"] - row["GMACs"] == pytest.approx(products, rel=1e-9)
    # ControlNet's hint encoder at 512 pixels
    sizes = ((3, 16, 512), (16, 16, 512), (16, 32, 256), (32, 32, 256), (32, 96, 128),
             (96, 96, 128), (96, 256, 64), (256, 320, 64))
    hint = sum(9 * a * b * side**2 for a, b, side in sizes) / 1e9
    assert table1["GMACs once per image"]["hint encoder"] == pytest.approx(hint, rel=1e-9)
    # the tiny guide: a product a weight, and on maps as many as there are positions
    assert rows["tiny guide, as computed"]["GMACs"] == pytest.approx(
        (819_200 + 491_520 + 6_963_200) / 1e9, rel=1e-9)
    points = {320: 3 * 4096 + 1024, 640: 2 * 1024 + 256, 1280: 2 * 256 + 4 * 64}
    maps = 819_200 * 4096 + 491_520 * 77 + 640 * sum(c * n for c, n in points.items())
    assert rows["tiny guide, on maps"]["GMACs"] == pytest.approx(maps / 1e9, rel=1e-9)


@pytest.mark.full
def test_the_cost_of_an_image(table1):
    once, rows = table1["GMACs once per image"], {r["network"]: r for r in table1["rows"]}
    unet, full, tiny = (rows[n]["GMACs with attention"] for n in
                        ("base UNet", "full guide", "tiny guide, as computed"))
    ends, hint = once["VAE decoder"] + once["text encoder"], once["hint encoder"]
    # keys and values of the prompt, in attention layers of these widths, and what Θ_z2 makes of it
    base, own = (2 * 77 * 768 * width / 1e9 for width in (5 * 320 + 5 * 640 + 6 * 1280,
                                                          2 * 320 + 2 * 640 + 3 * 1280))
    text = (2 * 16 * 77 * 768 + 768 * 640) / 1e9
    # the time embedding and its projections to 20,160 channels: CFG's once a step, not twice
    time = (320 * 1280 + 1280 * 1280 + 1280 * 20_160) / 1e9
    for steps in (8, 16, 50):
        macs = {method: table1["GMACs per image"][method][str(steps)] for method in
                ("cfg", "full", "tiny")}
        less, step = (steps - 1) * base, steps * (unet + tiny)
        twice = once["text encoder"] + 2 * (steps * unet - less) - steps * time
        assert macs["cfg"] == pytest.approx(ends + twice, rel=1e-9)
        assert macs["tiny"] == pytest.approx(ends + step - less - (steps - 1) * text, rel=1e-9)
        step, less = hint + steps * (unet + full - hint), less + (steps - 1) * own
        assert macs["full"] == pytest.approx(ends + step - less, rel=1e-9)


@pytest.mark.parametrize("method", [pytest.param("cfg", marks=pytest.mark.full),
                                    pytest.param("full", marks=pytest.mark.full), "tiny"])
def test_a_run_s_cost_is_affine_in_its_steps(monkeypatch, method):
    nets = cost.build_networks("mini")
    monkeypatch.setattr(cost, "STEPS", (1, 4))
    z, c = torch.empty(1, 4, 8, 8, device="meta"), torch.empty(1, 77, 64, device="meta")
    guide, empty = {"full": nets.full, "tiny": nets.tiny}.get(method), {"cfg": c}.get(method)
    one, four = (count_macs(
        lambda n=n: fast.sample(nets.unet, z, c, 8.0, n, guide, empty)).total for n in (1, 4))
    macs = cost.image_cost(nets, method)
    assert macs[4] - macs[1] == four - one > 0


def test_counting_sees_real_calls_as_well():
    layer, x = torch.nn.Conv2d(6, 8, 3, groups=2, bias=True), torch.randn(2, 6, 9, 7)
    expected = 2 * 8 * 7 * 5 * 3 * 9
    counted = count_macs(lambda: layer(x))
    assert counted == (expected, expected)
    q = torch.randn(2, 4, 10, 16)
    counted = count_macs(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert counted == (0, 2 * 2 * 4 * 10 * 10 * 16)


def test_meta_tensors_count_as_real_ones_do():
    """Of whole networks, and of attention without a mask and with one, as the text encoder has."""
    base, nets = load_base(MINI), cost.build_networks("mini")
    z, t, c = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 77, 64)
    ids, q = base.tokenizer(["a"]), torch.randn(2, 4, 10, 16)
    attention = torch.nn.functional.scaled_dot_product_attention
    for real, meta, *inputs in (
            (base.unet, nets.unet, z, t, c), (base.text, nets.text, ids),
            (base.vae.decode, nets.vae.decode, z), (attention, attention, q, q, q),
            (partial(attention, is_causal=True), partial(attention, is_causal=True), q, q, q)):
        counted = count_macs(partial(real, *inputs))
        assert counted == count_macs(partial(meta, *(x.to("meta") for x in inputs)))
        assert counted.total > 0


@pytest.mark.full
def test_table1_of_the_miniature_in_markdown(empty, capsys):
    result, printed = result_of(capsys, "table1", "--size", "mini")
    count = sum(p.numel() for p in load_base(MINI).unet.parameters())
    assert result["rows"][0]["parameters"] == count and f"{count:,}" in printed
    assert "paper" not in result["rows"][0] and "the miniature, 64 x 64" in printed
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 7 + 2 + 4 and {line.count("|") for line in lines[:9]} == {9}
