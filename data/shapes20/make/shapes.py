"""Outlines: each function gives closed polygons in unit coordinates (float64[N, 2], x right, y down, radius 1).

The first polygon of a shape is filled, the others are cut out of it.
"""

import numpy as np
from PIL import Image, ImageDraw

_TURN = np.linspace(0, 2 * np.pi, 72, endpoint=False)


def _polar(radius, angle=_TURN) -> np.ndarray:
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)


def _regular(corners: int, radius=1.0) -> np.ndarray:
    return _polar(radius, np.arange(corners) * 2 * np.pi / corners)


def _heart() -> np.ndarray:
    x = 16 * np.sin(_TURN) ** 3
    y = -(13 * np.cos(_TURN) - 5 * np.cos(2 * _TURN) - 2 * np.cos(3 * _TURN) - np.cos(4 * _TURN))
    return np.stack([x, y], 1) / 16


def _egg() -> np.ndarray:
    return np.stack([np.sin(_TURN) * (0.74 - 0.12 * np.cos(_TURN)), -np.cos(_TURN)], 1)


def _crescent() -> np.ndarray:
    # A unit disc less a disc of radius 0.8 that lies 0.42 to its right: the angles are those where the two meet.
    outer, inner = np.radians(np.linspace(50.3, 309.7, 48)), np.radians(np.linspace(285.9, 74.1, 48))
    left = np.stack([np.cos(outer), np.sin(outer)], 1)
    right = np.stack([0.42 + 0.8 * np.cos(inner), 0.8 * np.sin(inner)], 1)
    return np.concatenate([left, right]) + [0.2, 0]


def _leaf() -> np.ndarray:
    y = np.linspace(-1, 1, 32)
    width = 0.52 * (1 - y**2) * (1 + 0.25 * y)
    return np.concatenate([np.stack([width, y], 1), np.stack([-width, y], 1)[::-1]])


def _drop() -> np.ndarray:
    y = np.linspace(-1, 1, 48)
    width = 0.9 * np.sqrt(1 - y) * 0.5 * (1 + y)
    return np.concatenate([np.stack([width, y], 1), np.stack([-width, y], 1)[::-1]])


def _fish() -> np.ndarray:
    x = np.linspace(-0.55, 1, 32)
    half = 0.55 * np.sqrt(np.clip(1 - ((x - 0.2) / 0.82) ** 2, 0, None)) + 0.03
    tail = np.array([[-1.0, 0.5], [-0.86, 0.0], [-1.0, -0.5]])
    return np.concatenate([np.stack([x, -half], 1), np.stack([x, half], 1)[::-1], tail])


_BOX = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.84
_ARM = 0.36
_CROSS = np.array([[-_ARM, -1], [_ARM, -1], [_ARM, -_ARM], [1, -_ARM], [1, _ARM], [_ARM, _ARM], [_ARM, 1], [-_ARM, 1],
                   [-_ARM, _ARM], [-1, _ARM], [-1, -_ARM], [-_ARM, -_ARM]])  # fmt: skip
_DOOR = np.concatenate([[[-0.4, 1.0]], [[-0.4, -0.05]], _polar(0.4, np.linspace(-0.5, 0.5, 16) * np.pi) - [0, 0.05],
                        [[0.4, 1.0]]])  # fmt: skip

SHAPES: dict[str, list[np.ndarray]] = {
    "circle": [_polar(0.95)],
    "ring": [_polar(1.0), _polar(0.5)],
    "heart": [_heart()],
    "egg": [_egg()],
    "square": [_BOX],
    "diamond": [np.array([[0, -1.1], [0.72, 0], [0, 1.1], [-0.72, 0]])],
    "star": [_polar(np.where(np.arange(10) % 2, 0.46, 1.08), np.arange(10) * np.pi / 5)],
    "crescent": [_crescent()],
    "triangle": [_regular(3, 1.12) + [0, 0.22]],
    "leaf": [_leaf()],
    "house": [np.array([[-0.72, 0.9], [-0.72, -0.25], [0, -1.0], [0.72, -0.25], [0.72, 0.9]])],
    "arch": [_BOX * [1.05, 1.0], _DOOR],
    "flower": [_polar(0.8 + 0.24 * np.cos(6 * _TURN))],
    "drop": [_drop()],
    "fish": [_fish()],
    "cross": [_CROSS],
    "hexagon": [_regular(6)],
}


def mask(polygons: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Coverage of polygons given in pixels, anti-aliased: float32[H, W] in 0..1, for ``size`` (W, H)."""
    scale = 3
    canvas = Image.new("L", (size[0] * scale, size[1] * scale))
    pen = ImageDraw.Draw(canvas)
    for number, polygon in enumerate(polygons):
        pen.polygon((polygon * scale).ravel().tolist(), fill=0 if number else 255)
    return np.asarray(canvas.reduce(scale), np.float32) / 255
