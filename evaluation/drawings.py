"""Two drawings for the README: the method, and an animation of the sampling steps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torch import Tensor

import ppdd
from evaluation.figures import prepare
from evaluation.report import image_file
from evaluation.sampling import WITHOUT_GUIDE, Row, guide_row
from support import fast
from support.base import Base
from support.files import atomic_write
from support.images import labelled_grid, to_image

FROZEN = {"facecolor": "#dbe4ef", "edgecolor": "#71869e"}
TRAINED = {"facecolor": "#ffd8ad", "edgecolor": "#d97706"}
INK, SOFT = "#1f2933", "#66788a"
ENCODER, MIDDLE, DECODER = 552, 693, 720          # left edges of a UNet's three parts
RIGHT = 862                                       # of the blocks, where remarks stand
PITCH, BAR = 11, 8                                # from block to block, and a block's width
HEIGHTS = [side for side in (78, 60, 42, 26) for _ in range(3)]      # 12 blocks, 3 a resolution


# ------------------------------------------------------------------------------- the method

def method(config) -> None:
    """`eval.py method`: the drawing of the method."""
    path = image_file(config)
    draw_method(path)
    print(f"written to {path}")


def draw_method(path: Path) -> None:
    """CFG's two passes beside a guide's one (left), and what is inside both guides (right)."""
    with atomic_write(path) as temporary:
        method_figure().savefig(temporary, dpi=200, format="png")


def method_figure():
    """The drawing as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1000), ylim=(700, 0))       # one unit is a pixel of a page 1000 wide
    axes.axis("off")
    _cfg_panel(axes, 38)
    _guided_panel(axes, 386)
    axes.plot([398, 398], [25, 675], color="#d5dbe1", lw=1)
    _full_guide_panel(axes, 38)
    _tiny_guide_panel(axes, 386)
    _legend(axes, 664)
    return figure


def _cfg_panel(axes, y: float) -> None:
    _title(axes, 24, y, "Classifier-free guidance", "two UNet passes a step (Eq. 3)")
    for k, (prompt, name) in enumerate((("c", "with the prompt"), (r"\varnothing", "without it"))):
        row = y + 90 + 84 * k
        _text(axes, 24, row, f"$z_t,\\ t,\\ {prompt}$")
        _arrow(axes, (88, row), (112, row))
        _unet_sketch(axes, 116, row)
        _text(axes, 171, row + 40, name, size=9, color=SOFT, ha="center")
        _arrow(axes, (230, row), (256, row))
        _text(axes, 262, row, f"$\\epsilon_\\phi(z_t, {prompt})$")
    _text(axes, 24, y + 258, r"$\tilde{\epsilon} \;=\; (1 + g)\,\epsilon_\phi(z_t, c)"
                             r" \;-\; g\,\epsilon_\phi(z_t, \varnothing)$", size=12)


def _guided_panel(axes, y: float) -> None:
    _title(axes, 24, y, "With a guide", "one UNet pass a step (Eq. 4)")
    row = y + 90
    _text(axes, 24, row, r"$z_t,\ t,\ c$")
    _arrow(axes, (88, row), (112, row))
    _unet_sketch(axes, 116, row)
    _arrow(axes, (230, row), (256, row))
    _text(axes, 262, row, r"$\hat{\epsilon} \approx \tilde{\epsilon}$", size=12)
    _text(axes, 24, row + 102, r"$g,\ t,\ c$")
    _text(axes, 24, row + 134, "the full guide reads $z_t$ too", 9, SOFT)
    _arrow(axes, (80, row + 102), (112, row + 102))
    _box(axes, 116, row + 86, 110, 32, "guide", TRAINED)
    for x in (171, 186, 200, 214):
        _arrow(axes, (x, row + 86), (x, row + (15 if x == 171 else 28)), TRAINED["edgecolor"])
    _text(axes, 234, row + 58, "added to the skips and\nthe middle block", 9, SOFT)


def _full_guide_panel(axes, y: float) -> None:
    _title(axes, 424, y, "Full guide", r"a ControlNet: reads $g$, $t$, $c$ and $z_t$")
    base, guide = y + 110, y + 232                                     # middle lines of the two
    _unet(axes, base)
    axes.plot([ENCODER, MIDDLE], [guide, guide], color=TRAINED["edgecolor"], lw=1, zorder=0)
    _blocks(axes, ENCODER, guide, TRAINED)
    _block(axes, MIDDLE, guide, HEIGHTS[-1], TRAINED)
    _text(axes, 430, guide - 22, r"$z_t,\ t,\ c$")
    _arrow(axes, (487, guide - 22), (ENCODER - 3, guide - 22))
    _text(axes, 423, guide + 20, "$g$")
    _arrow(axes, (435, guide + 20), (446, guide + 20))
    _box(axes, 448, guide + 7, 84, 26, "hint encoder", TRAINED, size=9)
    _arrow(axes, (532, guide + 20), (ENCODER - 3, guide + 20))
    _skips(axes, guide, 1, TRAINED, ends=[guide + 4] * 12)
    _injections(axes, guide, base, middle=guide - 26)
    _text(axes, ENCODER, guide + 82, "copy of the encoder and the middle block", 9, SOFT)
    _text(axes, RIGHT, guide, "13 zero\nconvolutions", 9, SOFT)


def _tiny_guide_panel(axes, y: float) -> None:
    _title(axes, 424, y, "Tiny guide", r"Eq. 5: reads $g$, $t$ and $c$, not $z_t$")
    base, layers, total = y + 110, y + 202, y + 234
    _unet(axes, base)
    plain = {"facecolor": "white", "edgecolor": "#b8c2cc"}
    rows = (("$g$", "$g\\,/\\,10$", plain, ""),
            ("$t$", "time embedding", FROZEN, r"$\Theta_{z1}$"),
            ("$c$", "attention pooling", TRAINED, r"$\Theta_{z2}$"))
    for k, (symbol, first, kind, second) in enumerate(rows):
        row = total + 36 * (k - 1)
        _text(axes, 423, row, symbol)
        _arrow(axes, (435, row), (446, row))
        _box(axes, 448, row - 13, 116, 26, first, kind, size=9)
        if second:
            _arrow(axes, (564, row), (581, row))
            _box(axes, 583, row - 13, 34, 26, second, TRAINED)
        _arrow(axes, (617 if second else 564, row), (643, total + 5 * (k - 1)))
    _text(axes, 652, total, r"$\oplus$", size=15, ha="center")
    _injections(axes, layers, base, bus=total)
    _text(axes, RIGHT, total - 16, "13 layers $\\Theta_{z3}$:\none vector each, the\n"
                                   "same at every pixel", 9, SOFT)


def _legend(axes, y: float) -> None:
    _box(axes, 24, y - 9, 22, 18, "", FROZEN)
    _text(axes, 54, y, "frozen: the base", 10, SOFT)
    _box(axes, 186, y - 9, 22, 18, "", TRAINED)
    _text(axes, 216, y, "trained: the guide", 10, SOFT)


# -- shapes

def _unet(axes, y: float) -> None:
    """The frozen UNet, block by block, with its skips; y is its middle line."""
    _text(axes, 430, y, r"$z_t,\ t,\ c$")
    _arrow(axes, (487, y), (ENCODER - 3, y))
    axes.plot([ENCODER, RIGHT - 12], [y, y], color=FROZEN["edgecolor"], lw=1, zorder=0)
    _blocks(axes, ENCODER, y, FROZEN)
    _block(axes, MIDDLE, y, HEIGHTS[-1], FROZEN)
    _blocks(axes, DECODER, y, FROZEN, reverse=True)
    _skips(axes, y, -1, FROZEN, ends=[y - height / 2 for height in HEIGHTS])
    _arrow(axes, (DECODER + 12 * PITCH, y), (DECODER + 12 * PITCH + 22, y))
    _text(axes, DECODER + 12 * PITCH + 27, y, r"$\hat{\epsilon}$")
    _text(axes, RIGHT, y - 62, "12 skips", 9, SOFT)
    _text(axes, ENCODER, y + 52, "encoder", 9, SOFT)
    _text(axes, RIGHT, y + 30, "decoder", 9, SOFT)


def _blocks(axes, x: float, y: float, kind: dict, reverse: bool = False) -> None:
    for k, height in enumerate(reversed(HEIGHTS) if reverse else HEIGHTS):
        _block(axes, x + k * PITCH, y, height, kind)


def _block(axes, x: float, y: float, height: float, kind: dict) -> None:
    from matplotlib.patches import Rectangle

    width = 2 * BAR if x == MIDDLE else BAR
    axes.add_patch(Rectangle((x, y - height / 2), width, height, lw=0.8, **kind))


def _skips(axes, y: float, side: int, kind: dict, ends: list[float]) -> None:
    """From encoder blocks at y to the decoder blocks they belong to, above (−1) or below (1)."""
    for k, (height, end) in enumerate(zip(HEIGHTS, ends)):
        left = ENCODER + k * PITCH + BAR / 2
        right = DECODER + (11 - k) * PITCH + BAR / 2
        far = y + side * (44 + 2.2 * (11 - k))
        axes.plot([left, left, right, right], [y + side * height / 2, far, far, end], lw=0.7,
                  color=kind["edgecolor"], zorder=0)


def _injections(axes, y: float, base: float, bus: float = 0, middle: float = 0) -> None:
    """A layer at y below each of the 12 decoder blocks and the middle block, and its arrow up.

    The middle block's may be at another height. With a bus all 13 are fed by one line there.
    """
    color = TRAINED["edgecolor"]
    targets = [(DECODER + k * PITCH + BAR / 2, y, height)
               for k, height in enumerate(reversed(HEIGHTS))]
    for x, layer, height in [(MIDDLE + BAR, middle or y, HEIGHTS[-1]), *targets]:
        axes.plot([x], [layer], marker="s", ms=5, mfc=TRAINED["facecolor"], mec=color, mew=0.8)
        _arrow(axes, (x, layer - 5), (x, base + height / 2 + 2), color, width=0.8)
        if bus:
            axes.plot([x, x], [layer + 5, bus], color=color, lw=0.8, zorder=0)
    if bus:
        axes.plot([661, targets[-1][0]], [bus, bus], color=color, lw=1.2, zorder=0)


def _unet_sketch(axes, x: float, y: float) -> None:
    """A frozen UNet, 110 wide: encoder, middle block, decoder."""
    from matplotlib.patches import Polygon

    for points in ([(0, -26), (46, -13), (46, 13), (0, 26)],
                   [(110, -26), (64, -13), (64, 13), (110, 26)]):
        axes.add_patch(Polygon([(x + a, y + b) for a, b in points], **FROZEN, lw=1))
    _box(axes, x + 49, y - 13, 12, 26, "", FROZEN)


def _title(axes, x: float, y: float, title: str, subtitle: str) -> None:
    _text(axes, x, y, title, size=13, weight="bold")
    _text(axes, x, y + 22, subtitle, size=10, color=SOFT)


def _text(axes, x: float, y: float, text: str, size: float = 11, color: str = INK, **more) -> None:
    axes.text(x, y, text, fontsize=size, color=color, va="center", **{"ha": "left"} | more)


def _box(axes, x: float, y: float, width: float, height: float, text: str, kind: dict,
         size: float = 10) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=3",
                                  lw=1, **kind))
    _text(axes, x + width / 2, y + height / 2, text, size, ha="center")


def _arrow(axes, start: tuple, end: tuple, color: str = INK, width: float = 1.2) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>,head_width=.18,head_length=.32",
                                              "color": color, "lw": width, "shrinkA": 0,
                                              "shrinkB": 0})


# ------------------------------------------------------------------------------- the steps

def animation(config) -> None:
    """`eval.py animation`: eight steps of CFG and of the tiny guide, steps.webp."""
    path = image_file(config, "steps.webp")
    config, base, prompts, side = prepare(config)
    rows = [next(row for row in WITHOUT_GUIDE if row.name == "cfg-8"),
            guide_row(config, base, "tiny-8")]
    draw_animation(path, base, rows, prompts[:4], config.g[-1], config.seed, side)
    print(f"written to {path}")


def draw_animation(path: Path, base: Base, rows: list[Row], prompts: list[str], g: float,
                   seed: int, side: int) -> None:
    """A looping WebP: a line a row, a column a prompt, a frame a step, the last one held.

    Shown is the clean image that each step predicts, x̂ of Eq. 2; after the last step it is the
    image. Prompt k starts from the noise of seed + k in every row. All rows take as many steps.
    """
    seeds = range(seed, seed + len(prompts))
    predicted = [predicted_images(base, row, prompts, g, seeds, side) for row in rows]
    note = (f"The clean image that each step predicts. DDIM, g = {g:g} (guidance scale {1 + g:g} "
            "elsewhere), the same noise down a column.")
    frames = []
    for k, lines in enumerate(zip(*predicted), start=1):
        labels = [_step_label(row, k) for row in rows]
        frames.append(labelled_grid([f"\n{prompt}" for prompt in prompts], labels, lines, note))
    with atomic_write(path) as temporary:
        frames[0].save(temporary, "WEBP", save_all=True, append_images=frames[1:], loop=0,
                       duration=[600] * (len(frames) - 1) + [3000], lossless=True)


def _step_label(row: Row, step: int) -> str:
    name = row.title.partition(",")[0]
    passes = step * row.passes[0] // row.steps
    return f"{name}\n\nstep {step} of {row.steps}\n{passes} UNet pass{'es' * (passes > 1)}"


def predicted_images(base: Base, row: Row, prompts: list[str], g: float, seeds: Iterable[int],
                     side: int) -> list[list[Image.Image]]:
    """By step, the image of every prompt that the prediction of that step leads to at once."""
    times = ppdd.step_grid(row.steps)
    latents: list[Tensor] = []

    def step(unet, z: Tensor, *known) -> Tensor:
        eps = fast.predict_step(unet, z, *known)
        alpha, sigma = ppdd.alpha_sigma(times[len(latents)])
        latents.append((z - sigma * eps) / alpha)
        return eps

    c = base.embed(prompts)                                                        # (B, L, D)
    empty = base.embed([""]).expand_as(c) if row.kind == "cfg" else None
    shape = (base.unet.config.in_channels, side // 8, side // 8)
    z = ppdd.noise(seeds, shape).to(c.device)                                      # (B, Z, H, W)
    fast.sample(base.unet, z, c, g, row.steps, row.guide, empty, step=step)
    return [[to_image(image) for image in base.decode(x)] for x in latents]
