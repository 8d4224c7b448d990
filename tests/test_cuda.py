"""What holds on a GPU: recorded steps and updates equal those that are not recorded.

`python -m pytest tests/test_cuda.py` takes under two minutes there. Without a GPU the tests of
recording run with a stand-in for CUDA graphs that calls the function again, and the others are
skipped.
"""

import threading

import pytest
import torch
from conftest import TOY_UNET, disagreement, noise, randomised
from PIL import Image
from safetensors.torch import load_file
from torch.utils._pytree import tree_map

import ppdd
import sample
import train
from ppdd import GuideConfig, build_guide
from support import base as base_module
from support import capture, fast
from support.base import MINI, load_base
from support.cli import parse
from support.guides import BUNDLED, load_guide
from support.muon import Muon
from unet import UNet

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WAYS = ("none", "cfg", "tiny", "seeing", "full")


def fake_recording(call, warm_up=True):
    """In place of a CUDA graph: results lie at one place, and a replay computes them anew."""
    outputs = tree_map(torch.clone, call())

    def replay():
        tree_map(lambda place, new: place.copy_(new), outputs, call())
        return None

    return replay, outputs


def fake_update(call, warm_up=True):
    """As `fake_recording`, for a call that changes something: recording does not run it."""
    outputs = []

    def replay():
        outputs[:] = call()

    return replay, outputs


@pytest.fixture
def recordings(monkeypatch):
    """The stand-in everywhere, on whatever device; returns what was recorded."""
    made = []

    def record(*args):
        made.append(args)
        return fake_recording(*args)

    monkeypatch.setattr(capture, "record_graph", record)
    monkeypatch.setattr(capture, "on_side_stream", lambda call: call())
    return made


# ------------------------------------------------------------------------------- sampling


def arguments(way, unet, device="cpu", dtype=torch.float32):
    """What makes the ways to sample: no guidance, CFG, and a guide of each kind."""
    if way == "cfg":
        return {"empty": noise(1, 77, 32, seed=3).expand(3, -1, -1).to(device, dtype)}
    if way == "none":
        return {}
    config = GuideConfig(form="seeing") if way == "seeing" else GuideConfig(way)
    guide = randomised(lambda: build_guide(unet.config, config), 4)
    return {"guide": guide.to(device, dtype)}


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
@pytest.mark.parametrize("way", WAYS)
def test_a_recorded_step_serves_any_g_prompt_and_noise(recordings, way, sampler):
    unet = randomised(lambda: UNet(TOY_UNET))
    options = arguments(way, unet)
    step = capture.Captured(fast.predict_step)
    for g, seed in ((2.0, 1), (8.0, 2), (5.0, 3)):
        z, c = noise(3, 4, 8, 8, seed=seed), noise(3, 77, 32, seed=10 + seed)
        plain = ppdd.sample(unet, z, c, g, 4, sampler=sampler, **options)
        quick = fast.sample(unet, z, c, g, 4, sampler=sampler, step=step, **options)
        assert disagreement(quick, plain) < 1e-3
    assert len(recordings) == 1
    fast.sample(unet, z[:2], c[:2], g, 4, sampler=sampler, step=step,
                **{k: v[:2] if k == "empty" else v for k, v in options.items()})
    assert len(recordings) == 2                                     # another shape


def test_where_recording_fails_the_step_is_not_recorded(monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory\nand more")

    monkeypatch.setattr(capture, "record_graph", fail)
    unet, step = randomised(lambda: UNet(TOY_UNET)), capture.Captured(fast.predict_step)
    z, c = noise(3, 4, 8, 8), noise(3, 77, 32, seed=2)
    for _ in range(2):
        quick = fast.sample(unet, z, c, 0.0, 4, step=step)
        assert disagreement(quick, ppdd.sample(unet, z, c, 0.0, 4)) < 1e-3
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "no CUDA graph for predict_step (no memory)" in message


def test_recordings_are_not_kept_without_end(recordings):
    double = capture.Captured(lambda x: 2 * x)
    for n in range(1, 40):
        assert torch.equal(double(torch.ones(n)), torch.full((n,), 2.0))
    assert len(double.recordings) <= double.MOST


def test_few_prompts_are_encoded_from_a_recording(toy_base, recordings, monkeypatch):
    """As many as come again and again; not thousands, encoded once."""
    monkeypatch.setattr(base_module, "captured", lambda function, _: capture._captured(function))
    base = load_base(toy_base)
    for texts in (["a red boat", ""], ["a cat", "a dog"], ["on the sea"] * 65):
        assert torch.equal(base.embed(texts), base.text(base.tokenizer(texts)))
    assert len(recordings) == 1


@cuda
def test_on_a_gpu_prompts_are_encoded_as_without_a_recording(toy_base):
    base = load_base(toy_base, torch.float32, "cuda")
    for texts in (["a red boat", ""], ["a cat", "a dog"], ["on the sea"]):
        plain = base.text(base.tokenizer(texts).cuda())
        assert disagreement(base.embed(texts), plain) < 1e-4


@cuda
def test_on_a_gpu_equal_matrices_move_as_alone():
    """And Muon's step can be recorded."""
    grads = torch.randn(5, 3, 24, 16, generator=torch.Generator().manual_seed(0)).cuda()
    weights = [[torch.nn.Parameter(torch.zeros(24, 16, device="cuda")) for _ in range(3)]
               for _ in range(3)]
    kwargs = {"weight_decay": 0.0, "capturable": True, "lr": torch.full((), 0.01, device="cuda")}
    together = Muon(weights[0], **kwargs)
    alone = [Muon([p], **kwargs) for p in weights[1]]
    recorded = Muon(weights[2], **kwargs)

    def step(optimizers, parameters, grad):
        for p, g in zip(parameters, grad):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()

    update = capture.CapturedUpdate(lambda grad: step([recorded], weights[2], grad))
    for grad in grads:
        step([together], weights[0], grad)
        step(alone, weights[1], grad)
        update(grad)
    for a, b, c in zip(*weights):
        assert disagreement(a, b) < 1e-3 and disagreement(c, a) < 1e-3


@cuda
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
@pytest.mark.parametrize("way", WAYS)
def test_on_a_gpu_recorded_equals_unrecorded(way, sampler):
    unet = randomised(lambda: UNet(TOY_UNET)).to("cuda", torch.bfloat16)
    options = arguments(way, unet, "cuda", torch.bfloat16)
    for g, seed in ((2.0, 1), (8.0, 2)):
        z = noise(3, 4, 8, 8, seed=seed).cuda()
        c = noise(3, 77, 32, seed=10 + seed).to("cuda", torch.bfloat16)
        plain = fast.sample(unet, z, c, g, 4, sampler=sampler, step=fast.predict_step, **options)
        assert disagreement(fast.sample(unet, z, c, g, 4, sampler=sampler, **options), plain) < 0.05


@cuda
def test_on_a_gpu_images_are_those_of_a_cpu():
    """The miniature in float32: the noise is the CPU's, so are the images, up to rounding."""
    images = []
    for device in ("cpu", "cuda"):
        base = load_base(MINI, device=device)
        guide = load_guide(BUNDLED / "tiny-8.safetensors", base.unet.config, device=device)
        c = base.embed(["a big red boat on the sea at sunset, in the middle"] * 2)
        z = ppdd.noise([0, 1], (4, 8, 8)).to(device)
        images.append(base.decode(fast.sample(base.unet, z, c, 8.0, 8, guide)).cpu().int())
    assert (images[0] - images[1]).abs().float().mean() < 2


@cuda
def test_no_step_waits_for_the_gpu():
    unet = randomised(lambda: UNet(TOY_UNET)).to("cuda", torch.bfloat16)
    z, c = noise(3, 4, 8, 8).cuda(), noise(3, 77, 32, seed=2).to("cuda", torch.bfloat16)
    step = capture.captured(fast.predict_step, z.device)
    fast.sample(unet, z, c, 0.0, 4)                                  # records
    asked = []

    def strict(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            asked.append(1)
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    fast.sample(unet, z, c, 0.0, 4, step=strict)
    assert len(asked) == 4


@cuda
def test_threads_do_not_disturb_each_other():
    """Each thread samples with a step of its own, while the other one does too."""
    unet = randomised(lambda: UNet(TOY_UNET)).to("cuda", torch.bfloat16)
    results = {}

    def work(k):
        z = noise(2, 4, 8, 8, seed=k).cuda()
        c = noise(2, 77, 32, seed=20 + k).to("cuda", torch.bfloat16)
        runs = [fast.sample(unet, z, c, 0.0, 4, step=fast.predict_step) for _ in range(3)]
        results[k] = all(disagreement(run, runs[0]) < 1e-3 for run in runs)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == {0: True, 1: True, 2: True}


@cuda
def test_sample_py_on_a_gpu(here):
    line = ["--weights", "mini", "--steps", "8", "--g", "8", "--device", "cuda"]
    sample.main(line)
    made = sorted((here / "out").glob("0*.png"))
    assert len(made) == 8
    Image.linear_gradient("L").save("mask.png")
    for more in (["--mask", "mask.png"], ["--invert"], ["--sampler", "stochastic"]):
        sample.main([*line, "--image", str(made[0]), "--prompt", "a red boat", *more])
    assert len(list((here / "out").glob("0*.png"))) == 8 + 3


# ------------------------------------------------------------------------------- training


def trainer(base, *more, updates=20):
    return train.prepare(parse(train.Config, "train.py", "", [
        "--weights", str(base), "--images", "40", "--batch", "4", "--max-updates", str(updates),
        "--grid-every", "0", "--end-steps", "32", "--device", "cpu", *more]))


def weights_after(run, updates):
    for _ in range(updates):
        run.train_step()
    run.read_metrics()
    return {k: v.detach().clone().float().cpu() for k, v in run.guide.state_dict().items()}


@pytest.mark.parametrize("more", [
    (), ("--guide", "full"), ("--optimizer", "muon", "--trajectories", "0.5"),
    ("--guide", "whole", "--checkpointing", "--trajectories", "0.5"),
    ("--accumulate", "2"), ("--form", "gated", "--loss", "root-snr", "--dtype", "bf16",
                            "--optimizer", "adamw", "--lr", "5e-3")])
def test_a_recorded_update_equals_one_that_is_not(toy_base, here, monkeypatch, recordings, more):
    eager = weights_after(trainer(toy_base, "--run", "a", *more), 6)
    monkeypatch.setattr(capture, "record_graph", fake_update)
    run = trainer(toy_base, "--run", "b", *more)
    run.captures = True
    run.begin_stage()
    assert run.optimizer.param_groups[0]["lr"].ndim == 0
    recorded = weights_after(run, 6)
    assert run.captured_update.calls == 6 and run.captured_update.recording is not None
    assert len(run.history.recent) == 6 and not run.unread
    for name, weight in eager.items():
        torch.testing.assert_close(recorded[name], weight, rtol=1e-3, atol=2e-5)


def test_a_loss_that_is_not_finite_is_seen_before_a_checkpoint_is_written(toy_base, here,
                                                                          monkeypatch, recordings):
    monkeypatch.setattr(capture, "record_graph", fake_update)
    run = trainer(toy_base, "--save-every", "3")
    run.captures = True
    run.begin_stage()
    backward = run.backward

    def broken(parts):
        metrics, target, norm = backward(parts)
        return (metrics * float("nan") if run.update == 4 else metrics), target, norm

    monkeypatch.setattr(run, "backward", broken)
    with pytest.raises(ValueError, match="loss is nan.*a lower --lr .*--resume"):
        run.train()
    assert [path.stem for path in run.folder.checkpoints()] == ["state-00-00000003"]


@cuda
@pytest.mark.parametrize("more", [
    ("--dtype", "fp32"), ("--guide", "full", "--dtype", "fp32"),
    ("--optimizer", "muon", "--trajectories", "0.5", "--dtype", "fp32"), ()])
def test_on_a_gpu_twenty_recorded_updates_equal_twenty_that_are_not(toy_base, here, more):
    runs = []
    for name, captures in (("a", True), ("b", False)):
        run = trainer(toy_base, "--run", name, "--device", "cuda", *more)
        run.captures = captures
        run.begin_stage()
        runs.append(weights_after(run, 20))
    for name, weight in runs[1].items():
        off = (runs[0][name] - weight).abs().max() / weight.abs().max().clamp(min=1e-6)
        assert off < (0.02 if more else 0.2), name


@cuda
def test_on_a_gpu_a_resumed_run_equals_an_uninterrupted_one(toy_base, here):
    def run(*more):
        train.main(["--weights", str(toy_base), "--images", "40", "--batch", "4", "--max-updates",
                    "12", "--grid-every", "0", "--end-steps", "32", "--save-every", "5",
                    "--device", "cuda", "--out", "guides", *more])

    run("--out", "whole", "--run", "whole-run")
    step = train.Trainer.train_step

    def dies(self):
        step(self)
        if self.update == 7:
            raise KeyboardInterrupt

    train.Trainer.train_step = dies
    try:
        with pytest.raises(SystemExit):
            run()
    finally:
        train.Trainer.train_step = step
    run("--resume")
    for path in (here / "whole/toy").glob("*.safetensors"):
        resumed = load_file(here / "guides/toy" / path.name)
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-2, atol=1e-4)
