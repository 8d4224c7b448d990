"""The miniature can be made again from nothing, and a stage goes on where it was stopped."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import ppdd
from mini import postcards
from mini import train as maker
from mini.judge import load_judge

SHORT = maker.Config(pictures=64, captions=1, vae_updates=2, decoder_updates=2, clip_updates=2,
                     clip_batch=16, judge_updates=2, judge_batch=8, unet_updates=2, unet_batch=4,
                     style_updates=2, style_pictures=8, device="cpu")


def tensors_in(folder):
    """All tensors of a folder's files, by file and name."""
    return {(path, k): tensor for path in folder.rglob("*.safetensors")
            for k, tensor in load_file(path).items()}


def test_every_stage_from_nothing_and_none_twice(tmp_path, monkeypatch):
    config = replace(SHORT, out=str(tmp_path / "mini"), work=str(tmp_path / "work"))
    maker.run(config)
    made = tensors_in(tmp_path / "mini")
    bundled = ppdd.load_base(ppdd.MINI)
    names = ["mini", *(f"styles/{style}" for style in postcards.STYLES[1:])]
    bases = [ppdd.load_base(tmp_path / "mini" / f"{name}.safetensors") for name in names]
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
    assert logs.keys() == {"settings", "vae", "decoder", "clip", "judge", "unet",
                           *postcards.STYLES[1:]}
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

        config = replace(SHORT, work=str(work), save_every=0, bf16=False)
        work.mkdir(exist_ok=True)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                maker.fit(config, "net", net, loss, 250, 1e-2, made_from)
            return None
        maker.fit(config, "net", net, loss, 250, 1e-2, made_from)
        return net.state_dict(), len(calls)

    whole, updates = weights(tmp_path / "whole")
    weights(tmp_path / "cut", stop=180)
    rest, more = weights(tmp_path / "cut")
    assert updates == 250 and more == 150                  # from the checkpoint after update 100
    assert all(torch.equal(whole[k], rest[k]) for k in whole)
    assert weights(tmp_path / "cut", made_from=(nn.Linear(2, 2),))[1] == 250


@pytest.mark.parametrize("line", ["--until vea", "--styles-only --out nowhere"])
def test_bad_input_is_a_sentence(line, tmp_path):
    told = subprocess.run([sys.executable, maker.__file__, "--work", str(tmp_path), *line.split()],
                          capture_output=True, text=True)
    assert told.returncode == 2 and line.split()[-1] in told.stderr
    assert "Traceback" not in told.stderr
