"""One picture of shapes20: a background, an object of the class, its shadow, things around and before it, light, noise.

Every picture has a random generator of its own, seeded by (SEED, stream, index): picture i of a stream can be
drawn alone, and no stream ever repeats a picture of another.
"""

import signal
from multiprocessing import get_context

import numpy as np
from PIL import Image, ImageFilter

from data.shapes20.make.classes import CLASSES, HUE_SPREAD
from data.shapes20.make.shapes import SHAPES, mask
from data.shapes20.make.surfaces import SURFACES, background, colour

SEED = 20
STREAMS = {"train": 0, "calibration": 1, "bundled": 2}
BUNDLED_PER_CLASS = 50
TRAIN_PICTURES = 24_000
_ORDER_STREAM = 3
SHADOW = 0.45  # the share of the light that a shadow takes

# Width and height in pixels, in the proportions of photographs; the first ones are the common ones.
SIZES = [(400, 300), (300, 400), (500, 375), (375, 500), (320, 240), (400, 267), (360, 270), (300, 300), (480, 320)]
SIZE_ODDS = [0.27, 0.11, 0.12, 0.05, 0.12, 0.11, 0.1, 0.07, 0.05]


def bundled_labels() -> np.ndarray:
    """int64[1000]: the class index of every bundled picture, 50 a class, in shuffled order."""
    labels = np.repeat(np.arange(len(CLASSES)), BUNDLED_PER_CLASS)
    return np.random.default_rng([SEED, _ORDER_STREAM]).permutation(labels)


def label_of(stream: str, index: int) -> int:
    """The class index of picture ``index`` of a stream."""
    return int(bundled_labels()[index]) if stream == "bundled" else index % len(CLASSES)


def picture(stream: str, index: int, size: tuple[int, int] | None = None) -> Image.Image:
    """Draw picture ``index`` of a stream, in RGB; ``size`` is (W, H), or left to the picture's own chance."""
    rng = np.random.default_rng([SEED, STREAMS[stream], index])
    if size is None:
        size = SIZES[rng.choice(len(SIZES), p=SIZE_ODDS)]
    return _scene(rng, CLASSES[label_of(stream, index)], size)


def drawing_pool():
    """One process a core to draw in; Ctrl-C is left to the process that waits for them."""
    return get_context("spawn").Pool(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))


def _scene(rng, shape_class, size) -> Image.Image:
    canvas = background(rng, size).astype(np.float32)
    side, light = min(size), rng.uniform(0, 2 * np.pi)
    _distractors(rng, canvas, light)
    radius = side * (rng.uniform(0.32, 0.47) if rng.random() < 0.88 else rng.uniform(0.22, 0.32))
    # Small objects lie anywhere, large ones near the middle, so that about a fifth of one is cut off at most.
    reach = 0.55 * side - radius * 0.8
    centre = np.array(size) / 2 + rng.uniform(-1, 1, 2) * max(reach, 0.03 * side)
    _paste(rng, canvas, shape_class.shape, shape_class.surface, _palette(rng, shape_class), centre, radius, light)
    for _ in range(rng.choice(4, p=[0.3, 0.35, 0.25, 0.1])):
        _occlude(rng, canvas, centre, radius, light)
    return _photograph(rng, canvas, light)


def _palette(rng, shape_class) -> tuple[np.ndarray, np.ndarray]:
    """The object's main and second colour."""
    hue = shape_class.hue + rng.uniform(-HUE_SPREAD, HUE_SPREAD)
    main = colour(hue, rng.uniform(0.55, 0.85), rng.uniform(0.6, 0.95))
    if shape_class.surface == "faded":
        return main, colour(hue + rng.uniform(50, 110), rng.uniform(0.5, 0.8), rng.uniform(0.7, 0.95))
    if rng.random() < 0.7:
        return main, colour(hue + rng.uniform(-20, 20), rng.uniform(0.04, 0.25), rng.uniform(0.88, 1))
    return main, colour(hue + rng.uniform(-20, 20), rng.uniform(0.5, 0.8), rng.uniform(0.18, 0.35))


def _paste(rng, canvas, shape, surface, palette, centre, radius, light):
    """Draw one object into ``canvas``, in place, with its shadow; ``light`` comes from that angle, in radians."""
    to_pixels = radius * _pose(rng)
    polygons = [points @ to_pixels.T + centre for points in SHAPES[shape]]
    offset = -0.12 * radius * np.array([np.cos(light), np.sin(light)])
    _shade(canvas, [points + offset for points in polygons], 0.07 * radius)
    x0, y0, x1, y1 = _box(polygons[0], canvas)
    if x1 <= x0 or y1 <= y0:
        return
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32) + 0.5
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    inverse = np.linalg.inv(to_pixels).astype(np.float32)
    u, v = inverse[0, 0] * dx + inverse[0, 1] * dy, inverse[1, 0] * dx + inverse[1, 1] * dy
    phase = rng.uniform(-0.1, 0.1, 2).astype(np.float32)
    tone = SURFACES[surface](u + phase[0], v + phase[1], rng.uniform(0.3, 0.5), 1 / radius)
    glow = 1 + (0.22 * (np.cos(light) * dx + np.sin(light) * dy) - 0.08 * np.hypot(dx, dy)) / radius
    body = (palette[0] + (palette[1] - palette[0]) * tone[..., None]) * glow[..., None]
    coverage = mask([points - [x0, y0] for points in polygons], (x1 - x0, y1 - y0))[..., None]
    canvas[y0:y1, x0:x1] += (body - canvas[y0:y1, x0:x1]) * coverage


def _pose(rng) -> np.ndarray:
    """float64[2, 2]: a tilt of up to 26 degrees, a mirror and a little foreshortening."""
    tilt, mirror = rng.uniform(-0.45, 0.45), rng.choice([-1, 1])
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    return turn * (rng.uniform(0.85, 1.0, 2) * [mirror, 1])


def _box(points, canvas, margin=1) -> tuple[int, int, int, int]:
    """The part of the canvas that holds the points: left, top, right, bottom."""
    height, width = canvas.shape[:2]
    low = np.floor(points.min(0) - margin).astype(int)
    high = np.ceil(points.max(0) + margin).astype(int)
    return max(low[0], 0), max(low[1], 0), min(high[0], width), min(high[1], height)


def _shade(canvas, polygons, blur):
    """Lay the shadow of polygons on the canvas, in place, with an edge ``blur`` pixels soft."""
    x0, y0, x1, y1 = _box(polygons[0], canvas, margin=2 * blur)
    if x1 - x0 < 4 or y1 - y0 < 4:
        return
    # A shadow is soft: a quarter of the resolution is enough.
    small = ((x1 - x0 + 3) // 4, (y1 - y0 + 3) // 4)
    coverage = mask([(points - [x0, y0]) / 4 for points in polygons], small)
    soft = Image.fromarray((coverage * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(blur / 4))
    soft = np.asarray(soft.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR), np.float32)
    canvas[y0:y1, x0:x1] *= (1 - soft * (SHADOW / 255))[..., None]


def _distractors(rng, canvas, light):
    """A few small things of any shape and surface, far from the size of an object."""
    height, width = canvas.shape[:2]
    side = min(width, height)
    for _ in range(rng.choice(4, p=[0.35, 0.3, 0.2, 0.15])):
        shape, surface = rng.choice(list(SHAPES)), rng.choice(["plain", "plain", *SURFACES])
        palette = colour(rng.uniform(0, 360), rng.uniform(0.2, 0.7), rng.uniform(0.4, 0.9)), np.full(3, 0.9, np.float32)
        centre = rng.uniform(0.05, 0.95, 2) * [width, height]
        _paste(rng, canvas, shape, surface, palette, centre, side * rng.uniform(0.06, 0.13), light)


def _occlude(rng, canvas, centre, radius, light):
    """Something plain before the object's rim: a post, a leaf or a pebble."""
    kind = rng.choice(["post", "leaf", "circle"])
    main = colour(rng.uniform(0, 360), rng.uniform(0.1, 0.55), rng.uniform(0.25, 0.85))
    angle = rng.uniform(0, 2 * np.pi)
    rim = centre + radius * rng.uniform(0.55, 1.0) * np.array([np.cos(angle), np.sin(angle)])
    if kind == "post":
        along = np.array([np.sin(angle), -np.cos(angle)]) * 3 * max(canvas.shape)
        across = np.array([np.cos(angle), np.sin(angle)]) * radius * rng.uniform(0.06, 0.15)
        post = np.stack([rim - along - across, rim + along - across, rim + along + across, rim - along + across])
        coverage = mask([post], canvas.shape[1::-1])[..., None]
        canvas += (main - canvas) * coverage
    else:
        _paste(rng, canvas, kind, "plain", (main, main), rim, radius * rng.uniform(0.25, 0.5), light)


def _photograph(rng, canvas, light) -> Image.Image:
    """Uneven light, exposure, a little blur and a little noise, as a camera would add them."""
    height, width = canvas.shape[:2]
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    fall = rng.uniform(0.0, 0.16) * (np.cos(light) * x + np.sin(light) * y) - rng.uniform(0, 0.08) * (x * x + y * y)
    exposure = rng.uniform(0.85, 1.1)
    noise = rng.standard_normal((height, width), np.float32) * rng.uniform(0.004, 0.016)
    levels = canvas * ((1 + fall) * exposure).astype(np.float32)[..., None] + noise[..., None]
    image = Image.fromarray((np.clip(levels, 0, 1) * 255 + 0.5).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2) * min(width, height) / 300))
