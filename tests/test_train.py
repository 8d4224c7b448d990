"""What train.py promises: the base stays as it is, a killed run goes on exactly."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import randomised
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import ppdd
import train
from clip_text import TextConfig, TextEncoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

UNET = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention=(True, True),
                  num_heads=4, context_dim=32, norm_groups=8)
PARTS = {
    "model.diffusion_model.": (UNet, UNET, "unet_config"),
    "first_stage_model.": (VAE, VAEConfig(ch=16, ch_mult=(1, 2, 2, 2), num_res_blocks=1,
                                          norm_groups=8), "vae_config"),
    "cond_stage_model.transformer.text_model.": (
        TextEncoder, TextConfig(width=32, layers=2, heads=4), "text_config"),
}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random base in the official single-file layout."""
    path, tensors, metadata = tmp_path_factory.mktemp("base") / "toy.safetensors", {}, {}
    for prefix, (build, config, key) in PARTS.items():
        module = randomised(lambda build=build, config=config: build(config))
        tensors |= {prefix + k: v for k, v in module.state_dict().items()}
        metadata[key] = json.dumps(asdict(config))
    ppdd.save_tensors(path, tensors, metadata)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(base, *more, updates=3):
    train.main(["--weights", str(base), "--batch", "4", "--pictures", "40", "--max-updates",
                str(updates), "--grid-every", "0", "--save-every", "2", "--device", "cpu", *more])


def states(here):
    return sorted((here / "runs/toy/tiny").glob("state-*.safetensors"))


def guides(here):
    return {p.stem: load_file(p) for p in sorted(here.glob("guides/toy/*.safetensors"))}


@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_one_command_leaves_a_guide_for_every_stage(base, here, kind):
    before = ppdd.fingerprint(base)
    run(base, "--guide", kind)
    assert set(guides(here)) == {kind, f"{kind}-32", f"{kind}-16", f"{kind}-8"}
    assert ppdd.fingerprint(base) == before
    for name, steps in ((kind, 0), (f"{kind}-8", 8)):
        config, about = ppdd.read_about(here / f"guides/toy/{name}.safetensors")
        assert config.kind == kind and about["steps"] == steps and about["base"] == "toy"
        assert about["base_hash"] == before and about["g_range"] == [2.0, 9.0]
        guide = ppdd.load_guide(here / f"guides/toy/{name}.safetensors", UNET)
        assert any(p.any() for n, p in guide.named_parameters() if "z3" in n or "zero" in n)


def test_training_logs_loss_and_unexplained_share_and_draws_pictures(base, here):
    run(base, "--grid-every", "2")
    entries = [json.loads(line) for line in (here / "runs/toy/tiny/log.jsonl").open()]
    assert [e["steps"] for e in entries] == [0, 32, 16, 8]
    assert all(e["loss"] > 0 and e["unexplained"] > 0 for e in entries)
    pictures = sorted((here / "runs/toy/tiny").glob("*.png"))
    assert len(pictures) == 8 and Image.open(pictures[0]).size == (256, 128)
    assert not states(here)


@pytest.mark.parametrize("after, more", [
    (1, ()), (4, ("--grid-every", "2")), (6, ("--optimizer", "muon")), (9, ()),
    (5, ("--trajectories", "0.5", "--ema", "0.9"))])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(base, here, monkeypatch, after,
                                                               more):
    run(base, "--out", "whole", "--run", "whole-run", *more)
    step, count = train.Run.step, 0

    def dies(self, stage):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return step(self, stage)

    monkeypatch.setattr(train.Run, "step", dies)
    with pytest.raises(SystemExit):
        run(base, *more)
    monkeypatch.setattr(train.Run, "step", step)
    state = bool(states(here))
    run(base, *["--resume"] * state, *more)
    assert state == (after >= 2)
    for name, tensors in guides(here).items():
        whole = load_file(here / f"whole/toy/{name}.safetensors")
        assert all(torch.equal(tensors[k], whole[k]) for k in whole)
    logs = [[{k: v for k, v in json.loads(line).items() if k != "time"} for line in path.open()]
            for path in (here / "runs/toy/tiny/log.jsonl", here / "whole-run/log.jsonl")]
    assert logs[0] == logs[1]


def test_a_run_goes_on_where_its_folder_was_moved_to(base, here):
    train.prepare(train.parse(["--weights", str(base), "--pictures", "40", "--run", "a", "--device",
                               "cpu"])).save()
    Path("a").rename("b")
    again = train.prepare(train.parse(["--weights", str(base), "--pictures", "40", "--resume",
                                       "--run", f"{here}/b/", "--device", "cpu"]))
    assert again.folder.samefile("b")


def test_an_optimisers_state_comes_back_as_its_weights_are_laid_out():
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    states = []
    for optimizer in (torch.optim.AdamW(layer.parameters()), torch.optim.AdamW(layer.parameters())):
        if states:
            ppdd.load_optimizer(optimizer, {k: v.contiguous() for k, v in states[0].items()})
        else:
            layer(torch.randn(2, 4, 8, 8)).sum().backward()
            optimizer.step()
        states.append(ppdd.optimizer_tensors(optimizer))
    assert all(torch.equal(states[1][k], v) for k, v in states[0].items())
    moment = optimizer.state[layer.weight]["exp_avg"]
    assert moment.stride() == layer.weight.stride() != moment.contiguous().stride()


def test_an_unfinished_run_is_not_overwritten_nor_resumed_with_other_settings(base, here, capsys):
    config = train.parse(["--weights", str(base), "--max-updates", "2", "--batch", "4"])
    unfinished = train.prepare(replace(config, pictures=40))
    unfinished.save()
    unfinished.held.close()
    for more, word in ((["--pictures", "40"], "--resume"), (["--resume", "--seed", "5"], "seed")):
        with pytest.raises(SystemExit) as stopped:
            run(base, *more, updates=2)
        assert stopped.value.code == 2 and word in capsys.readouterr().err
    assert states(here)


def test_a_resume_refuses_other_postcards(base, here, capsys):
    argv = ["--weights", str(base), "--batch", "4", "--pictures", "200", "--device", "cpu"]
    unfinished = train.prepare(train.parse([*argv, "--max-updates", "2"]))
    unfinished.save()
    unfinished.held.close()
    with pytest.raises(SystemExit) as stopped:
        train.main([*argv, "--pictures", "100", "--resume"])
    assert stopped.value.code == 2 and "postcards 200 0): give --pict" in capsys.readouterr().err
    train.prepare(train.parse([*argv, "--max-updates", "300", "--resume"])).held.close()


def test_the_guide_before_is_kept_aside_and_so_is_its_log(base, here, capsys):
    for seed in "12":
        run(base, "--end-steps", "64", "--seed", seed, updates=2)
        assert ("the one before it is tiny.safetensors.old" in capsys.readouterr().out) == (
            seed == "2")
    paths = [here / "guides/toy/tiny.safetensors", here / "guides/toy/tiny.safetensors.old"]
    assert [ppdd.read_about(path)[1]["seed"] for path in paths] == [2, 1]
    again = ("--end-steps", "64", "--seed", "2")           # its own, saved once more after a kill
    run(base, *again, updates=2)
    assert [ppdd.read_about(path)[1]["seed"] for path in paths] == [2, 1]
    logs = [(here / "runs/toy/tiny" / name).read_text() for name in ("log.jsonl", "log.old.jsonl")]
    assert all(logs) and logs[0] != logs[1]


def test_a_trial_draws_fewer_pictures_unless_told_how_many(base):
    loaded = ppdd.load_base(base)
    for flags, count in (("", 6000), ("--max-updates 3", 160), ("--max-updates 3000", 160),
                         ("--max-updates 3 --pictures 200", 200), ("--pictures 9000", 9000)):
        config = train.parse(["--batch", "4", *flags.split()])
        assert train.complete(config, loaded).pictures == count


@pytest.mark.parametrize("error", [MemoryError(), ImportError("no clip"), RuntimeError(
    "DefaultCPUAllocator: can't allocate memory")])
def test_no_memory_or_no_package_is_a_sentence(base, here, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(train.Run, "train", fail)
    with pytest.raises(SystemExit) as stopped:
        run(base)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("train.py: ") and ("no clip" in said or "lower --batch" in said)


def test_stage_one_goes_further_from_a_guide(base, here, capsys):
    run(base, "--end-steps", "64", updates=2)
    before, argv = guides(here)["tiny"], ("--init", "guides/toy/tiny.safetensors", "--further")
    begun = train.prepare(train.parse(["--weights", str(base), "--pictures", "40", "--device",
                                       "cpu", *argv]))
    weights = begun.guide.state_dict()
    assert begun.stage == begun.update == 0
    assert all(torch.equal(tensor, before[name].float()) for name, tensor in weights.items())
    first, sha256 = begun.generator(0, 0).initial_seed(), ppdd.fingerprint(Path(argv[1]))
    begun.save()                                          # what it began with outlives a kill
    begun.held.close()
    again = train.prepare(train.parse(["--weights", str(base), "--pictures", "40", "--device",
                                       "cpu", "--resume"]))
    again.held.close()
    states(here)[-1].unlink()
    assert again.origin == begun.origin == {"sha256": sha256, "steps": 0, "updates": 2}
    assert first == again.generator(0, 0).initial_seed()
    begun.origin = {}
    assert first == begun.generator(0, 2).initial_seed() != begun.generator(0, 0).initial_seed()
    run(base, "--end-steps", "32", *argv, updates=3)      # draws go on after the first two
    _, about = ppdd.read_about(Path("guides/toy/tiny.safetensors"))
    assert about["updates"] == 5 and about["init"]["sha256"] == sha256
    _, about = ppdd.read_about(Path("guides/toy/tiny-32.safetensors"))
    assert about["updates"] == 3
    halved = ["--init", "guides/toy/tiny-32.safetensors"]
    for flags, said in ((["--further"], "--init"), (["--further", *halved], "halved to 32 steps"),
                        (halved, "--start-steps 32"),
                        ([*halved, "--end-steps", "64"], "nothing is left to train")):
        with pytest.raises(SystemExit) as stopped:
            run(base, *flags)
        assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_a_tilde_is_the_home_folder_in_every_place(base, here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    run(base, "--run", "~/run", "--out", "~/out", "--end-steps", "64", updates=1)
    run(base, "--init", "~/out/toy/tiny.safetensors", "--start-steps", "16", updates=1)
    assert (here / "home/run/log.jsonl").exists() and not (here / "~").exists()
    assert (here / "home/out/toy/tiny.safetensors").exists()
    assert set(guides(here)) == {"tiny-8"}


def test_a_fixed_g_goes_into_the_name_and_a_negative_prompt_into_the_target(base, here):
    run(base, "--g-range", "8", "8", "--end-steps", "32", updates=2)
    plain = guides(here)
    assert set(plain) == {"tiny-g8", "tiny-32-g8"}
    run(base, "--g-range", "8", "8", "--end-steps", "32", "--uncond", "blurry", updates=2)
    other = guides(here)
    changed = (guide["tiny-g8"]["theta_z3.0.weight"] for guide in (plain, other))
    assert not torch.equal(*changed)


def test_no_picture_is_drawn_twice_for_a_seed_and_g_stays_in_its_range(base, here):
    run_ = train.prepare(train.parse(["--weights", str(base), "--pictures", "40", "--batch", "16"]))
    first, again, other = (run_.draw(run_.stages[0], run_.generator(0, seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])
    _, t, g = first
    assert len(t.unique()) > 12 and len(g.unique()) == 16 and 2 <= g.min() and g.max() <= 9


@pytest.mark.parametrize("halving", [False, True])
def test_trajectories_are_the_teachers_own_sampling(base, here, halving):
    run_ = train.prepare(train.parse([
        "--weights", str(base), "--pictures", "40", "--batch", "4", "--trajectories", "1",
        "--start-steps", "8", "--end-steps", "4", "--g-range", "8", "8"]))
    run_.stage, run_.update, steps = int(halving), 1, 4 if halving else 8
    if halving:
        fresh = randomised(lambda: ppdd.build_guide(UNET, run_.guide_config))
        run_.teacher.load_state_dict(fresh.state_dict())
    else:
        run_.empty = run_.base.embed(["a boat"])
    stage = run_.stages[run_.stage]
    run_.on_the_way(4, torch.Generator().manual_seed(7))
    z, c = run_.walk["z"], run_.data.prompts(run_.walk["row"].tolist())
    for _ in range(steps):
        run_.step(stage)
    assert (run_.walk["t"] == -1).all()
    empty = run_.empty.expand(4, -1, -1)
    with torch.no_grad():
        whole = ppdd.sample(run_.base.unet, z, c, 8.0, 8, run_.teacher if halving else None,
                            None if halving else empty)
    assert (run_.walk["z"] - whole).abs().max() < 1e-3 * whole.abs().max()
    run_.step(stage)
    assert (run_.walk["t"] < 999).all() and (run_.walk["t"] >= 0).all()           # begun anew


def test_trajectories_of_one_batch_do_not_walk_abreast(base, here):
    run_ = train.prepare(train.parse(["--weights", str(base), "--pictures", "40", "--batch", "16",
                                      "--trajectories", "0.75"]))
    for _ in range(3):
        run_.step(run_.stages[0])
    assert len(run_.walk["t"]) == 12 and len(run_.walk["t"].unique()) > 6


def test_a_guide_of_other_settings_or_another_base_is_not_gone_on_with(base, here, capsys):
    run(base, "--end-steps", "64", "--pool", "mean", updates=2)
    for more, word in ((["--init", "guides/toy/tiny.safetensors"], "other settings"),
                       (["--init", "guides/toy/tiny.safetensors", "--guide", "full"], "other")):
        with pytest.raises(SystemExit) as stopped:
            run(base, *more)
        assert stopped.value.code == 2 and word in capsys.readouterr().err
    run(base, "--init", "guides/toy/tiny.safetensors", "--pool", "mean", "--ema", "0.9", updates=2)
    assert set(guides(here)) == {"tiny", "tiny-32", "tiny-16", "tiny-8"}
    unfinished = train.prepare(train.parse(["--weights", str(base), "--pictures", "40"]))
    unfinished.base_hash = "of another file"
    unfinished.save()
    unfinished.held.close()
    with pytest.raises(SystemExit) as stopped:
        train.main(["--weights", str(base), "--pictures", "40", "--resume"])
    assert stopped.value.code == 2 and "another base" in capsys.readouterr().err
    states(here)[-1].write_bytes(b"half a file")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--weights", str(base), "--pictures", "40", "--resume"])
    assert stopped.value.code == 2 and "damaged" in capsys.readouterr().err


def test_a_list_of_prompts_trains_the_guide_without_pictures(base, here):
    (here / "prompts.txt").write_bytes("\ufeffa boat\r\n\r\na house, été\n".encode())
    run(base, "--data", "prompts.txt", "--size", "64", "--end-steps", "32", updates=2)
    assert set(guides(here)) == {"tiny", "tiny-32"}
    _, about = ppdd.read_about(here / "guides/toy/tiny.safetensors")
    assert about["settings"]["trajectories"] == 1.0


def test_the_guide_kept_is_the_running_mean_of_its_weights(base, here):
    run_ = train.prepare(train.parse(["--weights", str(base), "--pictures", "40", "--batch", "4",
                                      "--max-updates", "3", "--ema", "0.5", "--end-steps", "64"]))
    mean, weights = torch.zeros_like(run_.guide.theta_z3[0].weight), []
    for update in range(3):
        run_.step(run_.stages[0])
        weights.append(run_.guide.theta_z3[0].weight.detach().clone())
        keep = min(0.5, (update + 1) / (update + 11))
        mean = keep * mean + (1 - keep) * weights[-1]
    torch.testing.assert_close(run_.average.theta_z3[0].weight, mean)
    assert not any(p.requires_grad for p in run_.average.parameters())
    run_.train()
    saved = guides(here)["tiny"]["theta_z3.0.weight"].float()
    torch.testing.assert_close(saved, mean, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(saved, weights[-1], rtol=1e-3)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_muon_moves_a_matrix_by_nearly_orthogonal_steps(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(train.orthogonal(m), full_matrices=False)
    assert s.min() > 0.5 and s.max() < 1.3
    a, _, b = torch.linalg.svd(m, full_matrices=False)
    assert torch.trace((a @ b).T @ train.orthogonal(m)) > 0.8 * min(shape)


def test_muon_moves_a_matrix_along_its_momentum_by_the_size_it_says():
    weight = torch.nn.Parameter(torch.zeros(6, 5, 2, 2))
    optimizer, momentum = train.Muon([weight], lr=0.01, weight_decay=0.0), torch.zeros(6, 20)
    for k in range(3):
        grad = torch.randn(6, 20, generator=torch.Generator().manual_seed(k))
        before, weight.grad = weight.detach().clone(), grad.view_as(weight).clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * grad
        ahead = 0.05 * grad + 0.95 * momentum
        moved = 0.01 * 0.2 * 20**0.5 * train.orthogonal(ahead)
        torch.testing.assert_close((before - weight.detach()).view(6, 20), moved)


def test_muon_takes_vectors_as_adamw_does():
    ends = []
    for kind in (train.Muon, torch.optim.AdamW):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimizer = kind(layer.parameters(), lr=0.01, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            (layer.bias - 1).square().sum().backward()
            optimizer.step()
        ends.append(layer.bias.detach())
    assert torch.equal(*ends)


def test_a_folder_of_captioned_pictures_trains_the_guide(base, here):
    folder = here / "data" / "deeper"
    folder.mkdir(parents=True)
    for i, (mode, size) in enumerate((("RGB", (90, 70)), ("L", (64, 200)), ("RGBA", (64, 64)))):
        Image.new(mode, size, 40 * i if mode == "L" else None).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}\n", encoding="utf-8")
    Image.new("RGB", (64, 64)).save(folder / "no-caption.png")
    run(base, "--data", "data", "--size", "64", "--end-steps", "64", updates=2)
    assert set(guides(here)) == {"tiny"}
    data = train.Pictures(ppdd.load_base(base), ["data"], 64)
    rows, pictures = data.load([0, 1, 2])
    moments, c = data.moments(pictures), data.prompts(rows)
    assert len(data) == 3 and moments.shape == (3, 8, 8, 8) and c.shape == (3, 77, 32)


def test_a_loss_that_is_not_finite_stops_and_says_what_to_try(base, here, monkeypatch, capsys):
    distill = train.Run.distill

    def broken(self, stage, *latents):
        result = distill(self, stage, *latents)
        return replace(result, loss=result.loss * float("nan")) if self.update == 1 else result

    monkeypatch.setattr(train.Run, "distill", broken)
    with pytest.raises(SystemExit) as stopped:
        run(base)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "update 2" in said and "--lr" in said.split("lower")[1]
    assert "before," not in said and "delete" not in said           # nothing usual, nothing older


@pytest.mark.parametrize("more, word", [
    (["--g-range", "9", "2"], "g-range"), (["--g-range", "nan", "nan"], "g-range"),
    (["--batch", "0"], "batch"), (["--size", "100"], "size"), (["--updates", "-1"], "negative"),
    (["--save-every", "0"], "save-every"), (["--lr", "nan"], "rate"), (["--clip", "0"], "clip"),
    (["--trajectories", "1.5"], "trajectories"), (["--ema", "1"], "ema"),
    (["--start-steps", "60"], "power of two"), (["--end-steps", "0"], "power of two"),
    (["--guide", "huge"], "invalid choice"), (["--data", "nowhere"], "does not exist"),
    (["--resume"], "no unfinished run"), (["--weights", "nowhere.safetensors"], "does not exist"),
    (["--init", "nowhere.safetensors"], "does not exist"), (["--seed", "-1"], "seed"),
    (["--device", "cuda:a"], "device"), (["--device", "cuda:9"], "no such CUDA device"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(base, here, capsys, more, word):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--weights", str(base), "--device", "cpu", "--pictures", "8", *more])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and word in said and "Traceback" not in said
    assert not (here / "guides").exists()


@pytest.mark.parametrize("zero", [True, False])
def test_a_tiny_guide_that_is_zero_throughout_never_gets_wider_than_one_channel(base, here, zero):
    config = train.parse(["--weights", str(base), "--pictures", "40", "--batch", "4", "--pool",
                          "mean", "--save-every", "100"])
    run_ = train.prepare(config)
    if zero:
        for layer in (run_.guide.theta_z1, run_.guide.theta_z2):
            torch.nn.init.zeros_(layer.weight)
    for _ in range(5):
        run_.step(run_.stages[0])
    channels = run_.guide.theta_z3[0].weight.T                                 # one row a channel
    assert run_.guide.theta_z3[0].weight.any()
    assert (channels - channels[0]).abs().max().item() < 1e-9 or not zero
    assert zero or (channels - channels[0]).abs().max() > 1e-4


def test_a_guide_is_trained_on_a_base_with_a_lora(base, here, capsys):
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    ppdd.save_tensors(here / "style.safetensors", {f"{layer}.lora_A.weight": torch.ones(2, 32),
                                                   f"{layer}.lora_B.weight": torch.ones(32, 2)})
    run(base, "--lora", "style.safetensors:0.5", "--end-steps", "64", updates=1)
    assert "LoRA: style.safetensors, merged at 0.5" in capsys.readouterr().out
    _, about = ppdd.read_about(here / "guides/toy+style/tiny.safetensors")
    assert about["base"] == "toy+style" and about["base_hash"] != ppdd.fingerprint(base)
