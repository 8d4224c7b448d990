"""evaluation/drawings.py: the drawing of the method and the animation of the steps."""

# ruff: noqa: F811 (the fixtures' names)

from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageSequence
from toys import UNET, command, here, pixels, toys  # noqa: F401 (fixtures)

import support.base
from evaluation.drawings import draw_animation, draw_method, method_figure, predicted_images
from evaluation.sampling import WITHOUT_GUIDE, Row
from support.base import load_base
from support.guides import load_guide


def test_the_drawing_s_texts_do_not_overlap():
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = method_figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    width, height = figure.bbox.size
    assert len(boxes) > 30
    assert all(box.x0 > 4 and box.x1 < width - 4 and box.y0 > 4 and box.y1 < height - 4
               for box in boxes)
    overlaps = [(a.get_text(), b.get_text()) for (a, box), (b, other)
                in combinations(zip(texts, boxes), 2) if box.overlaps(other)]
    assert overlaps == []


def test_the_drawing_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    draw_method(tmp_path / "new/method.png")
    assert Image.open(tmp_path / "new/method.png").size == (2000, 1400)


@pytest.fixture
def rows(here) -> list[Row]:
    guide = load_guide(here / "guides/toy/tiny-8.safetensors", UNET)
    cfg = next(row for row in WITHOUT_GUIDE if row.name == "cfg-8")
    return [cfg, Row("tiny-8", "tiny guide, 8 steps", "tiny", 8, guide=guide)]


def test_the_last_prediction_is_the_image(rows):
    base = load_base(support.base.MINI)
    for row in rows:
        predicted = predicted_images(base, row, ["tree", "boat"], 8.0, [3, 4], 64)
        assert [len(images) for images in predicted] == [2] * 8
        made = command(f"--guide {row.kind} --steps 8 --g 8 --seed 3 --prompt tree boat")[-2:]
        for image, path in zip(predicted[-1], made):
            assert abs(np.asarray(image).astype(int) - pixels(path)).max() <= 1


def test_the_animation_has_a_frame_a_step_and_holds_the_last(here, rows):
    draw_animation(here / "steps.webp", load_base(support.base.MINI), rows, ["tree"], 8.0, 3, 64)
    animation = Image.open(here / "steps.webp")
    assert animation.n_frames == 8 and animation.info["loop"] == 0
    durations, frames = [], []
    for frame in ImageSequence.Iterator(animation):
        frames.append(np.asarray(frame.convert("RGB")))
        durations.append(frame.info["duration"])
    assert durations == [600] * 7 + [3000]
    assert all((a != b).any() for a, b in zip(frames, frames[1:]))
