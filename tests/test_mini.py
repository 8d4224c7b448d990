"""The bundled miniature is what the README says: a whole Stable Diffusion whose guides work."""

import json
import random
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from mini import postcards, study, tune
from mini.dataset import Postcards
from mini.judge import Benchmark, load_judge
from support.base import MINI, base_sha256, load_base
from support.guides import load_guide, read_guide

GUIDES = MINI.parent / "guides"
EARLIER_FULL_8 = "82d2f0ad3de4fb86cc9fa48146b808f31574105509b9c5a6d2fad7d41ac41e1e"
ROOT = MINI.parent.parent


@pytest.fixture(scope="module")
def bench():
    """96 fresh images with captions that name every attribute."""
    return Benchmark(load_base(MINI), load_judge(), count=96, seed=5)


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
    images = [postcards.draw(row[None], generator=torch.Generator().manual_seed(1)) for row in a]
    different = len({image.numpy().tobytes() for image in images})
    assert different == len(list(postcards.ATTRIBUTES.values())[column])


def test_captions_say_what_is_shown_in_many_ways():
    a, rng = torch.tensor([0, 0, 0, 3, 0, 1]), random.Random(0)
    full = [postcards.caption(a, rng, left_out=False) for _ in range(50)]
    assert len(set(full)) > 30
    assert all("red boat" in t and t.count("  ") == 0 and "{" not in t for t in full)
    assert all(any(p in t for p in ("on the sea", "at sea")) for t in full)
    shorter = [postcards.caption(a, rng) for _ in range(2000)]
    assert .1 < sum("left" not in t for t in shorter) / 2000 < .3        # LEFT_OUT["position"]
    orange = torch.tensor([0, 1, 0, 0, 0, 0])
    assert not any("a orange" in postcards.caption(orange, rng) for _ in range(100))


@pytest.mark.parametrize("style", postcards.STYLES)
def test_the_judge_reads_real_images(bench, style):
    real = postcards.draw(bench.attributes, style, torch.Generator().manual_seed(9))
    assert bench.accuracy(real)["all"] >= .97


def test_reconstructions_are_judged_like_the_originals(bench):
    with torch.no_grad():
        moments = bench.base.vae.encode(bench.real * 2 - 1)
        decoded = bench.base.vae.decode(bench.base.vae.config.scale_factor * moments[:, :4])
    assert (decoded / 2 + .5 - bench.real).abs().mean() < .03
    assert bench.accuracy((decoded / 2 + .5).clamp(0, 1))["all"] >= .9


@pytest.mark.full
def test_cfg_follows_captions_and_no_guidance_does_so_much_less(bench):
    guided = bench.measure("CFG", 8., 25, cfg=True)["caption accuracy"]["all"]
    free = bench.measure("no guidance", 0., 25)["caption accuracy"]["all"]
    assert guided >= .8 and free <= guided - .1


def test_all_guides_of_the_readme_are_bundled():
    names = {p.stem for p in GUIDES.glob("*.safetensors")}
    assert names >= {"tiny", "tiny-16", "tiny-8", "full", "full-16", "full-8", "tiny-8-g8",
                     "tiny-4", "tiny-2", "tiny-gated", "tiny-gated-16", "tiny-gated-8",
                     "tiny-seeing", "tiny-seeing-16", "tiny-seeing-8",
                     "tiny-seeing-4", "tiny-seeing-2", "tiny-seeing-1"}


@pytest.mark.full
def test_every_bundled_guide_beats_no_guidance(bench):
    free = bench.measure("no guidance", 0., 8)["caption accuracy"]["all"]
    for name in ("full-8", "tiny-8", "tiny-8-g8", "tiny-gated-8", "tiny-seeing-8"):
        guide = load_guide(GUIDES / f"{name}.safetensors", bench.base.unet.config)
        assert bench.measure(name, 8., 8, guide)["caption accuracy"]["all"] > free


def test_guides_say_which_base_made_them():
    for path in GUIDES.glob("*.safetensors"):
        guide = read_guide(path)
        assert guide.config.kind == path.stem.split("-")[0]
        assert guide.about["base_hash"] == base_sha256(MINI)


def test_the_miniature_is_small_and_carries_its_configuration():
    assert MINI.stat().st_size < 25 * 2**20
    with safe_open(MINI, framework="pt") as opened:
        assert {"unet_config", "vae_config", "text_config"} <= set(opened.metadata())
        assert all(opened.get_slice(k).get_dtype() == "F16" for k in opened.keys())
        assert json.loads(opened.metadata()["text_config"])["vocab_size"] == 49408


# ------------------------------------------------------------------------------- mini/tune.py

def test_rows_are_made_once_and_again_where_what_they_rest_on_has_changed(tmp_path, monkeypatch):
    """Also where the rows before one were kept and the run then ended."""
    trained, out, judge = [], tmp_path / "tuning.json", ["one judge"]

    def train(row, *rest):
        trained.append(row["guide"])
        if row["guide"] == "tiny":      # as the rows that are published, whatever the defaults
            assert row["optimizer"] == "adamw" and {"lr", "halving-lr"} & {*row}
        return 0.5

    monkeypatch.setattr(tune, "train", train)
    monkeypatch.setattr(tune, "judge_hash", lambda: judge[0])
    monkeypatch.setattr(tune, "measure", lambda *_: {"images": 1, "judge": judge[0]})
    plain = len(tune.ROWS)

    def rows(*argv):
        trained.clear()
        monkeypatch.setattr(sys, "argv", ["tune.py", "--out", str(out), "--updates", "5", *argv])
        tune.main()
        return json.loads(out.read_text())

    first = rows("--few")
    assert len(first) == 10 and trained == ["tiny", "full"]
    for at, again in ((3, []), (4, ["tiny"])):         # a row of tiny-8 itself; of what it became
        out.write_text(json.dumps(first[:at] + first[at + 1:]))
        assert len(rows("--few")) == 10 and trained == again
    judge[0] = "another"
    assert len(rows("--few")) == 10 and trained == ["tiny", "full"]
    assert {row["judge"] for row in rows("--few")} == {"another"} and not trained
    assert len(rows()) == 10 + plain and len(trained) == plain
    assert len(rows()) == 10 + plain and not trained
    assert len(rows("--seed", "1")) == 10 + 2 * plain and len(trained) == plain
    assert len(rows("--seed", "1")) == 10 + 2 * plain and not trained
    monkeypatch.setattr(tune, "sha256", lambda path: "other guides")
    assert len(rows("--few")) == 10 + 2 * plain and trained == ["tiny", "full"]
    assert len(rows("--remedies")) == 10 + 2 * plain + 2 + len(tune.REMEDIES)
    assert len(trained) == len(tune.REMEDIES)


def test_the_comparisons_that_are_published_are_all_in_the_file(tmp_path, monkeypatch):
    pages = [ROOT / name for name in ("README.md", "RESULTS.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages if page.exists())
    commands = set(re.findall(r"[` ](--[a-z]+(?: --[a-z]+)* [0-9]+ --dtype bf16)`", text))
    commands -= {"--halving --updates 600 --dtype bf16"}     # of an option that is gone: --loss snr
    out = tmp_path / "tuning.json"
    shutil.copy(ROOT / "results" / "tuning.json", out)
    before = out.read_bytes()
    # These rows halved the full guide that was bundled before, as RESULTS.md says.
    assert "The full guides of these rows are the earlier one" in " ".join(text.split())
    now = tune.sha256
    monkeypatch.setattr(tune, "sha256", lambda path: EARLIER_FULL_8
                        if path.name == "full-8.safetensors" else now(path))
    monkeypatch.setattr(tune, "train", lambda *_: pytest.fail("a row is not there"))
    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("a row is not there"))
    for words in commands:
        monkeypatch.setattr(sys, "argv", ["tune.py", "--out", str(out), *words.split()])
        tune.main()
    assert len(commands) == 3 and out.read_bytes() == before


def test_postcards_to_train_on_are_encoded_from_minus_one_to_one(toy_base):
    base, generator = load_base(toy_base), torch.Generator().manual_seed(4)
    attributes = postcards.sample_attributes(3, generator)
    images = postcards.draw(attributes, generator=generator)
    moments = Postcards(base, 3, seed=4).moments(torch.tensor([2, 0]))
    assert images.min() < 0.2 and images.max() > 0.8
    torch.testing.assert_close(moments, base.vae.encode(2 * images - 1)[[2, 0]])


def test_an_image_is_right_where_all_six_attributes_are():
    few = Benchmark.__new__(Benchmark)
    few.attributes = torch.zeros(4, 6)
    seen = torch.zeros(4, 6)
    seen[0, 1:3] = seen[1, 2] = 1
    few.judge = SimpleNamespace(read=lambda images: seen)
    assert few.accuracy(torch.empty(0)) == {"all": 0.5, "subject": 1, "color": 0.75, "place": 0.5,
                                            "time": 1, "position": 1, "size": 1}


def test_trials_go_to_runs_and_the_project_s_own_rows_stay(tmp_path, monkeypatch):
    def rows(*argv) -> dict[str, list]:
        monkeypatch.setattr(sys, "argv", ["tune.py", *argv])
        tune.main()
        return {str(file.relative_to(tmp_path)): json.loads(file.read_text())
                for file in sorted(tmp_path.rglob("*.json"))}

    (tmp_path / "results").mkdir()
    (tmp_path / "results/tuning.json").write_text('["theirs"]')
    monkeypatch.setattr(tune, "ROOT", tmp_path)
    monkeypatch.setattr(tune, "compare_training", lambda out, *_: out.write_text(
        json.dumps([*tune.read_rows(out), "mine"])))
    assert rows() == {"results/tuning.json": ["theirs"], "runs/tuning.json": ["theirs", "mine"]}
    assert rows("--update-results")["results/tuning.json"] == ["theirs", "mine"]


# ------------------------------------------------------------------------------- mini/study.py

def test_guides_trained_together_are_those_trained_alone(monkeypatch):
    base = load_base(MINI)
    data = Postcards(base, 8, seed=1)
    rows = [study.TINY | {"batch": 4, "form": form} for form in study.FORMS]
    rows += [rows[2] | {"variant": name} for name in study.VARIANTS] + [rows[0] | {"g": 8.0}]
    rows.insert(0, rows[0] | {"guide": "whole", "optimizer": "adamw", "lr": 1e-3})
    together = study.train_together(base, data, rows, states=8)
    alone = [study.train_together(base, data, [row], states=8)[0] for row in (rows[2], rows[-1])]
    for one, other in zip(alone, (together[2], together[-1])):
        assert all(torch.equal(one.state_dict()[k], v) for k, v in other.state_dict().items())
    shares = study.unexplained(base, rows, together, count=4)
    assert len(set(shares)) == len(rows)                        # no two of them are the same
    fresh = [study.build(base.unet.config, row) for row in rows]
    fresh[0].start_from(base.unet)
    assert study.unexplained(base, rows, fresh, count=4) == [1] * len(rows)


def test_a_row_of_a_study_is_made_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "Postcards", lambda *_, **__: None)
    monkeypatch.setattr(study, "train_together", lambda base, data, rows, states: made.extend(rows)
                        or [torch.nn.Identity() for _ in rows])
    monkeypatch.setattr(study, "unexplained", lambda base, rows, guides: [0.5] * len(rows))
    monkeypatch.setattr(sys, "argv", ["study.py", "looking", "--states", "256"])
    study.main()
    assert len(made) == 2 + len(study.VARIANTS)
    out = tmp_path / "runs" / "study.json"
    rows = json.loads(out.read_text())
    assert [row["settings"] for row in rows] == made and not (tmp_path / "results").exists()
    out.write_text(json.dumps(rows[1:]))
    study.main()
    assert made[len(rows):] == [rows[0]["settings"]]
