"""train.py: the base stays as it is, a resumed run is the same run, and bad input is a sentence."""

import copy
import itertools
import math
import os
import re
import signal
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY_UNET, noise, randomised
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
from meng import StudentConfig
from mini.dataset import Postcards
from ppdd import GuideConfig
from support.base import load_base
from support.cli import BadInput
from support.data import CaptionedImages
from support.files import save_tensors, sha256
from support.guides import (
    BUNDLED,
    build_guide,
    find_guide,
    guide_path,
    load_guide,
    read_guide,
)
from support.machine import math_attention
from unet import Block

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


@pytest.mark.parametrize("kind", ["tiny", "full", "whole"])
def test_training_moves_the_guide_and_no_weight_of_the_base(toy_base, here, kind):
    trainer = begin(toy_base, "--guide", kind, "--start-steps", "8", "--end-steps", "4")
    before = {k: v.clone() for k, v in trainer.guide.state_dict().items()}
    for stage in (0, 1):
        trainer.stage, trainer.update = stage, 0
        trainer.begin_stage()
        trainer.train_step()
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

    def die(self):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return train_step(self)

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


def test_a_student_is_trained_in_the_guides_stages_and_resumed_bit_for_bit(toy_base, here, capsys):
    more = ("--guide", "whole", "--prediction", "v", "--stochastic", "--start-steps", 2,
            "--end-steps", 1)
    run(toy_base, "--out", "straight", "--run", "straight-run", "--grid-every", 5, *more)
    assert len(list(Path("straight-run").glob("whole-v-*.png"))) == 2
    begun = begin(toy_base, "--max-updates", 3, *more)
    begun.train_step()
    begun.train_step()
    begun.save()
    begun.folder.unlock()
    run(toy_base, "--resume", *more)
    assert set(guides(here)) == {"whole-v", "whole-v-1"}
    assert_same_guides(guides(here), guides(here, "straight/toy"))
    file, path = read_guide(GUIDES / "whole-v-1.safetensors"), GUIDES / "whole-v.safetensors"
    assert file.config == StudentConfig(prediction="v") and file.about["settings"]["loss"] == "snr"
    assert file.about["stage"] == file.about["steps"] == 1

    halved = begin(toy_base, "--init", path, *more)
    saved = load_guide(path, TOY_UNET).state_dict()
    assert halved.stage == 1 and all(torch.equal(v, saved[k])
                                     for k, v in halved.guide.state_dict().items())
    halved.folder.unlock()
    init = ("--init", path, "--end-steps", "32")
    assert "--prediction that it" in refusal(capsys, flags(toy_base, *init, "--guide", "whole"))
    for wrong, words in ((("--prediction", "v"), "is for --guide whole"),
                         (("--guide", "whole", "--form", "gated"), "--form is of the tiny guide")):
        assert words in refusal(capsys, flags(toy_base, *wrong))


def test_the_stochastic_samplers_steps_start_at_odd_points_too(toy_base, here):
    for more, steps in (((), 4), (("--stochastic",), 8)):
        trainer = begin(toy_base, "--batch", 64, "--start-steps", 8, "--end-steps", 4, *more)
        trainer.stage = 1
        trainer.begin_stage()
        t = trainer.batches.draw(trainer.batches.generator(0)).t
        assert set(t.tolist()) == set(ppdd.step_grid(steps)[:-1])
        trainer.folder.unlock()
    with pytest.raises(BadInput, match="--stochastic is for noised images"):
        begin(toy_base, "--stochastic", "--trajectories", 1)


def test_a_run_from_before_a_setting_existed_is_resumed(toy_base, here):
    begun = begin(toy_base, "--max-updates", 1)
    state = begun.state()
    del state["config"]["prediction"], state["config"]["stochastic"]
    begun.state = lambda: state
    begun.save()
    begun.folder.unlock()
    begin(toy_base, "--max-updates", 1, "--resume").folder.unlock()


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


def style(folder: Path) -> str:
    """A LoRA for the toy base, style.safetensors."""
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    save_tensors(folder / "style.safetensors", {f"{layer}.lora_A.weight": torch.ones(2, 32),
                                                f"{layer}.lora_B.weight": torch.ones(32, 2)})
    return "style.safetensors"


def test_a_guide_is_trained_on_a_base_with_a_lora(toy_base, here, capsys):
    style(here)
    run(toy_base, "--lora", "style.safetensors:0.5", "--end-steps", "64", updates=1)
    assert "LoRA: style.safetensors, merged at 0.5" in capsys.readouterr().out
    about = read_guide(here / "guides/toy+style/tiny.safetensors").about
    assert about["base"] == "toy+style" and about["base_hash"] != sha256(toy_base)


# ------------------------------------------------------------------------------- trials


def test_a_trial_stays_in_the_runs_folder_and_is_used_only_by_name(toy_base, here, capsys):
    run(toy_base, "--out", "", "--end-steps", 32, "--lora", style(here), updates=1)
    folder, base = Path("runs/toy+style/tiny"), load_base(toy_base)
    assert set(guides(here, folder)) == {"tiny", "tiny-32"} and not Path("guides").exists()
    printed = capsys.readouterr().out
    assert f"log: {folder}/log.jsonl\n" in printed
    command = (f"python sample.py --guide {folder}/tiny-32.safetensors --steps 32 --g 8 "
               f"--weights {toy_base} --lora style.safetensors")
    assert f"a trial of at most 1 updates a stage; to sample with it: {command}\n" in printed
    run(toy_base, "--end-steps", 64, updates=1)             # which asks for guides/ by name
    assert set(guides(here)) == {"tiny"} and find_guide(base, "tiny", 8) is None
    assert guide_path(base, "tiny").parent == BUNDLED


def test_a_trial_that_is_finished_without_its_limit_is_none(toy_base, here, capsys):
    trial = begin(toy_base, "--out", "", "--max-updates", 2, "--end-steps", 64)
    trial.train_step()
    trial.save()
    trial.folder.unlock()
    whole = ("--out", "", "--resume", "--updates", 2, "--halving-updates", 1)
    train.main(flags(toy_base, *whole, "--end-steps", 64))
    assert set(guides(here)) == {"tiny"} and "trial" not in capsys.readouterr().out
    assert find_guide(load_base(toy_base), "tiny", 8) == GUIDES / "tiny.safetensors"


def test_a_trial_whose_first_stage_has_ended_stays_one(toy_base, here, capsys):
    trial = begin(toy_base, "--max-updates", 2)
    trial.stage = 1
    trial.save()
    trial.folder.unlock()
    assert "give --max-updates 2 as then" in refusal(capsys, flags(toy_base, "--resume"))


# ------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("at", ["in a stage", "at its end"])
def test_a_signal_while_images_are_drawn_ends_the_drawing_once_all_is_saved(
        toy_base, here, capsys, monkeypatch, at):
    sample_grid, predictions = train.Trainer.sample_grid, []

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        return sample_grid(self, *args)

    monkeypatch.setattr(train.Trainer, "sample_grid", interrupted)
    monkeypatch.setattr(ppdd, "cfg", lambda *_: predictions.append(1))
    monkeypatch.setattr(train.Trainer, "train_step", lambda self: (
        setattr(self, "update", self.update + 1),
        self.unread.append(torch.tensor([1., 1, 1, 0, self.signalled, 1]))))
    with pytest.raises(SystemExit) as stopped:
        train.main(flags(toy_base, "--updates", 4, "--halving-updates", 4, "--grid-every",
                         2 if at == "in a stage" else 100))
    assert stopped.value.code == 130 and not predictions and not list(RUN.glob("*.png"))
    name = "state-00-00000002" if at == "in a stage" else "state-01-00000000"
    assert checkpoints(here)[-1].stem == name
    assert f"{name}.safetensors; go on with: python train.py" in capsys.readouterr().err


def test_the_time_that_is_left_is_said_once(toy_base, here, capsys, monkeypatch):
    monkeypatch.setattr(train.Pace, "SECONDS", 0)
    run(toy_base, "--start-steps", 16, updates=5)
    printed = capsys.readouterr().out
    assert printed.count(" to go, ") == 1 and re.search(r"about \d+ s to go, [\d.e-]+ s", printed)


def test_the_loss_on_the_screen_is_fresh(toy_base, here, monkeypatch):
    shown = []
    monkeypatch.setattr(train.tqdm, "set_postfix", lambda self, **kw: shown.append(kw["loss"]))
    clock = itertools.count(2, step=2)
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    run(toy_base, "--end-steps", 64, updates=3)
    assert len(shown) == len(set(shown)) == 3


@pytest.mark.parametrize("captions, more", [(["", ""], ()), (["a", "a"], ("--uncond", "a"))])
def test_nothing_to_learn_is_a_sentence(toy_base, here, capsys, captions, more):
    write_images(here / "set", captions)
    sentence = refusal(capsys, flags(toy_base, "--data", "set", "--max-updates", 3, *more))
    assert "guidance changes nothing here" in sentence and not guides(here)
    assert ("--uncond itself" in sentence) == bool(more)


def test_the_help_is_grouped(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    headings = re.findall(r"(?m)^(\w+):$", printed)
    assert headings[-5:] == ["data", "guide", "training", "files", "machine"]


# ------------------------------------------------------------------------------- data


def base_like(size: str, device: str) -> SimpleNamespace:
    return SimpleNamespace(name="base", is_miniature=size == "mini", device=torch.device(device))


@pytest.mark.parametrize("size, device, batch, tiny_images, full_images, grids", [
    ("mini", "cpu", 32, 12_000, 6000, 1000), ("mini", "cuda", 1024, 40_000, 40_000, 1000),
    ("sd", "cpu", 32, 6000, 6000, 0), ("sd", "cuda", 32, 6000, 6000, 1000)])
def test_defaults_suit_the_device(size, device, batch, tiny_images, full_images, grids):
    base = base_like(size, device)
    for guide, images in (("tiny", tiny_images), ("full", full_images)):
        settings = train.resolve_defaults(train.Config(guide=guide), base)
        assert (settings.batch, settings.images, settings.grid_every) == (batch, images, grids)
        suits = train.DEFAULTS[size, guide, device]
        assert (settings.updates, settings.lr, settings.optimizer) == (
            suits.updates, suits.lr, suits.optimizer)
    trial = train.resolve_defaults(train.Config(max_updates=9, batch=2, grid_every=7), base)
    assert (trial.batch, trial.images, trial.grid_every, trial.updates) == (2, 80, 7, 9)
    with pytest.raises(BadInput, match=f"at most --batch {batch}"):
        train.resolve_defaults(train.Config(accumulate=2000), base)


def test_a_trial_draws_fewer_images_unless_it_says_how_many(toy_base, here):
    base = load_base(toy_base)
    for more, count in (((), 12_000), (("--max-updates", 3), 160), (("--max-updates", 3000), 160),
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
    first, again, other = (trainer.batches.draw(trainer.batches.generator(update))
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
    trainer.begin_stage()
    rollouts, steps = trainer.batches.rollouts, 4 if halving else 8
    if halving:
        teacher = randomised(lambda: ppdd.build_guide(TOY_UNET, trainer.guide_config))
        trainer.teacher.load_state_dict(teacher.state_dict())
    else:
        trainer.empty = trainer.base.embed(["a boat"])
    rollouts.refill(4, torch.Generator().manual_seed(7))
    z, c = rollouts.state["z"], trainer.data.prompt_states(rollouts.state["row"].tolist())
    for _ in range(steps):
        trainer.train_step()
    assert (rollouts.state["t"] == -1).all()
    with torch.no_grad():
        guided = ({"guide": trainer.teacher} if halving else
                  {"empty": trainer.empty.expand(4, -1, -1)})
        sampled = ppdd.sample(trainer.base.unet, z, c, 8.0, 8, **guided)
    assert (rollouts.state["z"] - sampled).abs().max() < 1e-3 * sampled.abs().max()
    trainer.train_step()                                                       # begun anew
    assert (rollouts.state["t"] < 999).all() and (rollouts.state["t"] >= 0).all()


def test_rollouts_of_one_batch_are_at_different_timesteps(toy_base, here):
    trainer = begin(toy_base, "--batch", 16, "--trajectories", 0.75)
    for _ in range(3):
        trainer.train_step()
    t = trainer.batches.rollouts.state["t"]
    assert len(t) == 12 and len(t.unique()) > 6


# ------------------------------------------------------------------------------- the update


def gradients(toy_base, *more):
    trainer = begin(toy_base, *more)
    trainer.optimizer.step = lambda: None
    trainer.train_step()
    trainer.folder.unlock()
    return torch.cat([p.grad.flatten() for p in trainer.guide.parameters()])


@pytest.mark.parametrize("more", [["--accumulate", 3], ["--checkpointing"]])
def test_parts_and_checkpointing_leave_the_gradient_as_it_is(toy_base, here, more):
    torch.testing.assert_close(gradients(toy_base, *more), gradients(toy_base), rtol=1e-4,
                               atol=1e-6)


def test_a_student_computes_its_blocks_again_with_the_weights_it_was_lent(toy_base, here):
    trainer = begin(toy_base, "--guide", "whole", "--checkpointing")
    student, plain = trainer.guide, build_guide(TOY_UNET, StudentConfig())
    plain.load_state_dict(student.state_dict())
    args = noise(2, 4, 8, 8).double(), torch.tensor([9, 800]), noise(2, 77, 32).double()
    blocks = [m for m in student.modules() if isinstance(m, Block)]
    assert {type(block) for block in blocks} == {train.Recomputed}
    for net in (student, plain):                        # in another dtype, as `run_guide` does it
        weights = {k: p.double() for k, p in net.named_parameters()}
        out = torch.func.functional_call(net, weights, (*args, torch.tensor([2.0, 8.0])))
        out.square().mean().backward()
    for (name, p), expected in zip(student.named_parameters(), plain.parameters()):
        assert torch.equal(p.grad, expected.grad), name
    assert student.out[2].weight.grad.any()


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
        trainer.train_step()
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

    first = begun.batches.generator(0).initial_seed()
    begun.save()                                          # what it began with outlives a kill
    begun.folder.unlock()
    again = begin(toy_base, "--resume")
    again.folder.unlock()
    checkpoints(here)[-1].unlink()
    assert again.init_info == init and again.batches.generator(0).initial_seed() == first

    fresh = begin(toy_base, "--run", "fresh").batches     # draws go on after the first two
    assert fresh.generator(2).initial_seed() == first != fresh.generator(0).initial_seed()
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
    init = ("--init", GUIDES / "tiny-gated.safetensors")
    for more in (init, (*init, "--guide", "full")):
        assert "other settings" in refusal(capsys, flags(toy_base, *more))
    run(toy_base, *init, "--form", "gated", "--end-steps", "32", updates=1)
    assert set(guides(here)) == {"tiny-gated", "tiny-gated-32"}


def test_an_unfinished_run_is_not_overwritten_nor_resumed_with_other_settings(toy_base, here,
                                                                              capsys):
    unfinished = begin(toy_base)
    unfinished.save()
    unfinished.folder.unlock()
    assert "--grid-every 0 --out guides --resume" in refusal(capsys, flags(toy_base))
    assert "begun with --seed 0: give" in refusal(capsys, flags(toy_base, "--resume", "--seed", 5))
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
    assert "postcards: give --images 20 as then" in sentence
    begin(toy_base, "--images", 20, "--max-updates", 300, "--resume").folder.unlock()


def test_a_run_goes_on_with_data_that_shrank_and_with_no_other(toy_base, here, capsys):
    write_images(here / "set", [f"caption {i}" for i in range(9)])
    write_images(here / "other", ["another"])
    half = ("--trajectories", "0.5", "--end-steps", "64", "--max-updates", "3")
    begun = begin(toy_base, "--data", "set", *half)
    begun.train_step()
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

    def break_update_2(self, *batch):
        result = distill(self, *batch)
        return replace(result, loss=result.loss * float("nan")) if self.update == 1 else result

    monkeypatch.setattr(train.Trainer, "distill", break_update_2)
    sentence = refusal(capsys, flags(toy_base))
    assert "update 2" in sentence and "--lr" in sentence.split("lower")[1]
    assert "before," not in sentence and "delete" not in sentence   # nothing usual, nothing older


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), 1e9])
def test_a_bad_update_is_not_made_and_its_sample_is_named(toy_base, here, monkeypatch, spoilt):
    trainer = begin(toy_base)
    for _ in range(12):
        trainer.train_step()
        trainer.read_metrics()
    before = {k: v.clone() for k, v in trainer.guide.state_dict().items()}
    distill = train.Trainer.distill

    def spoil(self, *batch):
        result = distill(self, *batch)
        error = torch.zeros_like(result.error)
        error[2] = spoilt
        return replace(result, loss=result.loss * spoilt, error=error)

    monkeypatch.setattr(train.Trainer, "distill", spoil)
    with pytest.raises(train.BadInput) as refused:
        trainer.train_step()
    sentence = str(refused.value)
    batches = trainer.batches
    batch = batches.draw(batches.generator(12))
    rows = batches.draw_rows(batches.generator(12)).tolist()
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
    (["--batch", "-1"], "--batch -1"), (["--accumulate", "5"], "at most --batch 4"),
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


# ------------------------------------------------------------------------------- what is promised


def seeded(seed: int, stage: int, update: int) -> torch.Generator:
    """Of all that chance decides in one update: each has a generator of its own."""
    return torch.Generator().manual_seed((seed * 31 + stage) * 1_000_003 + update)


@pytest.mark.parametrize("k, timesteps", [(0, range(1000)), (2, ppdd.step_grid(16)[:-1])],
                         ids=["stage one", "halving"])
def test_halving_draws_t_from_the_students_grid_and_stage_one_any(toy_base, here, k, timesteps):
    """Every sample has a row, two noises, a t and a g of its own, and these are their draws."""
    trainer = begin(toy_base, "--seed", 5, "--batch", 32, "--g-range", 3, 7)
    trainer.stage = k
    trainer.begin_stage()
    batches, generator = trainer.batches, seeded(5, k, 9)
    drawn = batches.draw(batches.generator(9))
    rows = torch.randint(16, (32,), generator=generator)
    assert torch.equal(batches.draw_rows(batches.generator(9)), rows)
    assert torch.equal(drawn.noise, torch.randn(2, 32, 4, 8, 8, generator=generator))
    assert torch.equal(drawn.g, 3 + 4 * torch.rand(32, generator=generator))
    t = torch.tensor(timesteps)[torch.randint(len(timesteps), (32,), generator=generator)]
    assert torch.equal(drawn.t, t)


def write_out(toy_base, updates: int) -> torch.nn.Module:
    """The guide that a run with --start-steps 4 --end-steps 2 makes, in a loop of its own."""
    base = load_base(toy_base)
    data, empty = Postcards(base, 16, seed=0), base.embed([""]).expand(4, -1, -1)
    torch.manual_seed(0)
    guide = ppdd.build_guide(TOY_UNET, GuideConfig())
    teacher = copy.deepcopy(guide)
    for stage, (steps, lr) in enumerate(((0, 5e-3), (2, 1e-3))):
        optimizer = torch.optim.AdamW(guide.parameters(), weight_decay=0.0)
        timesteps = ppdd.step_grid(2)[:-1] if steps else range(1000)
        for update in range(updates):
            draw = seeded(0, stage, update)
            rows = torch.randint(16, (4,), generator=draw)
            for_x, for_z = torch.randn(2, 4, 4, 8, 8, generator=draw)
            g = 2 + 7 * torch.rand(4, generator=draw)
            t = torch.tensor(timesteps)[torch.randint(len(timesteps), (4,), generator=draw)]
            mean, logvar = data.moments(rows).chunk(2, dim=1)
            x = base.vae.config.scale_factor * (mean + (logvar / 2).exp() * for_x)
            z, c = ppdd.add_noise(x, for_z, t), data.prompt_states(rows.tolist())
            optimizer.zero_grad()
            with math_attention("cpu"):
                if steps:
                    mid, end = t - 250, t - 500
                    loss = ppdd.halving(base.unet, guide, teacher, z, t, mid, end, c, g).loss
                else:
                    loss = ppdd.cfg_distillation(base.unet, guide, z, t, c, empty, g).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(guide.parameters(), 1.0)
            cosine = 0.5 + 0.5 * math.cos(math.pi * update / updates)
            optimizer.param_groups[0]["lr"] = lr * (0.05 + 0.95 * cosine)    # no warmup in so few
            optimizer.step()
        teacher.load_state_dict(guide.state_dict())
    return guide


def test_a_run_killed_within_a_halving_makes_the_guide_of_the_loop_written_out(toy_base, here):
    """Rows, noises, t, g, rates, Adam's moments and the teacher: all go on where they were."""
    steps = ("--start-steps", 4, "--end-steps", 2, "--max-updates", 2, "--optimizer", "adamw",
             "--lr", 5e-3, "--halving-lr", 1e-3)
    trainer = begin(toy_base, *steps)
    trainer.train_step()
    trainer.train_step()
    trainer.teacher.load_state_dict(trainer.guide.state_dict())
    trainer.stage, trainer.update = 1, 0
    trainer.begin_stage()
    trainer.train_step()
    trainer.save()
    trainer.folder.unlock()
    resumed = begin(toy_base, *steps, "--resume")
    resumed.train_step()
    for name, expected in write_out(toy_base, updates=2).state_dict().items():
        torch.testing.assert_close(resumed.guide.state_dict()[name], expected, rtol=1e-4, atol=1e-6)


def test_each_stage_is_taught_by_the_guide_of_the_stage_before_with_a_new_optimizer(
        toy_base, here, monkeypatch):
    trainer, seen = begin(toy_base, "--start-steps", 8, "--end-steps", 2), []

    def train_stage():
        seen.append((trainer.current_stage.steps, trainer.teacher.query[0, 0].item(),
                     len(trainer.optimizer.state)))
        for p in trainer.guide.parameters():
            p.grad = torch.zeros_like(p)
        trainer.optimizer.step()
        torch.nn.init.constant_(trainer.guide.query, len(seen))

    monkeypatch.setattr(trainer, "train_stage", train_stage)
    trainer.train()
    assert seen[0][0] == 0 and seen[1:] == [(4, 1, 0), (2, 2, 0)]


def test_each_stage_has_its_own_updates_and_rate_warms_up_and_falls_as_a_cosine(toy_base, here):
    trainer = begin(toy_base, "--updates", 400, "--halving-updates", 200, "--lr", 0.01,
                    "--halving-lr", 0.002, "--start-steps", 8, "--end-steps", 4,
                    "--optimizer", "adamw")
    assert trainer.stages == [train.Stage(0, 400, 0.01), train.Stage(4, 200, 0.002)]
    group, = trainer.optimizer.param_groups
    assert type(trainer.optimizer) is torch.optim.AdamW and group["weight_decay"] == 0
    for stage, update, lr in ((0, 0, 0.01 / 50), (0, 100, 0.00860876), (0, 200, 0.00525),
                              (0, 400, 0.0005), (1, 0, 0.002 / 40), (1, 49, 0.002 * 0.86611),
                              (1, 100, 0.00105)):
        trainer.stage, trainer.update = stage, update
        trainer.set_lr()
        assert group["lr"] == pytest.approx(lr, rel=1e-4)


def test_a_gradient_keeps_its_direction_and_is_clipped_to_the_norm(toy_base, here):
    whole, clipped = (gradients(toy_base, "--grad-clip", norm) for norm in (1e6, 1e-3))
    assert whole.norm() > 1e-2
    torch.testing.assert_close(clipped, whole * 1e-3 / whole.norm(), rtol=1e-3, atol=1e-9)


def test_the_loss_is_plain_or_weighed_by_the_root_of_truncated_snr(toy_base, here):
    trainer, t = begin(toy_base, "--start-steps", 8, "--end-steps", 4), torch.tensor([999, 249])
    batch = noise(2, 4, 8, 8), t, trainer.data.prompt_states([0, 1]), torch.tensor([2.0, 8.0])
    ratio = torch.tensor([s / a for a, s in map(ppdd.alpha_sigma, t.tolist())]).clamp(min=1)
    for trainer.stage in (0, 1):
        for loss, weight in (("eps", torch.ones(2)), ("root-snr", ratio)):
            trainer.config = replace(trainer.config, loss=loss)
            result = trainer.distill(*batch)
            expected = (weight * result.error).mean().item()
            assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert ratio[0] > ratio[1] == 1


def test_a_full_guide_in_training_starts_from_the_bases_encoder(toy_base, here):
    trainer = begin(toy_base, "--guide", "full")
    for name, weight in trainer.base.unet.input_blocks.state_dict().items():
        assert torch.equal(trainer.guide.input_blocks.state_dict()[name], weight)


def test_copies_of_the_base_start_from_weights_that_no_dtype_has_rounded(toy_base, here):
    trainer, base = begin(toy_base, "--guide", "whole", "--dtype", "bf16"), load_base(toy_base)
    assert trainer.base.unet.dtype == torch.bfloat16 == trainer.teacher.dtype
    own = trainer.guide.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in base.unet.state_dict().items())


def test_the_log_has_means_over_the_updates_since_its_last_line(toy_base, here, monkeypatch):
    trainer = begin(toy_base, "--updates", 120, "--end-steps", 64)

    def train_step():
        trainer.update += 1
        loss = float(trainer.update)
        trainer.unread.append(torch.tensor([loss, 1, 4, 0, 0, 2 * loss], dtype=torch.float64))

    monkeypatch.setattr(trainer, "train_step", train_step)
    trainer.train_stage()
    assert [(e["update"], e["loss"], e["unexplained"], e["norm"])
            for e in log_entries(RUN / "log.jsonl")] == [
        (50, 25.5, 0.25, 51), (100, 75.5, 0.25, 151), (120, 110.5, 0.25, 221)]


def test_a_small_share_of_rollouts_is_at_least_one_sample(toy_base, here):
    batches = begin(toy_base, "--trajectories", 0.1).batches
    assert (batches.noised, batches.config.batch) == (3, 4)
