"""Surfaces of objects (what a class wears) and backgrounds (where it lies), as numpy fields.

A surface takes unit coordinates u, v (float32[H, W], the object spans -1..1), the period of its pattern
(a fraction of the radius) and the width of a pixel in the same units; it gives float32[H, W] in 0..1:
0 is the object's main colour, 1 its second one.
"""

import colorsys

import numpy as np
from PIL import Image


def _band(x, period):
    """Signed distance to the edges of bands that are half a period wide."""
    return np.abs(x / period % 1 - 0.5) * period - period / 4


def _edge(distance, pixel):
    """Distance to coverage, one and a half pixels soft."""
    return np.clip(0.5 + distance / (1.5 * pixel), 0, 1)


def _stripes(u, v, period, pixel):
    return _edge(_band(u, period), pixel)


def _dots(u, v, period, pixel):
    cell = (period, period * 1.732)
    nearest = None
    for shift in (0.0, 0.5):
        du = ((u / cell[0] + shift) % 1 - 0.5) * cell[0]
        dv = ((v / cell[1] + shift) % 1 - 0.5) * cell[1]
        squared = du * du + dv * dv
        nearest = squared if nearest is None else np.minimum(nearest, squared)
    return _edge(0.31 * period - np.sqrt(nearest), pixel)


def _checks(u, v, period, pixel):
    return _edge(_band(u, period) * _band(v, period) * (4 / period), pixel)


def _plain(u, v, period, pixel):
    return np.zeros_like(u)


def _zigzag(u, v, period, pixel):
    return _edge(_band(v + 1.4 * _band(u, 1.3 * period), period), pixel)


def _bricks(u, v, period, pixel):
    height, width, mortar = 0.62 * period, 1.35 * period, 0.05 * period
    row = np.floor(v / height)
    along = u / width + 0.5 * (row % 2)
    to_joint = np.minimum(0.5 * height - np.abs(v / height % 1 - 0.5) * height,
                          0.5 * width - np.abs(along % 1 - 0.5) * width)  # fmt: skip
    each = np.sin(row * 12.99 + np.floor(along) * 78.23) * 0.12 + 0.12
    return np.maximum(_edge(mortar - to_joint, pixel), each)


def _rings(u, v, period, pixel):
    return _edge(_band(np.sqrt(u * u + v * v), period), pixel)


def _waves(u, v, period, pixel):
    return _edge(_band(v + 0.28 * period * np.sin(u * (2 * np.pi / (1.6 * period))), period), pixel)


def _plaid(u, v, period, pixel):
    lines = np.maximum(_edge(0.05 * period - np.abs(u / period % 1 - 0.5) * period, pixel),
                       _edge(0.05 * period - np.abs(v / period % 1 - 0.5) * period, pixel))  # fmt: skip
    bands = 0.4 * (_edge(_band(u, period), pixel) + _edge(_band(v, period), pixel))
    return np.maximum(bands, lines)


def _scales(u, v, period, pixel):
    row = np.floor(u / (0.5 * period))
    along = ((v / period + 0.5 * (row % 2)) % 1 - 0.5) * period
    across = u - row * 0.5 * period
    distance = np.sqrt(along * along + across * across)
    return np.maximum(_edge(0.06 * period - np.abs(distance - 0.5 * period), pixel), 0.5 * distance / period)


def _faded(u, v, period, pixel):
    return np.clip(0.5 + 0.55 * v, 0, 1)


SURFACES = {
    "stripes": _stripes, "dots": _dots, "checks": _checks, "plain": _plain, "zigzag": _zigzag, "bricks": _bricks,
    "rings": _rings, "waves": _waves, "plaid": _plaid, "scales": _scales, "faded": _faded,
}  # fmt: skip


def colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """float32[3] RGB in 0..1; the hue in degrees."""
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value), np.float32)


def clouds(rng, size, cells, octaves=2) -> np.ndarray:
    """Smooth random field float32[H, W] in about 0..1; ``cells`` (across, down) sets its coarsest detail."""
    total, weight = 0, 1.0
    for octave in range(octaves):
        grid = rng.random((max(2, int(cells[1] * 2**octave)), max(2, int(cells[0] * 2**octave))), np.float32)
        total = total + weight * np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC))
        weight *= 0.5
    return total / (2 - 2 * weight)


def _blend(a, b, t):
    return a + (b - a) * t[..., None]


def _sky(rng, size, x, y):
    top = colour(rng.uniform(200, 222), rng.uniform(0.3, 0.6), rng.uniform(0.6, 0.9))
    low = colour(rng.choice([28, 205]), rng.uniform(0.1, 0.3), rng.uniform(0.85, 0.95))
    cover = np.clip(clouds(rng, size, (3, 5), 3) * 2.6 - rng.uniform(1.1, 1.6), 0, 0.85)
    return _blend(_blend(top, low, y), np.float32(0.95), cover)


def _sand(rng, size, x, y):
    base = colour(rng.uniform(30, 45), rng.uniform(0.2, 0.4), rng.uniform(0.65, 0.9))
    ripples = np.sin(rng.uniform(30, 60) * (y + 0.25 * clouds(rng, size, (4, 3)) + 0.3 * x))
    return base * (1 + 0.05 * ripples + 0.1 * (clouds(rng, size, (40, 40)) - 0.5))[..., None]


def _grass(rng, size, x, y):
    blades = clouds(rng, size, (50, 9), 2)
    dark = colour(rng.uniform(75, 120), rng.uniform(0.35, 0.6), rng.uniform(0.25, 0.4))
    light = colour(rng.uniform(65, 105), rng.uniform(0.3, 0.55), rng.uniform(0.5, 0.75))
    return _blend(dark, light, np.clip(0.2 + 0.9 * (blades - 0.25) + 0.25 * (clouds(rng, size, (3, 3)) - 0.5), 0, 1))


def _wood(rng, size, x, y):
    planks = rng.integers(2, 6)
    board = np.floor(y * planks)
    grain = np.sin(rng.uniform(25, 50) * (y + 0.12 * clouds(rng, size, (2, 10)) + 0.37 * board))
    gap = np.where(y * planks % 1 < 0.01 * planks, 0.7, 1.0)
    base = colour(rng.uniform(20, 35), rng.uniform(0.3, 0.55), rng.uniform(0.45, 0.8))
    return base * ((1 + 0.06 * grain + 0.05 * np.sin(board * 7)) * gap)[..., None]


def _cloth(rng, size, x, y):
    base = colour(rng.uniform(0, 360), rng.uniform(0.08, 0.35), rng.uniform(0.4, 0.85))
    threads = rng.uniform(220, 300)
    folds = clouds(rng, size, (3, 2)) - 0.5
    return base * (1 + 0.04 * np.sin(threads * x) * np.sin(threads * y) + 0.35 * folds)[..., None]


def _stone(rng, size, x, y):
    base = colour(rng.uniform(0, 360), rng.uniform(0.02, 0.12), rng.uniform(0.4, 0.75))
    return base * (0.75 + 0.5 * clouds(rng, size, (5, 5), 4))[..., None]


def _water(rng, size, x, y):
    deep = colour(rng.uniform(185, 215), rng.uniform(0.4, 0.65), rng.uniform(0.3, 0.5))
    light = colour(rng.uniform(175, 205), rng.uniform(0.2, 0.4), rng.uniform(0.65, 0.85))
    return _blend(deep, light, np.clip(clouds(rng, size, (5, 16), 2) * 1.6 - 0.4, 0, 1))


def _lamps(rng, size, x, y):
    field = np.broadcast_to(colour(rng.uniform(0, 360), rng.uniform(0.15, 0.4), rng.uniform(0.2, 0.4)), x.shape + (3,))
    for _ in range(rng.integers(4, 9)):
        cx, cy, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.06, 0.16)
        disc = np.clip((radius - np.hypot(x - cx, y - cy)) / 0.02, 0, 1) * rng.uniform(0.15, 0.4)
        field = _blend(field, colour(rng.uniform(0, 360), rng.uniform(0.1, 0.4), 0.95), disc)
    return field


def _wall(rng, size, x, y):
    base = colour(rng.uniform(0, 360), rng.uniform(0.03, 0.25), rng.uniform(0.6, 0.92))
    return base * (1 + 0.12 * (clouds(rng, size, (4, 4), 3) - 0.5))[..., None]


BACKGROUNDS = [_sky, _sand, _grass, _wood, _cloth, _stone, _water, _lamps, _wall]


def background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """One of the backgrounds: float32[H, W, 3], about 0..1, for ``size`` (W, H)."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / min(size)
    return BACKGROUNDS[rng.integers(len(BACKGROUNDS))](rng, size, x, y)
