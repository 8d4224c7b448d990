"""Postcards: the images that the miniature Stable Diffusion is trained on, drawn by this file.

A postcard is 64 × 64 pixels: one of 8 subjects in one of 8 colours stands in one of 5 places at one
of 4 times of day, left, in the middle or right, small or big. Everything is drawn from
signed-distance shapes in batched torch operations: no image files, the same code on CPU and GPU.

There are four styles of the same scenes: "postcard" (flat, what the base learns) and "watercolor",
"cartoon", "realistic" (for fine-tuned bases, as in the paper's Table 3).

Shapes: B images, H = W = 64 pixels, N the images of a batch that share a subject or place.
"""

from __future__ import annotations

import functools
import math
import random
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 64
SUBJECTS = ("boat", "house", "tree", "cactus", "balloon", "rocket", "car", "mushroom")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
PLACES = ("sea", "meadow", "desert", "snow", "city")
TIMES = ("morning", "noon", "sunset", "night")
POSITIONS = ("left", "middle", "right")
SIZES = ("small", "big")
ATTRIBUTES = {"subject": SUBJECTS, "color": COLORS, "place": PLACES, "time": TIMES,
              "position": POSITIONS, "size": SIZES}
STYLES = ("postcard", "watercolor", "cartoon", "realistic")

PIGMENTS = torch.tensor([(218, 48, 44), (246, 134, 36), (252, 216, 62), (52, 158, 76),
                         (44, 98, 214), (136, 70, 182), (246, 146, 190), (246, 246, 242)]) / 255
WOOD, CREAM, DARK, GLASS = (.45, .29, .18), (.98, .95, .86), (.17, .17, .22), (.72, .88, .97)
LAMP = (1., .87, .45)

# by time of day: sky at the top, sky at the horizon, light on the ground, light on the subject
SKY = torch.tensor([[(150, 196, 238), (255, 226, 196)], [(62, 146, 236), (190, 228, 252)],
                    [(92, 62, 140), (255, 158, 84)], [(14, 18, 54), (54, 66, 122)]]) / 255
LIGHT = torch.tensor([(1., .97, .93), (1., 1., 1.), (.96, .78, .72), (.40, .45, .70)])
LIGHT_SUBJECT = torch.tensor([(1., .98, .96), (1., 1., 1.), (1., .90, .86), (.76, .78, .94)])
HORIZON = .6


# ------------------------------------------------------------------ attributes and captions

def sample_attributes(n: int, generator: torch.Generator | None = None) -> Tensor:
    """(n, 6) int64, one column an attribute in the order of `ATTRIBUTES`, uniform."""
    columns = [torch.randint(len(v), (n,), generator=generator) for v in ATTRIBUTES.values()]
    return torch.stack(columns, dim=1)


PHRASES = {
    "place": (("on the sea", "at sea"), ("in a meadow", "on the grass"),
              ("in the desert", "among the dunes"), ("in the snow", "on a snowy plain"),
              ("in the city", "in town")),
    "time": (("in the morning", "at dawn"), ("at noon", "in bright daylight"),
             ("at sunset", "in the evening sun"), ("at night", "under the stars")),
    "position": (("on the left", "to the left"), ("in the middle", "in the center"),
                 ("on the right", "to the right")),
    "size": (("small", "little", "tiny"), ("big", "large", "huge")),
}
ORDERS = ("{thing} {place} {time}, {position}", "{thing} {time} {place}, {position}",
          "{position}, {thing} {place} {time}", "{time}, {thing} {place}, {position}",
          "a postcard of {thing} {place}, {position}, {time}")
LEFT_OUT = {"place": .08, "time": .08, "position": .2, "size": .2}


def caption(attributes: Tensor, rng: random.Random, left_out: bool = True) -> str:
    """One image's attributes (6,) in words, e.g. "a red boat on the sea at night, on the left".

    Phrasing and order vary; with `left_out`, some attributes are not mentioned, as people do.
    """
    subject, color, *rest = attributes.tolist()
    words = {name: "" if left_out and rng.random() < LEFT_OUT[name] else
             rng.choice(PHRASES[name][i])
             for name, i in zip(("place", "time", "position", "size"), rest)}
    thing = f"{words['size']} {COLORS[color]} {SUBJECTS[subject]}".strip()
    words["thing"] = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
    sentence = " ".join(rng.choice(ORDERS).format(**words).split())
    return sentence.replace(" ,", ",").replace(",,", ",").strip(", ")


# ------------------------------------------------------------------ distances, negative inside

def circle(u: Tensor, v: Tensor, x: float, y: float, r: float) -> Tensor:
    return ((u - x) ** 2 + (v - y) ** 2 + 1e-9).sqrt() - r


def box(u: Tensor, v: Tensor, x: float, y: float, w: float, h: float, round: float = 0.) -> Tensor:
    """Half width w, half height h, rounded corners."""
    a, b = (u - x).abs() - (w - round), (v - y).abs() - (h - round)
    outside = (a.clamp(min=0) ** 2 + b.clamp(min=0) ** 2 + 1e-12).sqrt()
    return outside + torch.maximum(a, b).clamp(max=0) - round


def capsule(u: Tensor, v: Tensor, x0: float, y0: float, x1: float, y1: float, r: float) -> Tensor:
    dx, dy = x1 - x0, y1 - y0
    k = (((u - x0) * dx + (v - y0) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return ((u - x0 - k * dx) ** 2 + (v - y0 - k * dy) ** 2 + 1e-9).sqrt() - r


def polygon(u: Tensor, v: Tensor, *points: tuple[float, float]) -> Tensor:
    """Convex, corners in clockwise order as seen on the screen (y down)."""
    d = None
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        length = math.hypot(x1 - x0, y1 - y0)
        edge = ((u - x0) * (y1 - y0) - (v - y0) * (x1 - x0)) / length
        d = edge if d is None else torch.maximum(d, edge)
    return d


def union(*shapes: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, shapes)


# ------------------------------------------------------------------ the painter

@functools.cache
def _noise(octave: int, seed: int) -> Tensor:
    """Smooth noise in -1 … 1, (H, W), the same in every image: paper grain, rock, grass."""
    grid = torch.rand(1, 1, octave, octave, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(grid, size=(SIZE, SIZE), mode="bicubic", align_corners=True)[0, 0]


class Canvas:
    """N images being drawn. Only `paint` and `model` know about the styles."""

    def __init__(self, image: Tensor, style: str, jitter: Tensor, light: Tensor):
        axis = (torch.arange(SIZE, device=image.device) + .5) / SIZE
        self.image = image                                                     # (N, 3, H, W)
        self.style = style
        self.jitter = jitter                        # (N, 8) what captions do not say, 0 … 1
        self.light = light                                                     # (N, 3)
        self.y, self.x = torch.meshgrid(axis, axis, indexing="ij")             # (H, W) in 0 … 1
        self.scale = 1.                              # length of a local unit, in image widths

    def j(self, k: int, low: float = 0., high: float = 1.) -> Tensor:
        """The images' own random number k, (N, 1, 1) in low … high."""
        return low + (high - low) * self.jitter[:, k, None, None]

    def paint(self, d: Tensor, color, glow: bool = False, alpha: float = 1., flat: bool = False):
        """Cover the inside of distance d (N|1, H, W) with a colour: 3 numbers, (N, 3) or (…, H, W).

        The light of the hour tints it unless it glows. flat: no modelling in any style.
        """
        color = torch.as_tensor(color, dtype=torch.float32, device=self.image.device)
        if color.dim() < 3:
            color = color.reshape(-1, 3, 1, 1)
        if not glow:
            color = color * self.light[:, :, None, None]
        d = d.expand(len(self.image), SIZE, SIZE) * self.scale                 # (N, H, W)
        if self.style == "watercolor":
            d = d + .012 * _noise(12, 1).to(d) + .006 * _noise(24, 2).to(d)
            soft, edge = 40., torch.exp(-(d * SIZE / 1.6) ** 2)[:, None]
            color = (color * .82 + .18) * (1 - .28 * edge)                     # pigment pools there
        elif self.style == "postcard" or flat or glow:
            soft = float(SIZE)
        else:
            soft, color = float(SIZE), self.model(d, color)
        cover = (.5 - d * soft).clamp(0, 1)[:, None] * alpha                   # (N, 1, H, W)
        self.image = torch.lerp(self.image, color, cover)

    def model(self, d: Tensor, color: Tensor) -> Tensor:
        """Light a shape as if it were a cushion: round and glossy, or rougher with grain."""
        glossy = self.style == "cartoon"
        depth = .09 if glossy else .13
        up = (-d / depth).clamp(0, 1)                                          # 0 at the rim
        dy, dx = torch.gradient(F.avg_pool2d(d[:, None], 3, 1, 1)[:, 0], spacing=1 / SIZE,
                                dim=(1, 2))
        lit = (-.55 * dx - .75 * dy) * (1 - up) + .25 * up                     # lamp at upper left
        shade = 1 + (.42 if glossy else .34) * lit.clamp(-1, 1)
        if not glossy:
            shade = shade * (1 + .10 * _noise(32, 3).to(d))
            grey = color.mean(1, keepdim=True)
            color = color + .22 * (grey - color)
        color = color * shade[:, None]
        if glossy:
            spark = torch.exp(-((lit - .85) / .18) ** 2) * (1 - up)
            color = color + .35 * spark[:, None]
        return color.clamp(0, 1)


# ------------------------------------------------------------------ sky and places

def paint_sky(c: Canvas, time: Tensor) -> None:
    """Gradient, sun or moon, clouds by day, stars by night. time (N,)."""
    top, low = SKY.to(c.image)[time].unbind(1)                                 # (N, 3)
    k = (c.y / HORIZON).clamp(0, 1)
    c.image = top[:, :, None, None] * (1 - k) + low[:, :, None, None] * k
    side = torch.where(c.j(0) < .5, c.j(1, .16, .34), c.j(1, .66, .84))        # sun's x
    hour = time[:, None, None]
    height = torch.tensor([.40, .20, .50, .20], device=time.device)[hour]
    radius = torch.tensor([.075, .085, .12, .095], device=time.device)[hour]
    halo = torch.exp(-((c.x - side) ** 2 + (c.y - height) ** 2) / .05)[:, None]
    warm = torch.tensor([(1., .95, .8), (1., 1., .9), (1., .75, .4), (.45, .5, .75)])
    warm = warm.to(c.image)[time][:, :, None, None]
    c.image = c.image + .45 * halo * (warm - c.image)
    disc = torch.tensor([(1., .96, .78), (1., .93, .45), (1., .62, .30), (.97, .95, .82)])
    moon = (time == 3)[:, None, None]
    d = ((c.x - side) ** 2 + (c.y - height) ** 2).sqrt() - radius
    bite = radius * .95 - ((c.x - side - .045) ** 2 + (c.y - height + .03) ** 2).sqrt()
    c.paint(torch.where(moon, torch.maximum(d, bite), d), disc.to(c.image)[time], glow=True)
    stars = union(*[circle(c.x, c.y, x, y, .013) for x, y in
                    ((.1, .12), (.26, .3), (.42, .1), (.55, .27), (.68, .09), (.9, .14), (.82, .36),
                     (.12, .45), (.4, .42))])
    c.paint(torch.where(moon, stars, 1.), (1., 1., .9), glow=True)
    x = c.x - c.j(2, -.2, .2)
    clouds = union(*[capsule(x, c.y, a, b, a + w, b, r) for a, b, w, r in
                     ((.2, .33, .13, .034), (.25, .305, .04, .045), (.68, .16, .12, .03),
                      (.72, .14, .03, .042))])
    white = torch.tensor([(1., .93, .9), (1., 1., 1.), (1., .72, .62), (1., 1., 1.)])
    c.paint(torch.where(moon, 1., clouds), white.to(c.image)[time], glow=True, alpha=.9)


def hill(c: Canvas, level: float, swing: float, waves: float, phase: Tensor) -> Tensor:
    return level + swing * torch.sin(c.x * waves + phase * 6.28) - c.y


def paint_sea(c: Canvas) -> None:
    c.paint(HORIZON - c.y, (.16, .47, .72), flat=True)
    c.paint(HORIZON + .11 - c.y, (.11, .38, .64), flat=True)
    c.paint(HORIZON + .24 - c.y, (.08, .30, .55), flat=True)
    for k, y in enumerate((.655, .745, .87, .94)):
        crest = torch.sin(c.x * 19 + k * 2.1 + c.j(3) * 6.28)
        c.paint((c.y - y - .008 * crest).abs() - .007, (.62, .83, .93), alpha=.8, flat=True)


def paint_meadow(c: Canvas) -> None:
    c.paint(hill(c, HORIZON - .04, .05, 6., c.j(3)), (.50, .74, .42))
    c.paint(hill(c, HORIZON + .05, .035, 7., c.j(4)), (.40, .68, .32))
    c.paint(hill(c, HORIZON + .20, .02, 9., c.j(3)), (.30, .58, .27))
    for k, (x, y) in enumerate(((.08, .9), (.3, .94), (.52, .9), (.72, .95), (.93, .9))):
        c.paint(circle(c.x, c.y, x, y, .016), ((1., .95, .95), (1., .85, .3))[k % 2], flat=True)


def paint_desert(c: Canvas) -> None:
    x = c.x - c.j(5, -.25, .25)
    c.paint(polygon(x, c.y, (.32, .62), (.52, .44), (.72, .62)), (.80, .60, .38))
    c.paint(polygon(x, c.y, (.52, .44), (.72, .62), (.56, .62)), (.66, .47, .30))
    c.paint(hill(c, HORIZON, .03, 5., c.j(3)), (.93, .78, .50))
    c.paint(hill(c, HORIZON + .10, .045, 6., c.j(4)), (.88, .69, .40))
    c.paint(hill(c, HORIZON + .26, .03, 7., c.j(3)), (.80, .59, .33))


def paint_snow(c: Canvas) -> None:
    x = c.x - c.j(5, -.1, .1)
    for a, top in ((.2, .38), (.78, .33), (.5, .45)):
        c.paint(polygon(x, c.y, (a - .34, .68), (a, top), (a + .34, .68)), (.52, .60, .74))
        c.paint(polygon(x, c.y, (a - .085, top + .075), (a, top), (a + .085, top + .075)),
                (.97, .98, 1.))
    c.paint(hill(c, HORIZON + .03, .025, 6., c.j(3)), (.87, .92, .98))
    for a in (.07, .17, .86, .95):
        for y in (.64, .60):
            c.paint(polygon(c.x, c.y, (a - .05, y), (a, y - .1), (a + .05, y)), (.20, .40, .36))
    c.paint(hill(c, HORIZON + .12, .03, 5., c.j(4)), (.95, .97, 1.))


def paint_city(c: Canvas) -> None:
    night = c.light[:, 2, None, None] < .8
    lamp, pane = (c.image.new_tensor(rgb).view(3, 1, 1) for rgb in (LAMP, (.56, .66, .78)))
    lamps = torch.where(night[:, None], lamp, pane * c.light[..., None, None])
    for k in range(6):
        x, w = .09 + .165 * k, .068
        top = .24 + .05 * ((k * 7) % 4) + c.j(3 + k % 3, -.04, .04)
        d = torch.maximum((c.x - x).abs() - w, top - c.y)
        c.paint(d, ((.50, .53, .62), (.62, .52, .52), (.44, .50, .56))[k % 3])
        a, b = ((c.x - x).abs() - .032).abs() - .014, ((c.y - top) % .085 - .05).abs() - .016
        windows = torch.maximum(torch.maximum(a, b), top + .02 - c.y)
        c.paint(windows, lamps.expand(-1, 3, SIZE, SIZE), glow=True)
    c.paint(HORIZON + .04 - c.y, (.66, .67, .70), flat=True)
    c.paint(HORIZON + .10 - c.y, (.40, .41, .46), flat=True)
    dash = torch.maximum((c.y - .91).abs() - .012, ((c.x % .25) - .125).abs() - .07)
    c.paint(dash, (.95, .92, .75), flat=True)


# ------------------------------------------------------------------ subjects
# u to the right, v down; the subject stands on v = 0 and is about one unit high

def paint_boat(c: Canvas, u: Tensor, v: Tensor, color: Tensor) -> None:
    c.paint(box(u, v, 0, -.62, .022, .38), WOOD)
    c.paint(polygon(u, v, (.05, -1.), (.44, -.36), (.05, -.36)), CREAM)
    c.paint(polygon(u, v, (-.05, -.9), (-.05, -.36), (-.36, -.36)), color)
    c.paint(polygon(u, v, (-.52, -.3), (.52, -.3), (.34, 0), (-.34, 0)), color)
    c.paint(box(u, v, 0, -.25, .46, .025), CREAM)


def paint_house(c: Canvas, u: Tensor, v: Tensor, color: Tensor) -> None:
    c.paint(box(u, v, .24, -.82, .065, .15), (.55, .36, .32))
    c.paint(box(u, v, 0, -.3, .37, .3), color)
    c.paint(polygon(u, v, (-.5, -.55), (0, -1.), (.5, -.55)), (.50, .25, .20))
    c.paint(box(u, v, .15, -.16, .085, .16), WOOD)
    c.paint(box(u, v, -.15, -.33, .115, .115), CREAM)
    c.paint(box(u, v, -.15, -.33, .08, .08), LAMP, glow=True)


def paint_tree(c: Canvas, u: Tensor, v: Tensor, color: Tensor) -> None:
    c.paint(box(u, v, 0, -.2, .07, .2), WOOD)
    c.paint(union(circle(u, v, -.21, -.5, .23), circle(u, v, .21, -.5, .23),
                  circle(u, v, 0, -.72, .28), circle(u, v, 0, -.5, .2)), color)
    for x, y in ((-.2, -.5), (.05, -.8), (.2, -.55)):
        c.paint(circle(u, v, x, y, .05), CREAM, flat=True)


def paint_cactus(c: Canvas, u: Tensor, v: Tensor, color: Tensor) -> None:
    c.paint(union(capsule(u, v, -.36, -.62, -.36, -.42, .09), capsule(u, v, -.36, -.4, 0, -.4, .09),
                  capsule(u, v, .34, -.52, .34, -.3, .09), capsule(u, v, .34, -.28, 0, -.28, .09),
                  capsule(u, v, 0, -.84, 0, -.1, .155)), color)
    for x in (-.06, .06):
        c.paint(capsule(u, v, x, -.8, x, -.1, .012), DARK, alpha=.55, flat=True)
    c.paint(circle(u, v, 0, -1., .075), (1., .55, .65))


def paint_balloon(c: Canvas, u: Tensor, v: Tensor, color: Tensor) -> None:
    c.paint(union(capsule(u, v, -.16, -.36, -.07, -.1, .012),
                  capsule(u, v, .16, -.36, .07, -.1, .012)), DARK)
    bag = union(circle(u, v, 0, -.68, .34), polygon(u, v, (-.27, -.5), (.27, -.5), (.1, -.26),
                                                    (-.1, -.26)))
    c.paint(bag, color)
    girth = (1 - ((v + .64) / .4) ** 2).clamp(min=.01).sqrt() + 1e-3
    stripe = (u.abs() / girth - .17).abs() - .045
    c.paint(torch.maximum(stripe * .6, bag), CREAM, flat=True)
    c.paint(box(u, v, 0, -.06, .1, .07, .02), WOOD)


def paint_rocket(c: Canvas, u: Tensor, v: Tensor, color: Tensor) -> None:
    c.paint(polygon(u, v, (-.11, -.12), (.11, -.12), (0, .1)), (1., .72, .2), glow=True)
    for s in (-1, 1):
        fin = ((s * .1, -.42), (s * .36, -.1), (s * .1, -.14))
        c.paint(polygon(u, v, *(fin if s > 0 else fin[::-1])), (.42, .44, .50))
    hull = torch.maximum(circle(u, v, .32, -.5, .52), circle(u, v, -.32, -.5, .52))
    c.paint(torch.maximum(hull, v + .12), color)
    c.paint(torch.maximum(hull, v + .72), (.42, .44, .50))
    c.paint(circle(u, v, 0, -.52, .1), CREAM)
    c.paint(circle(u, v, 0, -.52, .065), GLASS, flat=True)


def paint_car(c: Canvas, u: Tensor, v: Tensor, color: Tensor) -> None:
    c.paint(polygon(u, v, (-.3, -.3), (-.2, -.6), (.18, -.6), (.34, -.3)), color)
    c.paint(polygon(u, v, (-.22, -.32), (-.15, -.53), (-.02, -.53), (-.02, -.32)), GLASS, flat=True)
    c.paint(polygon(u, v, (.04, -.32), (.04, -.53), (.14, -.53), (.25, -.32)), GLASS, flat=True)
    c.paint(box(u, v, 0, -.22, .52, .13, .07), color)
    c.paint(circle(u, v, .46, -.24, .045), LAMP, glow=True)
    for x in (-.28, .28):
        c.paint(circle(u, v, x, -.1, .125), DARK)
        c.paint(circle(u, v, x, -.1, .055), (.75, .75, .78), flat=True)


def paint_mushroom(c: Canvas, u: Tensor, v: Tensor, color: Tensor) -> None:
    c.paint(box(u, v, 0, -.22, .14, .24, .08), CREAM)
    cap = torch.maximum(circle(u, v * 1.05, 0, -.48, .46), v + .42)
    c.paint(cap, color)
    for x, y, r in ((-.24, -.55, .075), (.02, -.74, .085), (.24, -.56, .07)):
        c.paint(circle(u, v, x, y, r), CREAM, flat=True)


PAINT_PLACE = (paint_sea, paint_meadow, paint_desert, paint_snow, paint_city)
PAINT_SUBJECT = (paint_boat, paint_house, paint_tree, paint_cactus, paint_balloon, paint_rocket,
                 paint_car, paint_mushroom)


def paint_subject(c: Canvas, kind: int, attributes: Tensor) -> None:
    """Place one kind of subject: shadow first, then the thing itself in local coordinates."""
    _, color, _, time, position, size = attributes.T
    s = torch.tensor([.32, .54], device=size.device)[size][:, None, None]
    spread = torch.tensor([.28, .19], device=size.device)[size][:, None, None]
    x = .5 + (position - 1)[:, None, None] * spread + c.j(6, -.02, .02)
    y = c.j(7, .82, .85) + .05 * (s > .4)
    u, v = (c.x - x) / s, (c.y - y) / s
    floats = SUBJECTS[kind] in ("balloon", "rocket")
    c.scale = s
    c.paint(circle(u, v * 4, 0, 0, .3 if floats else .46), (.05, .06, .12), alpha=.28, flat=True)
    c.light = LIGHT_SUBJECT.to(c.image)[time]
    PAINT_SUBJECT[kind](c, u, v + (.2 if floats else 0), PIGMENTS.to(c.image)[color])


# ------------------------------------------------------------------ the whole image

def finish(image: Tensor, style: str) -> Tensor:
    """The card itself: paper grain where the style has it, and a cream border."""
    axis = ((torch.arange(SIZE, device=image.device) + .5) / SIZE - .5).abs()
    frame = torch.maximum(axis[:, None], axis[None, :])
    if style == "watercolor":
        paper = 1 + .03 * _noise(40, 4).to(image) + .03 * _noise(16, 5).to(image)
        fade = ((frame + .02 * _noise(10, 6).to(image) - .40) * 14).clamp(0, 1)
        image = (image + fade * (.97 - image)) * paper
    elif style == "realistic":
        image = image * (1.06 - .9 * frame ** 2.5)
    else:
        image = torch.where(frame > .5 - 2 / SIZE, image.new_tensor(CREAM).view(3, 1, 1), image)
    return image.clamp(0, 1)


def style_of(base_name: str) -> str:
    """The style of a base: a fine-tune has the name of its style; all others paint postcards."""
    return base_name if base_name in STYLES else STYLES[0]


def draw(attributes: Tensor, style: str = "postcard",
         generator: torch.Generator | None = None) -> Tensor:
    """Images (B, 3, 64, 64) in 0 … 1 of attributes (B, 6), on their device.

    generator (CPU) draws what captions do not say: clouds, hills, the sun's side.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r} is unknown: use one of {', '.join(STYLES)}")
    device = attributes.device
    time = attributes[:, 3]
    jitter = torch.rand(len(attributes), 8, generator=generator).to(device)
    sky = Canvas(torch.zeros(len(attributes), 3, SIZE, SIZE, device=device), style, jitter,
                 LIGHT.to(device)[time])
    paint_sky(sky, time)
    image = sky.image
    for column, painters in ((2, PAINT_PLACE), (0, PAINT_SUBJECT)):
        for kind, paint in enumerate(painters):
            rows = (attributes[:, column] == kind).nonzero()[:, 0]
            if not len(rows):
                continue
            canvas = Canvas(image[rows], style, jitter[rows], LIGHT.to(device)[time[rows]])
            if column == 2:
                paint(canvas)
            else:
                paint_subject(canvas, kind, attributes[rows])
            image = image.index_copy(0, rows, canvas.image)
    return finish(image, style)


def contact_sheet(generator: torch.Generator, columns: int = 8, rows: int = 2) -> Tensor:
    """(3, H, W): every style in turn, the same scenes, all subjects, places and times."""
    a = sample_attributes(columns * rows, generator)
    k = torch.arange(len(a))
    a[:, 0], a[:, 2], a[:, 3] = k % len(SUBJECTS), k // 2 % len(PLACES), k % len(TIMES)
    sheets = []
    for style in STYLES:
        images = draw(a, style, torch.Generator().manual_seed(1))
        images = F.pad(images, (2, 2, 2, 2), value=1.)                         # white gaps
        sheets += [torch.cat(list(row), dim=2) for row in images.split(columns)]
    return torch.cat(sheets, dim=1)


if __name__ == "__main__":
    from PIL import Image

    sheet = contact_sheet(torch.Generator().manual_seed(0)).permute(1, 2, 0)
    image = Image.fromarray((sheet * 255).round().byte().numpy())
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(
        sys.argv[1] if len(sys.argv) > 1 else "postcards.png")
