"""train.py: the base stays as it is, a resumed run is the same run, and bad input is a sentence."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import TOY_UNET, randomised
from PIL import Image
from train_helpers import (
    GUIDES,
    RUN,
    assert_same_guides,
    begin,
    checkpoints,
    config,
    flags,
    guides,
    log_entries,
    refusal,
    run,
    write_images,
)

import ppdd
import train
from ppdd import GuideConfig
from support.base import load_base
from support.data import CaptionedImages
from support.files import save_tensors, sha256
from support.guides import load_guide, read_guide

# ------------------------------------------------------------------------------- the whole run


@pytest.mark.parametrize("kind", ["tiny", pytest.param("full", marks=pytest.mark.full)])
def test_one_command_leaves_a_guide_for_every_stage(toy_base, here, kind):
    before = sha256(toy_base)
    run(toy_base, "--guide", kind)
    assert set(guides(here)) == {kind, f"{kind}-32", f"{kind}-16", f"{kind}-8"}
    assert sha256(toy_base) == before
    for name, steps in ((kind, 0), (f"{kind}-8", 8)):
        file = read_guide(GUIDES / f"{name}.safetensors")
        assert file.config.kind == kind and file.about["steps"] == steps
        assert file.about["base"] == "toy" and file.about["base_hash"] == before
        assert file.about["g_range"] == [2.0, 9.0]
        guide = load_guide(GUIDES / f"{name}.safetensors", TOY_UNET)
        assert any(p.any() for n, p in guide.named_parameters() if "z3" in n or "zero" in n)


@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_training_moves_the_guide_and_no_weight_of_the_base(toy_base, here, kind):
    trainer = begin(toy_base, "--guide", kind, "--start-steps", "8", "--end-steps", "4")
    before = {k: v.clone() for k, v in trainer.guide.state_dict().items()}
    for stage in (0, 1):
        trainer.stage, trainer.update = stage, 0
        trainer.begin_stage()
        trainer.train_step(trainer.stages[stage])
    assert any(not torch.equal(v, before[k]) for k, v in trainer.guide.state_dict().items())
    fresh = load_base(toy_base)
    for part in ("unet", "vae", "text"):
        now = getattr(trainer.base, part).state_dict()
        assert all(torch.equal(now[k], v) for k, v in getattr(fresh, part).state_dict().items())


def test_the_log_says_loss_and_unexplained_share_and_images_are_drawn(toy_base, here):
    run(toy_base, "--grid-every", 5, "--start-steps", 4, "--end-steps", 1)
    entries = log_entries(RUN / "log.jsonl")
    assert [(e["steps"], e["update"]) for e in entries] == [(0, 3), (2, 3), (1, 3)]
    assert all(e["loss"] > 0 and e["unexplained"] > 0 for e in entries)
    images = sorted(RUN.glob("*.png"))
    assert [i.stem for i in images] == ["tiny-000003", "tiny-1-000003", "tiny-2-000003"]
    assert Image.open(images[0]).size == (256, 128)
    assert not checkpoints(here)                            # the run has ended: none is needed


@pytest.mark.parametrize("after, more", [
    (5, ("--trajectories", "0.5", "--start-steps", "4", "--end-steps", "2")),
    *(pytest.param(*case, marks=pytest.mark.full) for case in (
        (1, ()), (4, ("--grid-every", "2", "--start-steps", "4", "--end-steps", "2")),
        (5, ("--optimizer", "muon")), (9, ())))])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(toy_base, here, monkeypatch, after,
                                                               more):
    run(toy_base, "--out", "whole", "--run", "whole-run", *more)
    train_step, count = train.Trainer.train_step, 0

    def die(self, stage):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return train_step(self, stage)

    monkeypatch.setattr(train.Trainer, "train_step", die)
    with pytest.raises(SystemExit):
        run(toy_base, *more)
    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    assert count == after + 1
    saved = bool(checkpoints(here))
    assert saved == (after >= 2)
    run(toy_base, *["--resume"] * saved, *more)
    assert_same_guides(guides(here), guides(here, "whole/toy"))
    assert log_entries(RUN / "log.jsonl") == log_entries(Path("whole-run/log.jsonl"))


def test_a_fixed_g_goes_into_the_name_and_a_negative_prompt_into_the_target(toy_base, here):
    fixed = ("--g-range", "8", "8", "--end-steps", "32")
    run(toy_base, *fixed, updates=2)
    plain = guides(here)
    assert set(plain) == {"tiny-g8", "tiny-32-g8"}
    run(toy_base, *fixed, "--uncond", "blurry", updates=2)
    weights = [made["tiny-g8"]["theta_z3.0.weight"] for made in (plain, guides(here))]
    assert not torch.equal(*weights)


def test_a_tilde_is_the_home_folder_in_every_place(toy_base, here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    run(toy_base, "--run", "~/run", "--out", "~/out", "--end-steps", "64", updates=1)
    run(toy_base, "--init", "~/out/toy/tiny.safetensors", "--start-steps", "16", updates=1)
    assert (here / "home/run/log.jsonl").exists() and not (here / "~").exists()
    assert (here / "home/out/toy/tiny.safetensors").exists()
    assert set(guides(here)) == {"tiny-8"}


def test_a_guide_is_trained_on_a_base_with_a_lora(toy_base, here, capsys):
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    save_tensors(here / "style.safetensors", {f"{layer}.lora_A.weight": torch.ones(2, 32),
                                              f"{layer}.lora_B.weight": torch.ones(32, 2)})
    run(toy_base, "--lora", "style.safetensors:0.5", "--end-steps", "64", updates=1)
    assert "LoRA: style.safetensors, merged at 0.5" in capsys.readouterr().out
    about = read_guide(here / "guides/toy+style/tiny.safetensors").about
    assert about["base"] == "toy+style" and about["base_hash"] != sha256(toy_base)


# ------------------------------------------------------------------------------- data


def test_a_trial_draws_fewer_images_unless_it_says_how_many(toy_base, here):
    base = load_base(toy_base)
    for more, count in (((), 6000), (("--max-updates", 3), 160), (("--max-updates", 3000), 160),
                        (("--max-updates", 3, "--images", 200), 200), (("--images", 9000), 9000)):
        settings = config(toy_base, "--images", 0, *more)
        assert train.resolve_defaults(settings, base).images == count


def test_a_folder_of_captioned_images_trains_the_guide(toy_base, here):
    folder = here / "data" / "deeper"
    folder.mkdir(parents=True)
    for i, (mode, size) in enumerate((("RGB", (90, 70)), ("L", (64, 200)), ("RGBA", (64, 64)))):
        Image.new(mode, size, 40 * i if mode == "L" else None).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}\n", encoding="utf-8")
    Image.new("RGB", (64, 64)).save(folder / "no-caption.png")
    run(toy_base, "--data", "data", "--size", "64", "--end-steps", "64", updates=2)
    assert set(guides(here)) == {"tiny"}
    data = CaptionedImages(load_base(toy_base), ["data"], 64)
    rows, images = next(data.batches([[0, 1, 2]]))
    assert len(data) == 3 and data.moments(images).shape == (3, 8, 8, 8)
    assert data.prompt_states(rows).shape == (3, 77, 32)


def test_a_list_of_prompts_trains_the_guide_without_images(toy_base, here):
    (here / "prompts.txt").write_bytes("\ufeffa boat\r\n\r\na house, été\n".encode())
    run(toy_base, "--data", "prompts.txt", "--size", "64", "--end-steps", "32", updates=2)
    assert set(guides(here)) == {"tiny", "tiny-32"}
    about = read_guide(GUIDES / "tiny.safetensors").about
    assert about["settings"]["trajectories"] == 1.0


def test_no_draw_is_made_twice_for_a_seed_and_g_stays_in_its_range(toy_base, here):
    trainer = begin(toy_base, "--batch", 16)
    stage = trainer.stages[0]
    first, again, other = (trainer.draw(stage, trainer.generator(0, update))
                           for update in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.noise, other.noise)
    assert len(first.t.unique()) > 12 and len(first.g.unique()) == 16
    assert 2 <= first.g.min() and first.g.max() <= 9


# ------------------------------------------------------------------------------- rollouts


@pytest.mark.parametrize("halving", [False, True])
def test_rollouts_are_the_teachers_own_sampling(toy_base, here, halving):
    trainer = begin(toy_base, "--trajectories", 1, "--start-steps", 8, "--end-steps", 4,
                    "--g-range", 8, 8)
    trainer.stage, trainer.update = int(halving), 1
    stage, steps = trainer.stages[trainer.stage], 4 if halving else 8
    if halving:
        teacher = randomised(lambda: ppdd.build_guide(TOY_UNET, trainer.guide_config))
        trainer.teacher.load_state_dict(teacher.state_dict())
    else:
        trainer.empty = trainer.base.embed(["a boat"])
    trainer.refill_rollout(4, torch.Generator().manual_seed(7))
    z, c = trainer.rollout["z"], trainer.data.prompt_states(trainer.rollout["row"].tolist())
    for _ in range(steps):
        trainer.train_step(stage)
    assert (trainer.rollout["t"] == -1).all()
    with torch.no_grad():
        guided = ({"guide": trainer.teacher} if halving else
                  {"empty": trainer.empty.expand(4, -1, -1)})
        sampled = ppdd.sample(trainer.base.unet, z, c, 8.0, 8, **guided)
    assert (trainer.rollout["z"] - sampled).abs().max() < 1e-3 * sampled.abs().max()
    trainer.train_step(stage)                                                  # begun anew
    assert (trainer.rollout["t"] < 999).all() and (trainer.rollout["t"] >= 0).all()


def test_rollouts_of_one_batch_are_at_different_timesteps(toy_base, here):
    trainer = begin(toy_base, "--batch", 16, "--trajectories", 0.75)
    for _ in range(3):
        trainer.train_step(trainer.stages[0])
    assert len(trainer.rollout["t"]) == 12 and len(trainer.rollout["t"].unique()) > 6


# ------------------------------------------------------------------------------- the update


def gradients(toy_base, *more):
    trainer = begin(toy_base, *more)
    trainer.optimizer.step = lambda: None
    trainer.train_step(trainer.stages[0])
    trainer.folder.unlock()
    return torch.cat([p.grad.flatten() for p in trainer.guide.parameters()])


@pytest.mark.parametrize("more", [["--accumulate", 3], ["--checkpointing"]])
def test_parts_and_checkpointing_leave_the_gradient_as_it_is(toy_base, here, more):
    torch.testing.assert_close(gradients(toy_base, *more), gradients(toy_base), rtol=1e-4,
                               atol=1e-6)


@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("zero", [True, False])
def test_a_tiny_guide_that_is_zero_throughout_gets_no_wider_than_its_queries(
        toy_base, here, zero, queries):
    trainer = begin(toy_base)
    trainer.guide = ppdd.build_guide(TOY_UNET, GuideConfig(queries=queries))
    trainer.begin_stage()                                                      # its optimiser
    if zero:
        for layer in (trainer.guide.theta_z1, trainer.guide.theta_z2):
            torch.nn.init.zeros_(layer.weight)
    for _ in range(5):
        trainer.train_step(trainer.stages[0])
    weight = trainer.guide.theta_z3[0].weight
    assert weight.any()
    channels = weight.T.unflatten(0, (queries, -1))           # (queries, channels of each, outputs)
    spread = (channels - channels[:, :1]).abs().max()
    assert spread < 1e-9 if zero else spread > 1e-4


# ------------------------------------------------------------------------------- other guides, runs


def test_stage_one_goes_further_from_a_guide(toy_base, here):
    run(toy_base, "--end-steps", "64", updates=2)
    file, before = GUIDES / "tiny.safetensors", guides(here)["tiny"]
    init = {"sha256": sha256(file), "steps": 0, "updates": 2}
    begun = begin(toy_base, "--init", file, "--further")
    assert begun.stage == begun.update == 0 and begun.init_info == init
    assert all(torch.equal(v, before[k].float()) for k, v in begun.guide.state_dict().items())

    first = begun.generator(0, 0).initial_seed()
    begun.save()                                          # what it began with outlives a kill
    begun.folder.unlock()
    again = begin(toy_base, "--resume")
    again.folder.unlock()
    checkpoints(here)[-1].unlink()
    assert again.init_info == init and again.generator(0, 0).initial_seed() == first

    begun.init_info = {}                                  # draws go on after the first two
    assert begun.generator(0, 2).initial_seed() == first != begun.generator(0, 0).initial_seed()
    run(toy_base, "--end-steps", "32", "--init", file, "--further", updates=3)
    about = read_guide(file).about
    assert about["updates"] == 5 and about["init"] == init
    assert read_guide(GUIDES / "tiny-32.safetensors").about["updates"] == 3


def test_a_guide_given_to_be_halved_is_its_own_teacher(toy_base, here):
    run(toy_base, "--end-steps", "64", updates=1)
    saved = guides(here)["tiny"]
    trainer = begin(toy_base, "--init", GUIDES / "tiny.safetensors")
    assert (trainer.stage, trainer.update) == (1, 0)
    for guide in (trainer.guide, trainer.teacher):
        assert all(torch.equal(v, saved[k].float()) for k, v in guide.state_dict().items())


def test_what_no_guide_can_begin_is_refused(toy_base, here, capsys):
    run(toy_base, "--end-steps", "32", updates=1)
    halved = ("--init", GUIDES / "tiny-32.safetensors")
    for more, words in ((("--further",), "--init"), (("--further", *halved), "halved to 32 steps"),
                        (halved, "--start-steps 32"),
                        ((*halved, "--end-steps", "64"), "nothing is left to train")):
        assert words in refusal(capsys, flags(toy_base, *more))


def test_a_guide_of_other_settings_is_refused(toy_base, here, capsys):
    run(toy_base, "--end-steps", "64", "--form", "gated", updates=2)
    init = ("--init", GUIDES / "tiny.safetensors")
    for more in (init, (*init, "--guide", "full")):
        assert "other settings" in refusal(capsys, flags(toy_base, *more))
    run(toy_base, *init, "--form", "gated", "--end-steps", "32", updates=1)
    assert set(guides(here)) == {"tiny", "tiny-32"}


def test_an_unfinished_run_is_not_overwritten_nor_resumed_with_other_settings(toy_base, here,
                                                                              capsys):
    unfinished = begin(toy_base)
    unfinished.save()
    unfinished.folder.unlock()
    assert "go on with --resume" in refusal(capsys, flags(toy_base))
    assert "another seed" in refusal(capsys, flags(toy_base, "--resume", "--seed", 5))
    assert checkpoints(here)


def test_settings_that_a_resumed_run_may_change_exist():
    assert train.MAY_CHANGE < {field.name for field in fields(train.Config)}


def test_a_run_of_another_base_or_without_a_whole_checkpoint_is_not_resumed(toy_base, here, capsys):
    unfinished = begin(toy_base, "--max-updates", 1)
    unfinished.base_hash = "of another file"
    unfinished.save()
    unfinished.folder.unlock()
    assert "another base" in refusal(capsys, flags(toy_base, "--max-updates", 1, "--resume"))
    checkpoints(here)[-1].write_bytes(b"half a file")
    assert "all are damaged" in refusal(capsys, flags(toy_base, "--resume"))


def test_a_resume_refuses_other_postcards(toy_base, here, capsys):
    unfinished = begin(toy_base, "--images", 20, "--max-updates", 2)
    unfinished.save()
    unfinished.folder.unlock()
    sentence = refusal(capsys, flags(toy_base, "--images", 10, "--resume"))
    assert "postcards 20 0): give --images" in sentence
    begin(toy_base, "--images", 20, "--max-updates", 300, "--resume").folder.unlock()


def test_a_run_goes_on_with_data_that_shrank_and_with_no_other(toy_base, here, capsys):
    write_images(here / "set", [f"caption {i}" for i in range(9)])
    write_images(here / "other", ["another"])
    half = ("--trajectories", "0.5", "--end-steps", "64", "--max-updates", "3")
    begun = begin(toy_base, "--data", "set", *half)
    begun.train_step(begun.stages[0])
    begun.save()
    begun.folder.unlock()
    sentence = refusal(capsys, flags(toy_base, "--data", "other", "--resume", *half))
    assert "begun with other --data" in sentence and checkpoints(here)
    for i in range(1, 9):
        (here / "set" / f"{i:03d}.png").unlink()
    run(toy_base, "--data", "set", "--resume", *half)
    assert set(guides(here)) == {"tiny"} and "not what it was" in capsys.readouterr().out


def test_a_run_goes_on_where_its_folder_was_moved_to(toy_base, here):
    first = begin(toy_base, "--run", "a")
    first.save()
    first.folder.unlock()
    Path("a").rename("b")
    again = begin(toy_base, "--resume", "--run", f"{here}/b/")
    assert again.folder.path.samefile("b")


def test_the_guide_before_is_kept_aside_and_so_is_its_log(toy_base, here, capsys):
    for seed in (1, 2):
        run(toy_base, "--end-steps", "64", "--seed", seed, updates=2)
        aside = "the one before it is tiny.safetensors.old" in capsys.readouterr().out
        assert aside == (seed == 2)
    files = [GUIDES / "tiny.safetensors", GUIDES / "tiny.safetensors.old"]
    assert [read_guide(file).about["seed"] for file in files] == [2, 1]
    run(toy_base, "--end-steps", "64", "--seed", 2, updates=2)   # its own, as after a kill
    assert [read_guide(file).about["seed"] for file in files] == [2, 1]
    logs = [(RUN / name).read_text() for name in ("log.jsonl", "log.old.jsonl")]
    assert all(logs) and logs[0] != logs[1]


# ------------------------------------------------------------------------------- bad updates, input


def test_a_loss_that_is_not_finite_stops_with_advice(toy_base, here, monkeypatch, capsys):
    distill = train.Trainer.distill

    def break_update_2(self, stage, *batch):
        result = distill(self, stage, *batch)
        return replace(result, loss=result.loss * float("nan")) if self.update == 1 else result

    monkeypatch.setattr(train.Trainer, "distill", break_update_2)
    sentence = refusal(capsys, flags(toy_base))
    assert "update 2" in sentence and "--lr" in sentence.split("lower")[1]
    assert "before," not in sentence and "delete" not in sentence   # nothing usual, nothing older


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), 1e9])
def test_a_bad_update_is_not_made_and_its_sample_is_named(toy_base, here, monkeypatch, spoilt):
    trainer = begin(toy_base)
    stage = trainer.stages[0]
    for _ in range(12):
        trainer.train_step(stage)
        trainer.read_metrics(stage)
    before = {k: v.clone() for k, v in trainer.guide.state_dict().items()}
    distill = train.Trainer.distill

    def spoil(self, *batch):
        result = distill(self, *batch)
        error = torch.zeros_like(result.error)
        error[2] = spoilt
        return replace(result, loss=result.loss * spoilt, error=error)

    monkeypatch.setattr(train.Trainer, "distill", spoil)
    with pytest.raises(train.BadInput) as refused:
        trainer.train_step(stage)
    sentence = str(refused.value)
    batch = trainer.draw(stage, trainer.generator(0, 12))
    rows = trainer.draw_rows(trainer.generator(0, 12)).tolist()
    assert f"update 13 (CFG in one pass), where t {batch.t[2]}, g {batch.g[2]:.3g}, " in sentence
    assert repr(trainer.data.captions(rows)[2]) in sentence
    assert "state-00-00000012" in sentence
    saved = trainer.folder.load()[0]
    assert all(torch.equal(saved[f"guide.{k}"], v) for k, v in before.items())


@pytest.mark.parametrize("error", [
    MemoryError(), ImportError("no clip"), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_no_memory_or_no_package_is_a_sentence(toy_base, here, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(train.Trainer, "distill", fail)
    sentence = refusal(capsys, flags(toy_base))
    advice = ("--batch", "--accumulate", "--checkpointing", "--cache")
    assert "no clip" in sentence or all(flag in sentence for flag in advice)


@pytest.mark.parametrize("more, words", [
    (["--g-range", "9", "2"], "--g-range 9 2: give LOW <= HIGH"),
    (["--g-range", "nan", "nan"], "--g-range nan"), (["--g-range", "0", "0"], "not both 0"),
    (["--batch", "0"], "--batch 0"), (["--accumulate", "5"], "at most --batch 4"),
    (["--size", "100"], "--size 100"), (["--updates", "-1"], "--updates -1"),
    (["--save-every", "0"], "--save-every 0"), (["--lr", "nan"], "--lr nan"),
    (["--grad-clip", "0"], "--grad-clip 0"), (["--trajectories", "1.5"], "--trajectories 1.5"),
    (["--start-steps", "60"], "power of two"), (["--end-steps", "0"], "--end-steps 0"),
    (["--start-steps", "8", "--end-steps", "16"], "power of two"),
    (["--guide", "huge"], "invalid choice"), (["--data", "nowhere"], "does not exist"),
    (["--resume"], "no unfinished run"), (["--cache", "folder"], "--data"),
    (["--weights", "nowhere.safetensors"], "does not exist"),
    (["--init", "nowhere.safetensors"], "does not exist"), (["--seed", "-1"], "--seed -1"),
    (["--device", "cuda:a"], "--device cuda:a"), (["--device", "cuda:9"], "there is none here"),
    (["--uncond", "\udcff"], "not text"), (["--pictures", "4"], "unrecognized"),
    (["--clip", "1"], "unrecognized"), (["--ema", "0.9"], "unrecognized"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(toy_base, here, capsys, more, words):
    assert words in refusal(capsys, flags(toy_base, *more))
    assert not (here / "guides").exists()
