"""The paper's figures with this project's guides, and a chart of quality over time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import ppdd
from evaluation import sampling
from evaluation.metrics import JUDGE_ACCURACY
from evaluation.report import earlier_result, image_file, passes_text
from evaluation.sampling import Row
from support import fast
from support.base import Base, find_weights
from support.cli import BadInput, require
from support.files import atomic_write
from support.images import labelled_grid, save_png, to_image
from unet import injection_channels

MINI_PROMPTS = ("a big red boat on the sea at sunset, in the middle",
                "a small white house in the snow at night, on the left",
                "a big orange balloon in a meadow in the morning, in the middle",
                "a small blue car in the city at noon, on the right",
                "a big purple rocket in the desert at night, on the left")
SD_PROMPTS = ("a photograph of an astronaut riding a horse",
              "a lighthouse on a cliff at sunset, oil painting",
              "a red fox in the snow, soft morning light",
              "a wooden cabin by a mountain lake, watercolor")
FIG8 = ("full-16", "tiny-16", "tiny-seeing-16")


def prepare(config) -> tuple[object, Base, list[str], int]:
    """What every figure starts from: settings, base, prompts, and the side of the images."""
    base = sampling.load(config, find_weights(config.weights))
    prompts = list(config.prompt or (MINI_PROMPTS if base.is_miniature else SD_PROMPTS))
    return sampling.resolve_defaults(config), base, prompts, sampling.image_side(config, base)


def images_of(config, base: Base, row: Row, prompts: list[str], side: int) -> list[Image.Image]:
    """A row's image of every prompt, prompt k from noise seed + k, at the last g."""
    seeds = range(config.seed, config.seed + len(prompts))
    images = sampling.generate(base, row, prompts, config.g[-1], seeds, side)
    return [to_image(image) for image in images]


def heading(row: Row) -> str:
    """A row's title over two lines, and its passes."""
    name, _, rest = row.title.partition(", ")
    unet, guide = row.passes
    return f"{name}\n{rest}\n{passes_text(f'{unet} UNet', guide)} passes"


def save_figure(config, sheet: Image.Image) -> None:
    """Writes a figure, and says where it is."""
    path = image_file(config)
    save_png(path, sheet)
    print(f"written to {path}: {sheet.width} × {sheet.height}")


# ------------------------------------------------------------------------------- images

def fig5(config) -> None:
    """Fig. 5: the guides at 50, 16 and 8 steps, and the tiny one that was trained at one g."""
    def rows_of(config, base: Base) -> list[Row]:
        return [row for row in sampling.make_rows(config, base, sampling.GUIDES) if row.guide]

    _figure_by_row(config, rows_of,
                   "Fewer steps come from halving: one step learns what two did.")


def fig6(config) -> None:
    """Fig. 6: the guides beside CFG, from the same noise."""
    def rows_of(config, base: Base) -> list[Row]:
        rows = sampling.plugged_in_rows(replace(config, weights=str(base.path)), base)
        return [row for row in rows if row.steps == sampling.STAGE_ONE and not row.original]

    _figure_by_row(config, rows_of,
                   "CFG runs the UNet twice a step, with the prompt and without; a guide, told g, "
                   "adds to one pass what the other would have brought.")


def figfew(config) -> None:
    """A distilled UNet beside guides in 8, 4, 2 and 1 steps."""
    def rows_of(config, base: Base) -> list[Row]:
        rows = sampling.few_rows(config, base)
        sampling.require_guides([row for row in rows if row.kind == "whole"], base, "student")
        return [row for row in rows if (row.guide and row.steps <= 8)
                or (row.kind == "cfg" and row.steps == sampling.STAGE_ONE)]

    _figure_by_row(config, rows_of, "The student is a whole UNet, distilled as the guides are.")


def _figure_by_row(config, rows_of: Callable[[object, Base], list[Row]], note: str) -> None:
    """A sheet with a column a way of sampling and a line a prompt."""
    config, base, prompts, side = prepare(config)
    rows = sampling.require_guides(rows_of(config, base), base)
    rows = [row for row in rows if row.g_values(config.g[-1:])]
    columns = [images_of(config, base, row, prompts, side) for row in rows]
    g = config.g[-1]
    note = f"g = {g:g} (guidance scale {1 + g:g} elsewhere), DDIM, the same noise along a row. " \
           f"{note}"
    save_figure(config, labelled_grid([heading(row) for row in rows], prompts,
                                      list(zip(*columns)), note))


def fig8(config) -> None:
    """Fig. 8: the plain base's guides in fine-tuned bases, beside those bases' own CFG.

    At 16 steps, as in the paper; --guides adds others, and students.
    """
    labels = []
    lines = []
    for path in sampling.style_files(config):
        resolved, base, prompts, side = prepare(replace(config, weights=str(path)))
        for row in sampling.plugged_in_rows(config, base, FIG8):
            if row.guide or (row.kind == "cfg" and row.steps == sampling.STAGE_ONE):
                labels.append(f"{base.name}\n{heading(row)}")
                lines.append(images_of(resolved, base, row.on(base), prompts, side))
    note = (f"g = {resolved.g[-1]:g}, DDIM, the same noise down a column. What is plugged in was "
            "trained on the plain base only.")
    save_figure(config, labelled_grid([f"\n{prompt}" for prompt in prompts], labels, lines, note))


# ------------------------------------------------------------------------------- residuals

def fig7(config) -> None:
    """Fig. 7: what the stage-one guides add to the decoder, over steps and g."""
    config, base, prompts, side = prepare(config)
    rows = [row for row in sampling.make_rows(config, base)
            if row.guide and row.kind != "whole" and row.steps == sampling.STAGE_ONE]
    rows = sampling.require_guides(rows, base)
    sheets = [tiny_guide_sheet(base, row, prompts) if row.kind == "tiny" else
              full_guide_sheet(config, base, row, prompts[0], side) for row in rows]
    size = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    figure = Image.new("RGB", size, "white")
    y = 0
    for sheet in sheets:
        figure.paste(sheet, (0, y))
        y += sheet.height
    save_figure(config, figure)


def residual_maps(base: Base, row: Row, prompts: list[str], g: float, seed: int, side: int,
                  reduce: Callable[[Tensor], Tensor]) -> tuple[list[list[Tensor]], Tensor]:
    """What a full or a seeing guide adds, by step, then by injection point, and the images.

    These are (B, 3, side, side). reduce takes residuals (B, C, H, W) to maps (B, H, W).
    """
    maps: list[list[Tensor]] = []
    method = "control" if row.kind == "full" else "add_sight"
    add = getattr(row.guide, method)

    def recording(*args) -> list[Tensor]:
        residuals = add(*args)
        maps.append([reduce(residual.float()).cpu() for residual in residuals])
        return residuals

    setattr(row.guide, method, recording)
    try:
        # Not as a CUDA graph, whose replays don't come by here.
        images = sampling.generate(base, row, prompts, g, range(seed, seed + len(prompts)), side,
                                   fast.predict_step)
    finally:
        delattr(row.guide, method)              # the class's own shows again
    return maps, images


def full_guide_sheet(config, base: Base, row: Row, prompt: str, side: int) -> Image.Image:
    """Maps of what a full or a seeing guide adds: a line an injection point; columns are steps, by
    g."""
    times = ppdd.step_grid(row.steps)
    shown = [round(k * (row.steps - 1) / 5) for k in range(6)]
    maps = {}
    for g in config.g:
        steps, _ = residual_maps(base, row, [prompt], g, config.seed, side, lambda r: r.mean(1))
        maps[g] = [[part[0] for part in points] for points in steps]
    latent = side // 8
    map_side = latent * math.ceil(72 / latent)       # a multiple of every map's side
    points = point_names(base)
    headings: list[str] = []
    lines: list[list] = [[] for _ in points]
    for g in config.g:
        headings += ["", *(f"{f'g = {g:g}' if k == 0 else ''}\nt = {times[i]}"
                           for k, i in enumerate(shown))]
        for p, line in enumerate(lines):
            peak = max(step[p].abs().max() for steps in maps.values() for step in steps)
            colored = [color_map(maps[g][i][p] / peak.clamp(min=1e-12)) for i in shown]
            line += [None, *(image.resize((map_side, map_side), Image.Resampling.NEAREST)
                             for image in colored)]
    note = (f"What the {row.title.partition(',')[0]} adds at each place of the UNet's decoder "
            f"while it paints “{prompt}” in {row.steps} steps: mean over channels, each row of "
            "maps divided by its largest absolute value. White is 0, red positive, blue negative. "
            "A skip is what one block of the encoder hands to the decoder.")
    return labelled_grid(headings, points, lines, note, map_side)


@torch.no_grad()
def tiny_guide_sheet(base: Base, row: Row, prompts: list[str]) -> Image.Image:
    """Norms of a tiny guide's residuals over t and g, a heat map an injection point."""
    c = base.embed(prompts)
    gs = torch.linspace(9, 2, 36).tolist()
    times = ppdd.step_grid(sampling.STAGE_ONE)[:-1]
    emb = base.unet.embed_time(torch.tensor(times, device=c.device))
    norms = torch.stack([
        torch.stack([residual_norms(row.guide, g, emb, state) for state in c]).mean(0)
        for g in gs], dim=1)                                                       # (P, G, T)
    peaks = norms.amax((1, 2)).clamp(min=1e-12)
    headings = [f"{name}\nlargest norm {peak:.3g}" for name, peak in zip(point_names(base), peaks)]
    name = row.title.partition(",")[0]
    note = (f"What the {name} adds is the same at every pixel: one vector. Its norm over the "
            f"timestep t and g, mean of {len(prompts)} prompts, each map divided by its largest "
            "norm: white is 0, the darkest red that norm.")
    axes = f"{name}\n\nupwards: g from 2 to 9\nto the right: t from 999 down to {times[-1]}"
    maps = [color_map(part / peak) for part, peak in zip(norms, peaks)]
    return labelled_grid(headings, [axes], [maps], note, 200)


def residual_norms(guide: nn.Module, g: float, emb: Tensor, c: Tensor) -> Tensor:
    """Norms (P, T) of what a tiny guide adds at P points, for T time embeddings and a prompt."""
    n = len(emb)
    residuals = guide(emb.new_full((n,), g, dtype=torch.float), emb, c.expand(n, -1, -1))
    return torch.stack([r.float().flatten(1).norm(dim=1) for r in residuals]).cpu()


def point_names(base: Base) -> list[str]:
    """The injection points, in the order of a guide's residuals."""
    *skips, middle = injection_channels(base.unet.config)
    return [*(f"skip {k}\n{n} channels" for k, n in enumerate(skips)), f"middle\n{middle} channels"]


def color_map(values: Tensor) -> Image.Image:
    """A map (H, W) in −1 … 1: white at 0, through red to dark red, through blue to dark blue."""
    ramp = torch.tensor([[8., 28, 88], [70, 120, 200], [255, 255, 255], [222, 84, 56], [92, 8, 18]])
    position = 2 * (values.clamp(-1, 1) + 1)                                       # 0 … 4
    low = position.floor().clamp(max=3).long()
    color = torch.lerp(ramp[low], ramp[low + 1], (position - low)[..., None])      # (H, W, 3)
    return Image.fromarray(color.round().byte().numpy())


# ------------------------------------------------------------------------------- quality over time

def quality(config) -> None:
    """Distance and caption accuracy over milliseconds an image, from Table 2's result."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("this chart needs a package that is missing: pip install matplotlib"
                       ) from None
    source = earlier_result(config, "table2")
    name, base = _table2_base(source)
    rows = list(base["rows"].values())
    g = max((g for row in rows for g in row["cells"]), key=float)
    distance = base["measured by"]["distance"]
    scores = {distance.split()[0]: f"{distance}, lower is better"}
    if JUDGE_ACCURACY in base["measured by"]:
        scores["caption accuracy"] = "images with every attribute as asked, in %"
    figure = Figure(figsize=(6.4 * len(scores), 5.6), layout="constrained")
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, (score, label) in zip(panels, scores.items()):
        _draw_curves(axes, rows, score, g)
        axes.set(xscale="log", xlabel="milliseconds an image, from prompt to pixels", ylabel=label)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{name}, g = {g}: quality over time. Beside each point its number of steps; "
                    "bars: standard deviation over seeds", fontsize=10)
    path = image_file(config)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    print(f"written to {path}, from {source}")


def _table2_base(file: Path) -> tuple[str, dict]:
    require((not file.exists(), f"there is no {file}: make it with `python eval.py table2`"))
    try:
        return next(iter(json.loads(file.read_text(encoding="utf-8"))["bases"].items()))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise BadInput(f"{file} is no result of table2: move it away") from error


def _draw_curves(axes, rows: list[dict], score: str, g: str) -> None:
    """A curve a method, through its numbers of steps, at g; no guidance is at g = 0."""
    curves: dict[str, list[dict]] = {}
    for row in rows:
        if {g, "0"} & row["cells"].keys():
            method = re.sub(r", \d+ steps?", "", row["title"])
            curves.setdefault(method, []).append(row)
    # No guidance is black; matplotlib's own colours are ten.
    colors = ["black", *(f"C{k}" for k in range(10)), "navy", "darkred"]
    for k, (method, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda row: row["milliseconds"]["median"])
        cells = [row["cells"].get(g) or row["cells"]["0"] for row in points]
        x = [row["milliseconds"]["median"] for row in points]
        y = [cell["mean"][score] for cell in cells]
        spread = [cell["spread"][score] or 0 for cell in cells]
        color = colors[k % len(colors)]
        axes.errorbar(x, y, spread, fmt="osD^vP*X"[k % 8] + "-", color=color, capsize=3,
                      label=method)
        for row, point in zip(points, zip(x, y)):
            axes.annotate(row["steps"], point, (5, 5), textcoords="offset points", fontsize=8)
