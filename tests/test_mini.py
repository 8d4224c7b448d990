"""The bundled miniature is what the README says: a whole Stable Diffusion whose guides work."""

import json
import random
import re
import shutil
import sys

import pytest
import torch

import ppdd
from mini import postcards, tune
from mini.judge import World, load_judge

GUIDES = ppdd.MINI.parent / "guides"


@pytest.fixture(scope="module")
def world():
    """96 fresh pictures with captions that name every attribute."""
    return World(ppdd.load_base(ppdd.MINI), load_judge(), count=96, seed=5)


def test_a_postcard_is_its_attributes_and_its_seed():
    a = postcards.sample_attributes(20, torch.Generator().manual_seed(0))
    for style in postcards.STYLES:
        first = postcards.draw(a, style, torch.Generator().manual_seed(1))
        again = postcards.draw(a, style, torch.Generator().manual_seed(1))
        other = postcards.draw(a, style, torch.Generator().manual_seed(2))
        assert first.shape == (20, 3, 64, 64) and 0 <= first.min() and first.max() <= 1
        assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="style"):
        postcards.draw(a, "cubist")


@pytest.mark.parametrize("column", range(6))
def test_every_attribute_shows(column):
    a = postcards.sample_attributes(1, torch.Generator().manual_seed(0)).repeat(8, 1)
    a[:, column] = torch.arange(8) % len(list(postcards.ATTRIBUTES.values())[column])
    pictures = [postcards.draw(row[None], generator=torch.Generator().manual_seed(1)) for row in a]
    different = len({p.numpy().tobytes() for p in pictures})
    assert different == len(list(postcards.ATTRIBUTES.values())[column])


def test_captions_say_what_is_shown_and_a_share_of_them_lies():
    a, rng = torch.tensor([0, 0, 0, 3, 0, 1]), random.Random(0)
    full = [postcards.caption(a, rng, left_out=False) for _ in range(50)]
    assert len(set(full)) > 30
    assert all("red boat" in t and t.count("  ") == 0 and "{" not in t for t in full)
    assert all(any(p in t for p in ("on the sea", "at sea")) for t in full)
    told = [postcards.training_caption(a, rng, lies=.3) for _ in range(2000)]
    assert .2 < sum("red boat" not in t for t in told) / 2000 < .4
    orange = torch.tensor([0, 1, 0, 0, 0, 0])
    assert not any("a orange" in postcards.caption(orange, rng) for _ in range(100))


@pytest.mark.parametrize("style", postcards.STYLES)
def test_the_judge_reads_real_pictures(world, style):
    real = postcards.draw(world.attributes, style, torch.Generator().manual_seed(9))
    assert world.right(real)["all"] >= .97


def test_reconstructions_are_judged_like_the_originals(world):
    with torch.no_grad():
        moments = world.base.vae.encode(world.real * 2 - 1)
        decoded = world.base.vae.decode(world.base.vae.config.scale_factor * moments[:, :4])
    assert (decoded / 2 + .5 - world.real).abs().mean() < .03
    assert world.right((decoded / 2 + .5).clamp(0, 1))["all"] >= .9


def test_cfg_follows_captions_and_no_guidance_does_so_much_less(world):
    guided = world.sampled("CFG", 8., 25, cfg=True)["right"]["all"]
    free = world.sampled("no guidance", 0., 25)["right"]["all"]
    assert guided >= .8 and free <= guided - .1


def test_every_bundled_guide_beats_no_guidance(world):
    free = world.sampled("no guidance", 0., 8)["right"]["all"]
    names = {p.stem for p in GUIDES.glob("*.safetensors")}
    assert names >= {"tiny", "tiny-16", "tiny-8", "full", "full-16", "full-8", "tiny-8-g8",
                     "tiny-gated", "tiny-gated-16", "tiny-gated-8"}
    for name in ("full-8", "tiny-8", "tiny-8-g8", "tiny-gated-8"):
        guide = ppdd.load_guide(GUIDES / f"{name}.safetensors", world.base.unet.config)
        assert world.sampled(name, 8., 8, guide)["right"]["all"] > free


def test_guides_say_which_base_made_them():
    for path in GUIDES.glob("*.safetensors"):
        config, about = ppdd.read_about(path)
        assert config.kind == path.stem.split("-")[0]
        assert about["base_hash"] == ppdd.fingerprint(ppdd.MINI)


def test_the_miniature_is_small_and_carries_its_configuration():
    from safetensors import safe_open

    assert ppdd.MINI.stat().st_size < 25 * 2**20
    with safe_open(ppdd.MINI, framework="pt") as opened:
        assert {"unet_config", "vae_config", "text_config"} <= set(opened.metadata())
        assert all(opened.get_slice(k).get_dtype() == "F16" for k in opened.keys())
        assert json.loads(opened.metadata()["text_config"])["vocab_size"] == 49408


def test_rows_are_made_once_and_again_where_what_they_rest_on_has_changed(tmp_path, monkeypatch):
    """Also where the rows before one were kept and the run then ended."""
    trained, out, seen = [], tmp_path / "tuning.json", ["one judge"]
    monkeypatch.setattr(tune, "train", lambda row, *rest: trained.append(row["guide"]) or 0.5)
    monkeypatch.setattr(tune, "judge_hash", lambda: seen[0])
    monkeypatch.setattr(tune, "judged", lambda *_: {"pictures": 1, "judge": seen[0]})

    def rows(*argv):
        trained.clear()
        monkeypatch.setattr(sys, "argv", ["tune.py", "--out", str(out), "--updates", "5", *argv])
        tune.main()
        return json.loads(out.read_text())

    first = rows("--few")
    assert len(first) == 10 and trained == ["tiny", "full"]
    for at, again in ((3, []), (4, ["tiny"])):                 # a row of tiny-8 itself; of its heir
        out.write_text(json.dumps(first[:at] + first[at + 1:]))
        assert len(rows("--few")) == 10 and trained == again
    seen[0] = "another"
    assert len(rows("--few")) == 10 and trained == ["tiny", "full"]
    assert {row["judge"] for row in rows("--few")} == {"another"} and not trained
    assert len(rows("--halving")) == 14 and len(trained) == 4
    assert len(rows("--halving")) == 14 and not trained
    assert len(rows("--halving", "--seed", "1")) == 18 and len(trained) == 4
    assert len(rows("--halving", "--seed", "1")) == 18 and not trained
    out.write_text(json.dumps([row for row in rows("--halving") if not row.get("flags")]))
    monkeypatch.setattr(ppdd, "fingerprint", lambda path: "other guides")
    assert len(rows("--halving")) == 14 and len(trained) == 4
    assert len(rows("--remedies")) == 14 + 2 + len(tune.REMEDIES) and len(trained) == len(
        tune.REMEDIES)


def test_the_readme_s_comparisons_are_all_in_the_file(tmp_path, monkeypatch):
    page = ppdd.MINI.parent.parent.joinpath("README.md").read_text(encoding="utf-8")
    said = re.findall(r"[` ](--[a-z]+(?: --[a-z]+)* [0-9]+ --dtype bf16)`", page)
    out = tmp_path / "tuning.json"
    shutil.copy(ppdd.MINI.parent.parent / "results" / "tuning.json", out)
    before = out.read_bytes()
    monkeypatch.setattr(tune, "train", lambda *_: pytest.fail("a row is not there"))
    monkeypatch.setattr(tune, "judged", lambda *_: pytest.fail("a row is not there"))
    for words in said:
        monkeypatch.setattr(sys, "argv", ["tune.py", "--out", str(out), *words.split()])
        tune.main()
    assert len(said) == 4 and out.read_bytes() == before
