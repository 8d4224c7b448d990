"""The miniature can be made again from nothing, and a stage goes on where it was stopped."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from mini import postcards
from mini import train as maker
from mini.judge import load_judge
from support.base import MINI, load_base
from vae import VAE, VAEConfig

SHORT = maker.Config(images=64, captions=1, vae_updates=2, clip_updates=2, clip_batch=16,
                     judge_updates=2, judge_batch=8, unet_updates=2, unet_batch=4,
                     style_updates=2, style_images=8, device="cpu")


def tensors_in(folder):
    """All tensors of a folder's files, by file and name."""
    return {(path, k): tensor for path in folder.rglob("*.safetensors")
            for k, tensor in load_file(path).items()}


@pytest.mark.full
def test_every_stage_from_nothing_and_none_twice(tmp_path, monkeypatch):
    config = replace(SHORT, out=str(tmp_path / "mini"), work=str(tmp_path / "work"))
    maker.run(config)
    made = tensors_in(tmp_path / "mini")
    bundled = load_base(MINI)
    names = ["mini", *(f"styles/{style}" for style in postcards.STYLES[1:])]
    bases = [load_base(tmp_path / "mini" / f"{name}.safetensors") for name in names]
    for base in bases:
        for part in ("unet", "vae", "text"):
            ours, theirs = getattr(base, part), getattr(bundled, part)
            assert part == "vae" or ours.config == theirs.config       # its scale is measured
            assert ours.state_dict().keys() == theirs.state_dict().keys()
            same = [torch.equal(p, q) for p, q in zip(ours.parameters(),
                                                      getattr(bases[0], part).parameters())]
            assert all(same) == (base is bases[0] or part != "unet")   # styles tune the UNet alone
    load_judge(tmp_path / "mini" / "judge.safetensors")
    logs = json.loads((tmp_path / "mini" / "training.json").read_text())
    assert logs.keys() == {"settings", "vae", "clip", "judge", "unet", *postcards.STYLES[1:]}
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("it trains again"))
    maker.run(config)
    again = tensors_in(tmp_path / "mini")
    assert len(made) > 1000 and made.keys() == again.keys()
    assert all(torch.equal(tensor, again[k]) for k, tensor in made.items())
    assert logs == json.loads((tmp_path / "mini" / "training.json").read_text())


def test_a_stage_goes_on_bit_for_bit_with_what_it_was_made_from(tmp_path):
    def weights(work, stop=None, made_from=()):
        """A linear layer after 250 updates; cut off at call `stop`, where there is one."""
        torch.manual_seed(3)
        net, calls = nn.Linear(4, 4), []

        def loss(generator):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=generator)
            return F.mse_loss(net(x) + .1 * torch.randn(8, 4), x.flip(1))

        config = replace(SHORT, work=str(work), save_every=0, dtype="fp32")
        work.mkdir(exist_ok=True)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                maker.Stage(config, "net", net, loss, 250, 1e-2, made_from).train()
            return None
        maker.Stage(config, "net", net, loss, 250, 1e-2, made_from).train()
        return net.state_dict(), len(calls)

    whole, updates = weights(tmp_path / "whole")
    weights(tmp_path / "cut", stop=180)
    rest, more = weights(tmp_path / "cut")
    assert updates == 250 and more == 150                  # from the checkpoint after update 100
    assert all(torch.equal(whole[k], rest[k]) for k in whole)
    assert weights(tmp_path / "cut", made_from=(nn.Linear(2, 2),))[1] == 250


def test_a_share_of_the_captions_is_of_other_images_and_a_tenth_is_empty():
    captions = maker.Captions.__new__(maker.Captions)
    captions.radix = torch.tensor([len(values) for values in postcards.ATTRIBUTES.values()])
    captions.each = 2
    total = 2 * int(captions.radix.prod())
    captions.states = torch.arange(total).view(-1, 1, 1)               # a state says which it is
    captions.empty = torch.full((1, 1, 1), -1)
    generator = torch.Generator().manual_seed(0)
    attributes = postcards.sample_attributes(4000, generator)
    drawn = captions.draw(attributes, .3, generator).flatten().long()
    right = drawn // 2 == captions.index(attributes)
    assert abs((drawn < 0).float().mean() - .1) < .02
    assert abs((right & (drawn >= 0)).float().mean() - .7 * .9) < .03
    assert all(torch.equal(captions.attributes_of(int(k)), a)
               for k, a in zip(captions.index(attributes[:50]), attributes))


@pytest.mark.parametrize("line", ["--dtype fp8", "--styles-only --out nowhere", "--vae-batch 0"])
def test_bad_input_is_a_sentence(line, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        maker.main(["--work", str(tmp_path), *line.split()])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and line.split()[-1] in message
    assert message.startswith("mini/train.py: ") and message.count("\n") == 1


@pytest.mark.full
@pytest.mark.parametrize("script", ["train", "check", "tune", "postcards"])
def test_scripts_start_from_any_folder(script, tmp_path):
    path = Path(maker.__file__).with_name(f"{script}.py")
    argument = "sheet.png" if script == "postcards" else "--help"
    subprocess.run([sys.executable, path, argument], cwd=tmp_path, check=True, capture_output=True)
    assert script != "postcards" or (tmp_path / "sheet.png").exists()


def test_the_scale_factor_brings_latents_to_unit_variance():
    vae, generator = VAE(VAEConfig(ch=8, ch_mult=(1,), norm_groups=8)), torch.Generator()
    noise = torch.randn(2, 9, 4, 32, 32, generator=generator.manual_seed(0))
    moments = torch.cat([5 + 2 * noise[0], torch.full_like(noise[0], math.log(9))], dim=1)
    maker.set_scale(vae, moments)
    assert vae.sample(moments, noise[1]).std().item() == pytest.approx(1, abs=0.02)


def test_a_stage_keeps_the_running_mean_of_its_weights(tmp_path):
    """Of so few updates it is of the last ones above all."""
    net = nn.Linear(1, 1, bias=False)
    stage = maker.Stage(replace(SHORT, work=str(tmp_path), dtype="fp32"), "net", net,
                        lambda generator: (net.weight - 5).square().sum(), 9, 1.0, (), warmup=1)
    mean = first = net.weight.item()
    for k in range(3):
        stage.update(k)
        mean += 9 / (11 + k) * (net.weight.item() - mean)
    assert stage.average["weight"].item() == pytest.approx(mean)
    assert first + 1 < mean < net.weight.item() - 0.1
