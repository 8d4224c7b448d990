"""`eval.py speed`: what it times is what it says, beside a baseline that computes the same."""

# ruff: noqa: F811 (fixtures are imported, and named again as arguments)

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOY_TEXT, TOY_UNET, TOY_VAE
from eval_helpers import empty, refusal  # noqa: F401
from test_cuda import fake_recording

import eval as script
import ppdd
from clip_text import TextEncoder
from evaluation import cost, speed, speed_report, timing, workload
from meng import Student
from support import capture, fast
from support.cli import BadInput, check_bounds
from unet import UNet
from vae import VAE

QUICK = "speed --size mini --device cpu --quick".split()
UPDATES = {f"{guide} {kind}" for guide in ("full", "tiny", "seeing") for kind in
           ("stage-one update", "stage-one update, naive", "halving update")}


def settings(**given) -> script.SpeedConfig:
    config = script.SpeedConfig(size="mini", device="cpu", quick=True)
    return speed.resolve_defaults(replace(config, **given))


def toy_networks(size: str) -> cost.Networks:
    with torch.device("meta"):
        return cost.Networks(UNet(TOY_UNET), VAE(TOY_VAE), TextEncoder(TOY_TEXT),
                             ppdd.FullGuide(TOY_UNET), ppdd.TinyGuide(TOY_UNET),
                             ppdd.SeeingGuide(TOY_UNET), Student(TOY_UNET), 8)


@pytest.fixture
def toy(monkeypatch):
    """Toy networks are what is measured."""
    monkeypatch.setattr(speed, "build_networks", toy_networks)


def toy_work(batch: int = 1, **given) -> workload.Work:
    config = settings(**given)
    return workload.Work(config, speed.build_models(config), 8, batch)


@pytest.fixture
def gpu(toy, monkeypatch):
    """A stand-in for a GPU: the CPU, whose recordings are calls made again. Returns how often
    each of CUDA's functions was called, and the recordings."""
    calls = {"recorded": 0}

    def count(name, result=None):
        def call(*_, **__):
            calls[name] = calls.get(name, 0) + 1
            return result
        return call

    def record(call, warm_up=True):
        calls["recorded"] += 1
        return fake_recording(call)

    monkeypatch.setattr(timing, "is_gpu", lambda device: True)
    monkeypatch.setattr(speed_report, "is_gpu", lambda device: True)
    monkeypatch.setattr(capture, "record_graph", record)
    monkeypatch.setattr(capture, "on_side_stream", lambda call: call())
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, count(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", count("memory", 3 * 2**30))
    monkeypatch.setattr(timing, "matrix_rate", lambda *_: 1.0)
    return calls


@pytest.fixture
def short_turns(monkeypatch):
    monkeypatch.setattr(timing, "_repeats", lambda *_: 1)
    monkeypatch.setattr(timing, "steps_per_run", lambda device: 2)


def run_on_gpu(**given) -> dict:
    """The result of a run on the stand-in."""
    config = script.SpeedConfig(size="mini", device="cpu", out="speed.json", baseline=True,
                                rounds=1, **given)
    speed.speed(config)
    return json.loads(Path("speed.json").read_text(encoding="utf-8"))


def measured(capsys, *argv: str) -> tuple[dict, str]:
    """The result file and the page of a small run."""
    script.main([*QUICK, "--out", "speed.json", *argv])
    page = Path("speed.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    return json.loads(Path("speed.json").read_text(encoding="utf-8")), page


@pytest.mark.full
def test_the_whole_command(empty, capsys):
    result, page = measured(capsys, "--baseline", "--steps", "2", "--rounds", "2")
    rows = {row["what"]: row for row in result["rows"]}
    parts = {"UNet pass", "VAE decode", "text encoding"}
    images = {f"{method} image, 2 steps" for method in workload.METHODS}
    steps = {f"{method} step" for method in workload.METHODS}
    assert rows.keys() == parts | steps | images | UPDATES | {
        f"diffusers: {name}" for name in (*parts, "CFG image, 2 steps")}
    for name, row in rows.items():
        assert len(row["rounds"]) == 2 and min(row["rounds"]) > 0 and row["batch"] == 1
        assert row["ms"] == pytest.approx(statistics.fmean(row["rounds"]), rel=1e-3)
        assert row["quartiles"][0] <= row["ms"] <= row["quartiles"][1]
        assert ("images/s" in row) == ("image" in name or "update" in name)
        assert f"| {name} | 8 × 8 | 1 | " in page and "GiB" not in row       # on a CPU
    image = rows["tiny image, 2 steps"]
    assert image["images/s"] == pytest.approx(1000 / image["ms"], rel=1e-3)
    ratios = {entry["ratio"]: entry["median"] for entry in result["ratios"]}
    for ratio, median in ratios.items():
        a, b = (rows[name]["rounds"] for name in ratio.split(" / "))
        assert median == pytest.approx(statistics.fmean(x / y for x, y in zip(a, b)), abs=1e-3)
    assert {"tiny step / CFG step", "full step / CFG step", "UNet pass / diffusers: UNet pass",
            "tiny image, 2 steps / diffusers: CFG image, 2 steps",
            "tiny stage-one update / tiny stage-one update, naive"} <= ratios.keys()
    differences = result["differences from diffusers"]
    assert max(differences.values()) < 1e-4 and len(differences) == 4
    protocol = result["protocol"]
    assert {"hardware", "commit", "dtype", "settings"} <= protocol.keys()
    assert {"torch", "diffusers", "transformers"} <= protocol["versions"].keys()


def test_every_row_is_printed_and_saved_as_soon_as_it_is_measured(toy, empty, capsys, monkeypatch):
    """Killed before the updates, a run leaves what came before them."""
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(workload.Work, "updates", killed)
    monkeypatch.setattr(speed_report, "macs_per_image", lambda nets, steps: {})
    with pytest.raises(SystemExit) as exit:
        script.main([*QUICK, "--out", "speed.json", "--steps", "1"])
    rows = json.loads(Path("speed.json").read_text())["rows"]
    assert exit.value.code == 130
    assert [row["what"] for row in rows] == [
        "UNet pass", "VAE decode", "text encoding",
        *(f"{method} step" for method in workload.METHODS),
        *(f"{method} image, 1 steps" for method in workload.METHODS)]
    printed = capsys.readouterr().out
    assert all(f"{row['what']}  8 × 8  1  " in printed for row in rows)


def test_what_is_left_out_on_a_cpu_is_in_the_result(toy, empty, monkeypatch):
    """Of further sides of full-size networks only passes and steps are measured."""
    measured = []
    monkeypatch.setattr(timing, "benchmark", lambda calls, *_: (
        measured.append([*calls]) or {}, {}))
    monkeypatch.setattr(timing, "matrix_rate", lambda *_: 1.0)
    monkeypatch.setattr(speed_report, "macs_per_image", lambda nets, steps: {})
    speed.speed(script.SpeedConfig(device="cpu", side=(8, 16), steps=(1,), out="speed.json"))
    assert [names[0] for names in measured] == [
        "UNet pass", "VAE decode", "text encoding", "CFG step", "CFG image, 1 steps",
        *(f"{guide} {stage} update" for guide in ("full", "tiny", "seeing")
          for stage in ("stage-one", "halving")),
        "UNet pass", "VAE decode", "text encoding", "CFG step"]
    (text,) = json.loads(Path("speed.json").read_text())["left out"]
    assert text.startswith("whole images and updates at 16 × 16") and text in Path(
        "speed.md").read_text()


@pytest.mark.full
def test_the_arithmetic_is_table_1_s(empty, capsys):
    result, _ = measured(capsys, "--steps", "1", "--batch", "1", "2")
    rows = {(row["what"], row["batch"]): row for row in result["rows"]}
    nets = cost.build_networks("mini")
    costs = cost.pass_costs(nets)
    expected = {"UNet pass": costs["base UNet"], "CFG step": costs["teacher"],
                "VAE decode": costs["VAE decoder"]}
    for (name, batch), row in rows.items():
        if name in expected:
            macs = batch * expected[name].total
            assert row["GMACs"] == pytest.approx(macs / 1e9, rel=1e-3)
            rate = 2 * macs / (row["ms"] / 1000) / 1e12
            assert row["of the matrix rate"] == pytest.approx(
                rate / result["matrix rate, TFLOP/s"], rel=0.02)
    for method, name in (("cfg", "CFG"), *((name, name) for name in ("full", "tiny", "seeing"))):
        whole, macs = cost.image_cost(nets, method), speed_report.macs_per_image(nets, cost.STEPS)
        for n in cost.STEPS:
            assert 0.9 < whole[n] / macs[f"{name} image, {n} steps"] < 1.0001


@pytest.mark.full
def test_everything_follows_the_dtype(empty, capsys):
    result, _ = measured(capsys, "--baseline", "--steps", "1", "--dtype", "bf16")
    assert result["protocol"]["dtype"] == "torch.bfloat16"
    differences = result["differences from diffusers"]
    assert max(differences.values()) > 1e-4 and not speed.too_different(differences, torch.bfloat16)


def test_weights_are_random_and_the_same_at_every_call():
    (base, guides), (again, _) = (speed.random_base(settings()) for _ in range(2))
    for module in (base.unet, base.vae, base.text, *guides.values()):
        assert all(p.abs().max() > 0 and not p.requires_grad for p in module.parameters())
    for a, b in zip(base.unet.parameters(), again.unet.parameters()):
        assert torch.equal(a, b)


def test_calls_take_turns_after_a_warm_up(monkeypatch):
    order, wait = [], iter([9, 9, 1, 1, 2, 2, 6, 6])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: sum(order))
    calls = {name: lambda: order.append(next(wait)) for name in ("a", "a step")}
    timings, failures = timing.benchmark(calls, "cpu", rounds=3)
    assert timings["a"]["rounds"] == [1000, 2000, 6000] and timings["a"]["ms"] == 2000
    assert timings["a"]["quartiles"] == [1500, 4000] and not failures
    assert timings["a step"]["rounds"] == [500, 1000, 3000]   # of a run of two steps on a CPU


def test_on_a_gpu_turns_last_a_tenth_of_a_second(monkeypatch, gpu):
    """And it is waited for before and after; the peak of its memory is that of the warm-up."""
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call():
        calls.append(1)
        clock[0] += 0.02

    timings, _ = timing.benchmark({"a step, captured": call}, "cpu", rounds=3, warm_up=2)
    assert len(calls) in (2 + 3 * 5, 2 + 3 * 4)                 # 0.1 / 0.02 is hardly 5
    assert timings["a step, captured"]["rounds"] == [2.5] * 3   # of a run of eight steps
    assert timings["a step, captured"]["GiB"] == 3.0
    assert gpu["synchronize"] == 1 + 2 * 5 and gpu["reset_peak_memory_stats"] == 1
    row = speed_report.make_row("a", 8, 1, timings["a step, captured"], {}, 1.0)
    assert "3.00" in speed_report.row_cells(row)


def test_no_round_begins_after_the_deadline_but_the_first():
    timings, _ = timing.benchmark({"a": lambda: None}, "cpu", 9, deadline=time.monotonic() - 1)
    assert len(timings["a"]["rounds"]) == 1


@pytest.mark.parametrize("guide", ["tiny", "full"])
def test_the_naive_way_learns_the_same(toy, guide):
    """So the two updates that are compared do one work: same loss, same gradients."""
    work = toy_work(2)
    unet, guide = work.plain["unet"], work.plain[guide].requires_grad_()
    inputs = (unet, guide, work.z, work.t, work.c, work.empty, torch.tensor([2.0, 8.0]))
    gradients = []
    for loss in (workload.naive_loss(*inputs), ppdd.cfg_distillation(*inputs).loss):
        gradients.append([loss.detach(), *torch.autograd.grad(loss, [*guide.parameters()])])
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_update_changes_the_copied_guide_only(toy, dtype):
    work = toy_work(dtype=dtype)
    frozen = [p for module in work.plain.values() for p in module.parameters()]
    before = [p.clone() for p in frozen]
    assert {p.dtype for p in frozen} == {work.c.dtype}
    for stage in ("stage-one", "halving"):
        for call in work.updates("tiny", stage).values():
            assert call().isfinite()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, frozen))


def test_a_guide_learns_in_float32_and_computes_in_the_dtype_of_the_base(toy, monkeypatch):
    distill, seen = ppdd.cfg_distillation, []

    def watched(unet, guide, *inputs):
        own = guide.args[0]
        result = distill(unet, guide, *inputs)
        seen.append(({p.dtype for p in own.parameters()}, {p.dtype for p in unet.parameters()},
                     inputs[2].dtype, torch.is_autocast_enabled("cpu")))
        return result

    monkeypatch.setattr(ppdd, "cfg_distillation", watched)
    toy_work(dtype="bf16").updates("tiny", "stage-one")["tiny stage-one update"]()
    assert seen == [({torch.float32}, {torch.bfloat16}, torch.bfloat16, False)]


# ------------------------------------------------------------------------------- on a GPU

def test_the_whole_command_on_a_gpu(gpu, short_turns, empty, capsys):
    """Every group runs, and what is worth most comes first."""
    result = run_on_gpu(batch=(1, 2, 3), steps=(2, 3))
    assert result["left out"] == [] and gpu["recorded"] == 43 and gpu["empty_cache"] > 20
    rows = {(row["what"], row["side"], row["batch"]): row for row in result["rows"]}
    passes = ("UNet pass", "VAE decode", "text encoding")
    both = [who + name for who in ("", "diffusers: ") for name in passes]
    steps = [f"{method} step" for method in workload.METHODS]
    for batch in (1, 2, 3):
        names = {name for name, side, b in rows if (side, b) == (8, batch)}
        images = {f"{method} image, {n} steps" for n in ((2, 3) if batch == 1 else (2,))
                  for method in (*workload.METHODS, "diffusers: CFG")}
        assert names == images | {*both, *(f"{name}, captured" for name in (*both, *steps)),
                                  *(steps if batch == 1 else ())}
    assert {name for name, _, batch in rows if batch == 8} == UPDATES
    assert {side for name, side, _ in rows} == {8, 16, 24}
    order = [*dict.fromkeys((side, batch) for _, side, batch in rows)]
    assert order == [(8, 1), (8, 2), (8, 8), (16, 1), (24, 1), (8, 3)]
    assert all(row["GiB"] == 3 for row in result["rows"])
    captured = rows["UNet pass, captured", 24, 1]
    assert captured["GMACs"] > 8 * rows["UNet pass", 8, 1]["GMACs"]
    ratios = {entry["ratio"] for entry in result["ratios"]}
    assert {"UNet pass, captured / UNet pass", "tiny step, captured / CFG step, captured",
            "UNet pass, captured / diffusers: UNet pass, captured",
            "tiny image, 2 steps / diffusers: CFG image, 2 steps"} <= ratios
    page = Path("speed.md").read_text(encoding="utf-8")
    assert "| 24 × 24 | 1 |" in page and page in capsys.readouterr().out
    script.main(["growth", "speed.json", "--out", "speed.png"])
    assert (empty / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_when_time_is_up_the_rest_is_named(gpu, empty, capsys):
    result = run_on_gpu(minutes=1e-9)
    groups = 3 * 5 + 1 + 3 * 2 + 2          # three batches, 50 steps once, updates, two sides
    assert not result["rows"] and len(result["left out"]) == groups
    printed = capsys.readouterr().out
    for text in ("UNet pass at 8 × 8, batch 1: ", "images, 50 steps at 8 × 8, batch 1: ",
                 "steps at 8 × 8, batch 16: ", "tiny halving updates at 8 × 8, batch 8: "):
        assert any(left.startswith(text) for left in result["left out"])
        assert f"left out: {text}" in printed and f"- left out: {text}" in printed


def test_what_fails_is_left_out_and_the_rest_goes_on(gpu, short_turns, empty, monkeypatch):
    record, failing = capture.record_graph, ["first", "second"]

    def fails(call, warm_up=True):
        if failing and getattr(call, "func", None) is not None:
            failing.pop()
            raise torch.OutOfMemoryError("no memory\nand more")
        return record(call, warm_up)

    def broken(*_):
        raise RuntimeError("no guide")

    monkeypatch.setattr(capture, "record_graph", fails)
    monkeypatch.setattr(workload.Work, "updates", broken)
    result = run_on_gpu(batch=(1,), steps=(2,))
    assert result["left out"][:3] == [
        "UNet pass, captured at 8 × 8, batch 1: OutOfMemoryError: no memory",
        "diffusers: UNet pass, captured at 8 × 8, batch 1: OutOfMemoryError: no memory",
        "full stage-one updates at 8 × 8, batch 8: RuntimeError: no guide"]
    names = {row["what"] for row in result["rows"]}
    assert {"UNet pass", "VAE decode, captured", "tiny image, 2 steps"} <= names


def test_a_step_that_is_not_recorded_is_not_called_captured(gpu, monkeypatch):
    def fails(*_):
        raise RuntimeError("busy")

    monkeypatch.setattr(capture, "record_graph", fails)
    timings, failures = timing.benchmark(toy_work().steps(), "cpu", 1)
    assert timings.keys() == {f"{method} step" for method in workload.METHODS}
    assert failures.keys() == {f"{name}, captured" for name in timings}


def test_a_captured_call_is_recorded_once_and_an_update_after_two_of_it(gpu):
    made = []

    def call():
        made.append(1)
        return torch.ones(1)

    for function, eager in ((timing.recorded(call, "cpu"), 0),
                            (timing.recorded_update(call, "cpu"), 2)):
        made.clear()
        gpu["recorded"] = 0
        for _ in range(3):
            function()
        assert gpu["recorded"] == 1 and len(made) == eager + 1 + 3     # recording calls it once


# ------------------------------------------------------------------------------- compiled

@pytest.fixture
def eager_compiler(monkeypatch):
    """torch.compile without a compiler; returns what was to be compiled."""
    compile, compiled = torch.compile, []

    def eager(call, dynamic):
        compiled.append(call)
        return compile(call, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    return compiled


@pytest.mark.full
def test_compiled_passes_and_steps_compute_the_same(toy, eager_compiler):
    work = toy_work(baseline=True)
    for name in workload.PASSES:
        ours, theirs = work.compiled_pass(name).values()
        expected = work.calls_of_ours()[name]()
        assert torch.allclose(ours(), expected, atol=1e-4 * expected.abs().max().item())
        assert torch.allclose(theirs(), expected, atol=1e-3 * expected.abs().max().item())
    for method in workload.METHODS:
        (call,) = work.compiled_step(f"{method} step").values()
        expected = work.run_of_steps(fast.predict_step, method)()
        assert torch.allclose(call(), expected, atol=1e-4 * expected.abs().max().item())
    assert fast.predict_step in eager_compiler


@pytest.mark.full
def test_compiled_rows_come_last_with_the_time_of_their_first_call(
        gpu, short_turns, empty, eager_compiler, monkeypatch):
    monkeypatch.setattr(workload.Work, "updates", lambda *_: {"an update": lambda: None})
    result = run_on_gpu(batch=(1,), steps=(2,), compile=True)
    assert result["left out"] == []
    last = [row["what"] for row in result["rows"] if "compiled" in row["what"]]
    assert last == [row["what"] for row in result["rows"]][-10:]
    assert all("first call, s" in row for row in result["rows"] if row["what"] in last)
    assert "- tiny step, compiled at 8 × 8, batch 1, first call: " in Path(
        "speed.md").read_text(encoding="utf-8")


@pytest.mark.full
def test_where_nothing_compiles_a_sentence_says_so(toy, empty, capsys, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **_: compile(call, backend=broken))
    result, page = measured(capsys, "--compile", "--steps", "1")
    assert len(result["left out"]) == 7 and len(result["rows"]) == 7 + 4 + 9
    assert all("leave it out (backend='broken' raised" in text for text in result["left out"])


# ------------------------------------------------------------------------------- the chart

def test_growth_needs_a_result_of_a_gpu(empty, capsys):
    assert "there is no results/speed-sd15-cuda.json" in refusal(capsys, "growth")
    assert "takes one result" in refusal(capsys, "growth", "a", "b")
    Path("a.json").write_text("[]")
    assert "a.json is no result of speed" in refusal(capsys, "growth", "a.json")
    cpu = Path(script.__file__).parent / "results/speed-sd15-cpu.json"
    assert "has no UNet passes of several sides" in refusal(capsys, "growth", str(cpu))
    assert [*empty.iterdir()] == [empty / "a.json"]


def test_the_page_of_the_cpu_s_result_can_be_made_again():
    root = Path(script.__file__).parent
    result = json.loads((root / "results/speed-sd15-cpu.json").read_text(encoding="utf-8"))
    page = (root / "results/speed-sd15-cpu.md").read_text(encoding="utf-8")
    assert speed_report.speed_page(result).split("\n- ")[0] == page.split("\n- ")[0]


# ------------------------------------------------------------------------------- settings

def test_defaults_by_machine():
    found = {(size, device, quick): speed.resolve_defaults(script.SpeedConfig(
        size=size, device=device, quick=quick)) for size in ("sd15", "mini")
        for device in ("cpu", "cuda") for quick in (True, False)}
    plans = {key: (c.side, c.batch, c.steps, c.rounds, c.minutes) for key, c in found.items()}
    assert plans["sd15", "cpu", False] == ((32, 64), (1,), (8,), 3, 0)
    assert plans["sd15", "cpu", True] == ((16,), (1,), (2,), 1, 0)
    assert plans["sd15", "cuda", False] == ((64,), (1, 16, 4), (8, 50), 5, 4.5)
    assert plans["sd15", "cuda", True] == ((64,), (1,), (8,), 3, 0.75)
    assert plans["mini", "cpu", False] == ((8,), (1,), (8,), 3, 0)


def test_sentences(empty, capsys, monkeypatch):
    for argv, message in (("--side 12", "multiples of 8"), ("--batch 0", "must be from 1"),
                          ("--steps 0", "must be from 1"), ("--rounds -1", "--rounds -1"),
                          ("--side 0", "--side 0"), ("--minutes -1", "--minutes -1"),
                          ("--device abacus", "--device abacus"),
                          ("--size xl", "invalid choice")):
        assert message in refusal(capsys, *QUICK, *argv.split())
    assert "give the command first" in refusal(capsys, "--device", "cpu", "speed")
    with monkeypatch.context() as several:
        several.setenv("WORLD_SIZE", "2")
        assert "leave out torchrun" in refusal(capsys, *QUICK)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refusal(capsys, *QUICK, "--baseline")
    assert not list(empty.iterdir())
    with pytest.raises(BadInput, match="--side 520"):
        check_bounds(settings(side=(520,)))


def test_a_baseline_that_computes_something_else_is_left_out(toy, empty, capsys, monkeypatch):
    build = speed.build_baseline

    def other(base):
        pipe = build(base)
        pipe.unet.conv_out.bias = torch.nn.Parameter(pipe.unet.conv_out.bias + 1)
        return pipe

    monkeypatch.setattr(speed, "build_baseline", other)
    result, page = measured(capsys, "--baseline", "--steps", "1")
    assert "diffusers: UNet pass is off ours by" in result["left out"][0] in page
    assert not any("diffusers" in row["what"] for row in result["rows"])
    differences = {"UNet pass": None}
    assert "not finite" in speed.too_different(differences, torch.float32)


def test_two_guided_steps_may_differ_by_twice_as_much():
    for name, allowed in (("UNet pass", 0.05), (speed.CFG_IMAGE, 0.1)):
        assert not speed.too_different({name: 0.9 * allowed}, torch.bfloat16)
        assert f"more than {allowed}" in speed.too_different({name: 1.1 * allowed}, torch.bfloat16)


def test_a_compilation_that_would_end_too_late_does_not_begin(gpu, short_turns, empty,
                                                              eager_compiler):
    result = run_on_gpu(batch=(1,), steps=(2,), compile=True, minutes=0.9)
    compiled = [text for text in result["left out"] if "compiled" in text]
    assert len(compiled) == len(workload.PASSES) + len(workload.METHODS)
    assert all("0.9 minutes (--minutes) are over" in text for text in compiled)
