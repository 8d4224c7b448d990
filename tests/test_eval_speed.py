"""eval.py speed: what it times is what it says, beside a peer that computes the same."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_eval_tables import refusal

import eval as tables
import ppdd

IMPORT, START = "import torch, fresh Python", "sample.py, 2 steps, from start to end"
QUICK = "speed --size mini --device cpu --quick".split()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settled(*argv: str) -> tables.SpeedConfig:
    given = vars(tables.command_line(tables.SpeedConfig).parse_args([*QUICK, *argv]))
    return tables.settle_speed(tables.SpeedConfig(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}))


def measured(capsys, *argv: str) -> tuple[dict, str]:
    """The result file and the page of a small run."""
    tables.main([*QUICK, "--out", "speed.json", *argv])
    page = Path("speed.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    return json.loads(Path("speed.json").read_text(encoding="utf-8")), page


def test_the_whole_command(here, capsys):
    told, page = measured(capsys, "--peer", "--steps", "2", "--rounds", "2")
    rows = {row["what"]: row for row in told["rows"]}
    parts = {"UNet pass", "VAE decode", "text encoding"}
    pictures = {f"{method} picture, 2 steps" for method in ("CFG", "full", "tiny")}
    updates = {f"{guide} {kind}" for guide in ("full", "tiny") for kind in
               ("stage-one update", "stage-one update, naive", "halving update")}
    fresh, steps = {IMPORT, START}, {"CFG step", "full step", "tiny step"}
    assert rows.keys() == fresh | parts | steps | pictures | updates | {
        f"diffusers: {name}" for name in (*parts, "CFG picture, 2 steps")}
    for name, row in rows.items():
        assert len(row["rounds"]) == 2 and min(row["rounds"]) > 0 and row["batch"] == 1
        assert row["ms"] == pytest.approx(statistics.fmean(row["rounds"]), rel=1e-3)
        assert row["quartiles"][0] <= row["ms"] <= row["quartiles"][1]
        assert ("images/s" in row) == ("picture" in name or "update" in name)
        assert f"| {name} | 8 × 8 | 1 | " in page
        assert row["GiB"] is None or 0.05 < row["GiB"] < 24
    assert all(rows[name]["ms"] > 100 and rows[name]["GiB"] is None for name in fresh)
    picture, update = rows["tiny picture, 2 steps"], rows["tiny halving update"]
    assert picture["images/s"] == pytest.approx(1000 / picture["ms"], rel=1e-3)
    assert update["hours for 3,000 updates of 64"] == pytest.approx(
        3000 * 64 * update["ms"] / 3.6e6, rel=1e-3)
    ratios = {entry["ratio"]: entry["median"] for entry in told["ratios"]}
    for ratio, median in ratios.items():
        a, b = (rows[name]["rounds"] for name in ratio.split(" / "))
        assert median == pytest.approx(statistics.fmean(x / y for x, y in zip(a, b)), abs=1e-3)
    assert {"tiny step / CFG step", "full step / CFG step", "UNet pass / diffusers: UNet pass",
            "tiny picture, 2 steps / diffusers: CFG picture, 2 steps",
            "tiny stage-one update / tiny stage-one update, naive"} <= ratios.keys()
    assert [told["what"] for told in told["profiles"]] == list(tables.PROFILED)
    for profile in told["profiles"]:
        assert 0.5 < sum(profile["shares"].values()) <= 1.01 and "mm" in profile["shares"]
        assert f"| {profile['what']} | 8 × 8 | 1 | {next(iter(profile['shares']))} " in page
    assert max(told["checked"].values()) < 1e-4 and len(told["checked"]) == 4
    protocol = told["protocol"]
    assert {"hardware", "commit", "dtype", "settings"} <= protocol.keys()
    assert {"torch", "diffusers", "transformers"} <= protocol["versions"].keys()


def test_the_arithmetic_is_table_1_s(here, capsys):
    told, _ = measured(capsys, "--steps", "1", "--batch", "1", "2")
    rows = {(row["what"], row["batch"]): row for row in told["rows"]}
    nets = tables.build_networks("mini")
    once = tables.passes(nets)
    expected = {"UNet pass": once["base UNet"], "CFG step": once["teacher"],
                "VAE decode": once["VAE decoder"]}
    for (name, batch), row in rows.items():
        if name in expected:
            macs = batch * expected[name].all
            assert row["GMACs"] == pytest.approx(macs / 1e9, rel=1e-3)
            rate = 2 * macs / (row["ms"] / 1000) / 1e12
            assert row["of the matrix rate"] == pytest.approx(
                rate / told["limit"]["matrix, TFLOP/s"], rel=0.02)
    for method, name in (("cfg", "CFG"), ("full", "full"), ("tiny", "tiny")):
        cost, macs = tables.picture_cost(nets, method), tables.speed_macs(nets, tables.STEPS)
        for n in tables.STEPS:
            assert 0.9 < cost[n] / macs[f"{name} picture, {n} steps"] < 1.0001


def test_everything_follows_the_dtype(here, capsys):
    told, _ = measured(capsys, "--peer", "--steps", "1", "--dtype", "bf16")
    assert told["protocol"]["dtype"] == "torch.bfloat16"
    assert 1e-4 < max(told["checked"].values()) < tables.AGREE["bf16"]


def test_weights_are_random_and_the_same_at_every_call():
    (base, guides), (again, _) = (tables.random_base(settled()) for _ in range(2))
    for module in (base.unet, base.vae, base.text, *guides.values()):
        assert all(p.abs().max() > 0 and not p.requires_grad for p in module.parameters())
    for a, b in zip(base.unet.parameters(), again.unet.parameters()):
        assert torch.equal(a, b)


def test_calls_take_turns_and_the_first_round_only_warms_up(monkeypatch):
    order, wait = [], iter([9, 9, 1, 1, 2, 2, 6, 6])
    monkeypatch.setattr(tables.time, "perf_counter", lambda: sum(order))
    calls = {name: lambda: order.append(next(wait)) for name in ("a", "a step")}
    told = tables.race(calls, "cpu", rounds=3)
    assert told["a"]["rounds"] == [1000, 2000, 6000] and told["a"]["ms"] == 2000
    assert told["a"]["quartiles"] == [1500, 4000]
    assert told["a step"]["rounds"] == [500, 1000, 3000]     # of a run of two steps on a CPU


@pytest.mark.parametrize("guide", ["tiny", "full"])
def test_the_naive_way_learns_the_same(guide):
    """So the two updates that are compared do one work: same loss, same gradients."""
    base, guides = tables.random_base(settled())
    guide = guides[guide].requires_grad_()
    task = tables.Task(settled(), base, guides, None, 8, 2)
    given = (base.unet, guide, task.z, task.t, task.c, task.empty, torch.tensor([2.0, 8.0]))
    gradients = []
    for loss in (tables.naive_loss(*given), ppdd.cfg_distillation(*given).loss):
        gradients.append([loss.detach(), *torch.autograd.grad(loss, [*guide.parameters()])])
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


def test_an_update_changes_the_copied_guide_only():
    base, guides = tables.random_base(settled())
    task = tables.Task(settled(), base, guides, None, 8, 1)
    before = [p.clone() for p in (*base.unet.parameters(), *guides["tiny"].parameters())]
    for call in task.updates("tiny", {"base": base.unet} | guides).values():
        call()
    after = (*base.unet.parameters(), *guides["tiny"].parameters())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after))


def test_an_update_has_everything_in_float32_under_autocast(monkeypatch):
    config, distill, seen = settled("--dtype", "bf16"), ppdd.cfg_distillation, []

    def watched(unet, guide, z, *given):
        seen.append({x.dtype for x in (*unet.parameters(), *guide.parameters(), z, *given[1:])})
        seen.append(torch.is_autocast_enabled("cpu"))
        return distill(unet, guide, z, *given)

    base, guides = tables.random_base(config)
    monkeypatch.setattr(ppdd, "cfg_distillation", watched)
    tables.Task(config, base, guides, None, 8, 1).updates(
        "tiny", {"base": base.unet} | guides)["tiny stage-one update"]()
    assert seen == [{torch.float32}, True] and base.unet.out[2].weight.dtype == torch.bfloat16


def test_compiled_networks_compute_the_same_and_copies_of_guides_learn(monkeypatch):
    monkeypatch.setattr(tables, "COMPILE", {"cpu": {"backend": "eager"}})
    base, guides = tables.random_base(settled())
    task = tables.Task(settled("--compile"), base, guides, None, 8, 1)
    plain = [task.sample(method, 2, task.c, task.empty) for method in ("CFG", "full", "tiny")]
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **given: compile(
        call, **given | {"backend": "eager"}))
    task.step = tables.compile_networks(base, None)
    for method, expected in zip(("CFG", "full", "tiny"), plain):
        assert torch.allclose(task.sample(method, 2, task.c, task.empty), expected, atol=1e-4)
    learned = []
    monkeypatch.setattr(task, "update", lambda loss, optimizer: (
        loss().backward(), learned.append(optimizer.param_groups[0]["params"][0].grad)))
    task.updates("full", {"base": base.unet} | guides)["full stage-one update"]()
    assert learned[0].abs().max() > 0


def test_where_nothing_compiles_a_sentence_says_so(here, capsys, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(tables, "COMPILE", {"cpu": {"backend": broken}})
    monkeypatch.setattr(tables, "speed_macs", lambda nets, steps: {})
    assert "leave it out (backend='broken' raised" in refusal(capsys, *QUICK, "--compile")
    assert not list(here.iterdir())


def test_defaults_by_machine(monkeypatch):
    monkeypatch.setattr(tables, "find_device", lambda device: device)
    found = {(size, device, quick): tables.settle_speed(tables.SpeedConfig(
        size=size, device=device, quick=quick)) for size in ("sd15", "mini")
        for device in ("cpu", "cuda") for quick in (True, False)}
    plans = {key: (c.side, c.batch, c.steps, c.rounds) for key, c in found.items()}
    assert plans["sd15", "cpu", False] == ((32, 64), (1,), (8,), 3)
    assert plans["sd15", "cpu", True] == ((16,), (1,), (2,), 1)
    assert plans["sd15", "cuda", False] == ((64,), (1, 4, 16), (8, 16, 50), 20)
    assert plans["mini", "cpu", False] == ((8,), (1,), (8,), 3)


def test_on_a_gpu_each_kernel_counts_once():
    def event(key, device, us):
        return SimpleNamespace(key=key, device_type=getattr(torch.autograd.DeviceType, device),
                               self_device_time_total=us, self_cpu_time_total=1)

    kernels = [event("gemm", "CUDA", 30), event("add_kernel", "CUDA", 10)]
    operators = [event("aten::mm", "CPU", 30), event("aten::add", "CPU", 10),
                 event("cudaLaunchKernel", "CPU", 0)]
    kernels += [SimpleNamespace(is_user_annotation=True)]                # a span of the others
    assert tables.operator_shares(kernels + operators, True) == {"mm": 0.75, "add": 0.25}
    graph = [*kernels, event("aten::copy_", "CPU", 1), event("cudaGraphLaunch", "CPU", 0)]
    assert tables.operator_shares(graph, True) == {"gemm": 0.75, "add_kernel": 0.25}
    assert tables.operator_shares(operators, False) == {
        "mm": 0.333, "add": 0.333, "cudaLaunchKernel": 0.333}


def test_a_first_picture_that_fails_is_no_time():
    base, guides = tables.random_base(settled())
    with pytest.raises(tables.BadInput, match=r"fresh Python failed \(2\): sample.py: .*--size"):
        tables.fresh_processes(replace(settled(), side=(1,)), base, guides["tiny"])


def test_sentences(here, capsys, monkeypatch):
    for argv, said in (("--side 12", "multiples of 8"), ("--batch 0", "--batch: from 1"),
                       ("--steps 0", "--steps: from 1"), ("--rounds -1", "--rounds -1"),
                       ("--device abacus", "--device abacus"), ("--size xl", "invalid choice")):
        assert said in refusal(capsys, *QUICK, *argv.split())
    assert "speed comes first" in refusal(capsys, "--device", "cpu", "speed")
    with monkeypatch.context() as several:
        several.setenv("WORLD_SIZE", "2")
        assert "leave out torchrun" in refusal(capsys, *QUICK)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refusal(capsys, *QUICK, "--peer")
    assert not list(here.iterdir())


def test_a_peer_that_computes_something_else_is_refused(here, capsys, monkeypatch):
    build = tables.build_peer

    def other(base):
        pipe = build(base)
        pipe.unet.conv_out.bias = torch.nn.Parameter(pipe.unet.conv_out.bias + 1)
        return pipe

    monkeypatch.setattr(tables, "build_peer", other)
    assert "UNet pass: diffusers' output is off ours" in refusal(capsys, *QUICK, "--peer")
    assert not list(here.iterdir())
