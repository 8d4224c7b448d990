"""The benchmark's result: rows, ratios, its page, and the chart of how cost grows."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import torch

from evaluation.baseline import BASELINE
from evaluation.cost import Networks, count_macs, pass_costs
from evaluation.report import (
    bullet_list,
    earlier_result,
    image_file,
    markdown_table,
    protocol_list,
)
from evaluation.timing import is_gpu, steps_per_run
from evaluation.workload import METHODS
from support.cli import BadInput, require
from support.files import atomic_write, expand
from support.machine import provenance, resolve_dtype

HEAD = ("", "latents", "batch", "ms", "quartiles", "images/s", "peak GiB", "TFLOP/s",
        "of the matrix rate")
GROWTH = "UNet pass, captured"


# ------------------------------------------------------------------------------- arithmetic

def macs_per_image(nets: Networks, steps: tuple[int, ...]) -> dict[str, int]:
    """Multiply-accumulates of what is measured, for one image, attention included."""
    costs = {name: macs.total for name, macs in pass_costs(nets).items()}
    unet, hint, text = (costs[name] for name in ("base UNet", "hint encoder", "text encoder"))
    step = {"CFG": 2 * unet, "full": unet + costs["full guide"] - hint,
            "tiny": unet + costs["tiny guide, as computed"], "seeing": unet + costs["seeing guide"]}
    once = {"CFG": text, "full": hint, "tiny": 0, "seeing": 0}   # beside one prompt and the VAE
    macs = {"UNet pass": unet, "VAE decode": costs["VAE decoder"], "text encoding": text}
    macs |= {f"{method} step": step[method] for method in METHODS}
    return macs | {f"{method} image, {n} steps":
                   n * step[method] + once[method] + text + costs["VAE decoder"]
                   for method in METHODS for n in steps}


def unet_macs(nets: Networks) -> dict[str, int]:
    """Of `macs_per_image` the UNet's pass alone."""
    config = nets.unet.config
    shapes = ((1, config.in_channels, nets.side, nets.side), (1,),
              (1, nets.text.config.positions, config.context_dim))
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    return {"UNet pass": count_macs(lambda: nets.unet(*inputs)).total}


# ------------------------------------------------------------------------------- rows

def make_row(name: str, side: int, batch: int, timing: dict, macs: dict[str, int],
             matrix_rate: float) -> dict:
    """What was measured, and what follows from it."""
    row = {"what": name, "side": side, "batch": batch, **timing}
    seconds = timing["ms"] / 1000
    work = re.sub(", (captured|compiled)$", "", name.removeprefix(BASELINE))
    if work in macs:
        row["GMACs"] = batch * macs[work] / 1e9
        row["TFLOP/s"] = 2 * batch * macs[work] / seconds / 1e12
        row["of the matrix rate"] = row["TFLOP/s"] / matrix_rate
    if "image" in name or "update" in name:
        row["images/s"] = batch / seconds
    return {key: round(value, 5) if isinstance(value, float) else value
            for key, value in row.items()}


def ratios(rows: list[dict]) -> list[dict]:
    """Guides beside CFG, a seeing one beside a tiny one, ours beside the baseline, shared beside
    naive, recorded beside not: medians over rounds."""
    by_name = {(row["what"], row["side"], row["batch"]): row for row in rows}
    found = []
    for (name, side, batch), row in by_name.items():
        with_cfg = re.sub("^(full|tiny|seeing) ", "CFG ", name)
        with_tiny = re.sub("^seeing ", "tiny ", name)
        for other in dict.fromkeys((with_cfg, with_tiny, BASELINE + name, BASELINE + with_cfg,
                                    f"{name}, naive", name.removesuffix(", captured"))):
            beside = by_name.get((other, side, batch))
            if beside and other != name:
                ratio = statistics.median(a / b for a, b in zip(row["rounds"], beside["rounds"]))
                found.append({"side": side, "batch": batch, "ratio": f"{name} / {other}",
                              "median": round(ratio, 4)})
    return found


def row_cells(row: dict) -> list[str]:
    """A row's entries below HEAD."""
    def cell(key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    return [row["what"], f"{row['side']} × {row['side']}", str(row["batch"]), f"{row['ms']:,.4g}",
            " … ".join(f"{q:,.4g}" for q in row["quartiles"]), cell("images/s", ".3g"),
            cell("GiB", ".2f"), cell("TFLOP/s", ".3g"), cell("of the matrix rate", ".0%")]


def protocol(config, g: float) -> dict:
    """How it was measured."""
    steps = steps_per_run(config.device)
    on_gpu = (f"median and quartiles of {config.rounds} rounds, or of 3 where a round takes over "
              "two seconds, in which what is compared takes turns of a tenth of a second, after "
              "two calls to warm up")
    on_cpu = (f"median and quartiles of {config.rounds} rounds in which what is compared takes "
              "turns (of up to ten calls, as fit into a second), after one to warm up; of two "
              "rounds where they are long, after one or none")
    return {
        "weights": "random, seed 0", "g": g,
        "dtype": str(resolve_dtype(config.dtype, config.device)), "compiled": config.compile,
        "milliseconds": f"{on_gpu if is_gpu(config.device) else on_cpu}; ratios are medians of "
                        "each round's own",
        "captured": "recorded as a CUDA graph and replayed, as sample.py does; compiled calls are "
                    "recorded too",
        "a step": f"the time of a run of {steps} steps, divided by {steps}",
        "an image": "text encoder, sampling, VAE, as sample.py makes it, on a GPU from recorded "
                    "steps; diffusers': StableDiffusionPipeline, DDIM, eager",
        "memory": "peak that CUDA allocated while a call was warmed up and recorded, with all "
                  "networks on the GPU; of a CPU none",
        "arithmetic": "two operations a multiply-accumulate, attention's products included, of "
                      "plain passes: what a run computes once counts in each of its steps",
        "an update": "forward, backward, clipping and AdamW, from latents and text states, on a "
                     "GPU recorded; the base in the dtype above, the guide's weights in float32, "
                     "cast to it",
        **provenance(config, "diffusers", "transformers")}


# ------------------------------------------------------------------------------- the page

def speed_page(result: dict) -> str:
    """The page beside the result file."""
    ratios = [[r["ratio"], f"{r['side']} × {r['side']}", r["batch"], f"{r['median']:.3f}"]
              for r in result["ratios"]]
    values = {"matrix rate, TFLOP/s": result["matrix rate, TFLOP/s"]} | {
        f"{name}, difference from diffusers": value
        for name, value in result["differences from diffusers"].items()} | {
        f"{row['what']} at {row['side']} × {row['side']}, batch {row['batch']}, first call":
        f"{row['first call, s']:.1f} s" for row in result["rows"] if "first call, s" in row}
    lines = [f"# Speed, {result['size']}", "",
             *markdown_table(HEAD, map(row_cells, result["rows"]), "---:"), "",
             *growth_table(result["rows"]),
             *markdown_table(["ratio of times", "latents", "batch", ""], ratios, "---:"), "",
             *bullet_list(values), *protocol_list(result["protocol"]),
             *(f"- left out: {text}" for text in result.get("left out", []))]
    return "\n".join(lines) + "\n"


def growth_rows(rows: list[dict], who: str = "") -> list[dict]:
    """Recorded UNet passes, ours or the baseline's, from the least work to the most."""
    return sorted((row for row in rows if row["what"] == who + GROWTH),
                  key=lambda row: (row["side"], row["batch"]))


def growth_table(rows: list[dict]) -> list[str]:
    """How the cost of a UNet pass grows with side and batch; nothing where one alone was timed."""
    passes = growth_rows(rows)
    if len(passes) < 2:
        return []
    theirs = {(row["side"], row["batch"]): f"{row['ms']:,.4g}"
              for row in growth_rows(rows, BASELINE)}
    cells = [[f"{row['side']} × {row['side']}", row["batch"], f"{row['ms']:,.4g}",
              f"{row['ms'] / row['batch']:,.4g}", f"{row['of the matrix rate']:.0%}",
              theirs.get((row["side"], row["batch"]), "")] for row in passes]
    head = [f"{GROWTH}: latents", "batch", "ms", "ms an image", "of the matrix rate",
            "diffusers: ms"]
    return [*markdown_table(head, cells, "---:"), ""]


# ------------------------------------------------------------------------------- the chart

def growth(config) -> None:
    """`growth`: how cost grows with side and batch, drawn from a result of `speed`."""
    require((len(config.paths) > 1, "growth takes one result of speed"))
    file = expand((*config.paths, earlier_result(config, "speed-sd15-cuda"))[0])
    result = _read_result(file)
    require((len(growth_rows(result["rows"])) < 2,
             f"{file} has no UNet passes of several sides or batches recorded on a GPU: make it "
             "with `python eval.py speed --device cuda --baseline`"))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("this chart needs a package that is missing: pip install matplotlib"
                       ) from None
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    _draw_growth(figure.subplots(1, 3), result["rows"])
    figure.suptitle(f"{result['size']} on {result['protocol']['hardware']}, "
                    f"{result['protocol']['dtype'].removeprefix('torch.')}: how cost grows",
                    fontsize=11)
    path = image_file(config, "speed.png")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    print(f"written to {path}, from {file}")


def _read_result(file: Path) -> dict:
    require((not file.is_file(), f"there is no {file}: make it with `python eval.py speed "
                                 "--device cuda --baseline`"))
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        for row in result["rows"]:
            row["what"], row["side"], row["batch"], row["ms"]
        result["size"], result["protocol"]["hardware"], result["protocol"]["dtype"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file} is no result of speed") from error
    return result


def _draw_growth(panels, rows: list[dict]) -> None:
    """Milliseconds over the side, milliseconds an image over the batch, images a second."""
    by_side, by_batch, images = panels
    ours = growth_rows(rows)
    batch = min(row["batch"] for row in ours)
    sides = [row["side"] for row in ours]
    side = max(sides, key=sides.count)
    for who, name, form in (("", "ours", "o-"), (BASELINE, "diffusers", "s--")):
        passes = growth_rows(rows, who)
        _curve(by_side, [(row["side"], row["ms"]) for row in passes if row["batch"] == batch],
               form, name)
        _curve(by_batch, [(row["batch"], row["ms"] / row["batch"]) for row in passes
                          if row["side"] == side], form, name)
    curves: dict[str, list] = {}
    for row in rows:
        if " image, " in row["what"] and row["side"] == side:
            curves.setdefault(row["what"], []).append((row["batch"], row["images/s"]))
    several = [(name, points) for name, points in curves.items() if len(points) > 1]
    for k, (name, points) in enumerate(several or curves.items()):
        _curve(images, sorted(points), "osD^vP*X"[k % 8] + "-", name)
    by_side.set(xlabel="side of the latent", ylabel="ms", title=f"UNet pass, batch {batch}")
    by_batch.set(xlabel="batch", ylabel="ms an image", title=f"UNet pass, {side} × {side}")
    images.set(xlabel="batch", ylabel="images a second", title=f"whole images, {side} × {side}")
    for axes in panels:
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(fontsize=8)


def _curve(axes, points: list[tuple], form: str, name: str) -> None:
    if points:
        axes.plot(*zip(*points), form, label=name)
