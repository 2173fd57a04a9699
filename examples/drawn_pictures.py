"""Pictures drawn by a program, to train and to calibrate on: dead leaves, textures, gratings, shapes and text.

`draw(seed, size)` is (size, size, 3) uint8, always the same for the same seed. Every scene is painted at twice the size
in floating point, 0 to 1, and reduced, so that edges are as soft as a camera's.

Dead leaves (Lee, Mumford & Huang, 2001): discs whose radii follow a power law, one over another. Their edges, their
flat parts and their 1/f spectrum are those of photographs, which is why a model that saw nothing else works on these.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

LETTERS = "aabcdeeefghiiklmnoooprstttuvwyzABCDEFGHKLMNPRSTVW0123456789.,!?&%"


def draw(seed: int, size: int = 256) -> np.ndarray:
    """The picture number `seed`: (size, size, 3) uint8."""
    rng = np.random.default_rng(seed)
    side = 2 * size
    scene = rng.choice([leaves, depth, clouds, waves, writing], p=[0.5, 0.2, 0.12, 0.06, 0.12])
    return develop(rng, light(rng, scene(rng, side)), size)


# Scenes: (side, side, 3) float32, about 0 to 1


def leaves(rng: np.random.Generator, side: int) -> np.ndarray:
    """Dead leaves, a palette and a handful of materials for the whole picture."""
    canvas = clouds(rng, side) if rng.random() < 0.5 else gradient(rng, side, palette(rng))
    paint_leaves(rng, canvas, smallest=rng.uniform(0.006, 0.04) * side, largest=rng.uniform(0.15, 0.6) * side)
    if rng.random() < 0.15:
        paint_text(rng, canvas, lines=1)
    return canvas


def depth(rng: np.random.Generator, side: int) -> np.ndarray:
    """A background out of focus, with a few sharp things before it."""
    canvas = leaves(rng, side)
    canvas = blur(canvas, rng.uniform(0.005, 0.03) * side)
    paint_leaves(rng, canvas, smallest=0.03 * side, largest=0.3 * side, cover=rng.uniform(0.1, 0.8))
    return canvas


def clouds(rng: np.random.Generator, side: int) -> np.ndarray:
    """1/f noise, mostly grey with a little colour of its own, sometimes folded into ridges."""
    exponent = rng.uniform(1.1, 2.0)
    grey = noise(rng, side, exponent)
    if rng.random() < 0.3:
        grey = np.abs(grey) * 2 - 1.5
    tints = np.stack([noise(rng, side, exponent) for _ in range(2)], axis=-1)
    tones = palette(rng)
    return tones[0] + rng.uniform(0.06, 0.2) * (grey[..., None] + 0.4 * tints @ rng.normal(size=(2, 3)))


def waves(rng: np.random.Generator, side: int) -> np.ndarray:
    """Gratings and checks, bent by a slow noise."""
    tones = palette(rng)
    bend = noise(rng, side, 2.5) * rng.uniform(0, 0.05) * side
    pattern = grating(rng, bend)
    if rng.random() < 0.5:
        pattern = pattern * grating(rng, bend)
    canvas = tones[0] + pattern[..., None] * (tones[1] - tones[0]) * rng.uniform(0.2, 1)
    return canvas + 0.03 * noise(rng, side, rng.uniform(0.8, 1.5))[..., None]


def writing(rng: np.random.Generator, side: int) -> np.ndarray:
    """Lines of letters, on a gradient or on leaves."""
    if rng.random() < 0.5:
        canvas = gradient(rng, side, palette(rng))
    else:
        canvas = blur(leaves(rng, side), rng.uniform(0.002, 0.02) * side)
    paint_text(rng, canvas, lines=int(rng.integers(2, 9)))
    return canvas


# What scenes are made of


def palette(rng: np.random.Generator) -> np.ndarray:
    """(6, 3) colours that go together: around one hue, more grey than not, light and dark."""
    lightness = rng.beta(1.2, 1.2, size=(6, 1))
    hue = rng.normal(size=3) + rng.normal(size=(6, 3)) * rng.uniform(0.1, 1)
    return np.clip(lightness + rng.uniform(0.02, 0.2) * (hue - hue.mean(axis=1, keepdims=True)), 0, 1)


def noise(rng: np.random.Generator, side: int, exponent: float) -> np.ndarray:
    """(side, side) float32 with spectrum 1 / f^exponent, mean 0 and deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(side, side))) * frequency**-exponent, s=(side, side))
    return (field / field.std()).astype(np.float32)


def gradient(rng: np.random.Generator, side: int, tones: np.ndarray) -> np.ndarray:
    """From one colour to another, in a straight line: (side, side, 3)."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.linspace(-0.7, 0.7, side)[:, None], np.linspace(-0.7, 0.7, side)[None]
    ramp = 0.5 + 0.5 * (np.cos(angle) * x + np.sin(angle) * y)
    return (tones[0] + ramp[..., None] * (tones[1] - tones[0])).astype(np.float32)


def grating(rng: np.random.Generator, bend: np.ndarray) -> np.ndarray:
    """Stripes of 5 to 60 pixels of the finished picture, in any direction, 0 to 1."""
    side = bend.shape[0]
    angle, period = rng.uniform(0, np.pi), 2 * np.exp(rng.uniform(np.log(5), np.log(60)))
    y, x = np.arange(side)[:, None], np.arange(side)[None]
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y + bend) * (2 * np.pi / period))
    sharpness = np.exp(rng.uniform(0, np.log(20)))  # from a sine to a square wave
    return 0.5 + 0.5 * np.tanh(sharpness * wave) / np.tanh(sharpness)


def outline(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Corners (n, 2) of an ellipse, a box, a triangle or a lump around the origin."""
    kind = rng.choice(4, p=[0.4, 0.25, 0.1, 0.25])
    if kind == 1:
        turn = np.array([0.25, 0.75, 1.25, 1.75]) * np.pi
    elif kind == 2:
        turn = np.sort(rng.uniform(0, 2 * np.pi, size=3))
    else:
        turn = np.linspace(0, 2 * np.pi, 24 if radius < 30 else 72, endpoint=False)
    reach = np.full(turn.shape, radius)
    if kind == 3:
        for lobes in range(2, 6):
            reach = reach * (1 + 0.5 / lobes * rng.normal() * np.cos(lobes * turn + rng.uniform(0, 2 * np.pi)))
    points = np.stack([np.cos(turn), np.sin(turn) * rng.uniform(0.25, 1)], axis=-1) * reach[:, None]
    angle = rng.uniform(0, 2 * np.pi)
    return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def paint_leaves(
    rng: np.random.Generator, canvas: np.ndarray, smallest: float, largest: float, cover: float = 3.0
) -> None:
    """Paints leaves over `canvas`, in place, until their areas are `cover` times its own."""
    side = canvas.shape[0]
    tones = palette(rng)
    materials = [noise(rng, side, exponent) for exponent in (rng.uniform(0.6, 1.2), rng.uniform(1.2, 2.0))]
    roughness = rng.uniform(0, 0.12)
    area = 0.0
    while area < cover * side * side:
        # density ~ r^-3 between the two radii: the areas of every octave of sizes add up to the same
        radius = (smallest**-2 + rng.random() * (largest**-2 - smallest**-2)) ** -0.5
        points = outline(rng, radius) + rng.uniform(0, side, size=2)
        left, top = np.clip(np.floor(points.min(axis=0)).astype(int), 0, side)
        right, bottom = np.clip(np.ceil(points.max(axis=0)).astype(int) + 1, 0, side)
        area += radius * radius * 2
        if right - left < 1 or bottom - top < 1:
            continue
        stencil = Image.new("1", (int(right - left), int(bottom - top)))
        ImageDraw.Draw(stencil).polygon([(x - left, y - top) for x, y in points.tolist()], fill=1)
        inside = np.asarray(stencil)
        window = canvas[top:bottom, left:right]
        colour = tones[rng.integers(6)] + rng.normal(size=3) * 0.03 + rng.normal() * 0.06
        fill = np.broadcast_to(colour, window.shape)
        if radius > 6 and rng.random() < 0.6:  # shading
            y = np.linspace(-1, 1, bottom - top)[:, None, None]
            x = np.linspace(-1, 1, right - left)[None, :, None]
            fill = fill + (rng.normal() * x + rng.normal() * y) * 0.1
        if radius > 6 and rng.random() < 0.6:
            material = materials[rng.integers(2)]
            up, across = rng.integers(0, side - (bottom - top) + 1), rng.integers(0, side - (right - left) + 1)
            patch = material[up : up + bottom - top, across : across + right - left, None]
            fill = fill + patch * (roughness * rng.random() * (1 + rng.normal(size=3) * 0.2))
        window[inside] = fill[inside]


def paint_text(rng: np.random.Generator, canvas: np.ndarray, lines: int) -> None:
    """Writes lines of random letters over `canvas`, in place, in Pillow's own font."""
    side = canvas.shape[0]
    stencil = Image.new("L", (side, side))
    pen = ImageDraw.Draw(stencil)
    for _ in range(lines):
        font = ImageFont.load_default(size=float(side * np.exp(rng.uniform(np.log(0.035), np.log(0.25)))))
        letters = "".join(rng.choice(list(LETTERS + " " * 8), size=rng.integers(3, 24)))
        pen.text((rng.uniform(-0.2, 0.6) * side, rng.uniform(-0.05, 0.95) * side), letters, fill=255, font=font)
    if rng.random() < 0.4:
        stencil = stencil.rotate(rng.uniform(-40, 40), resample=Image.Resampling.BICUBIC)
    ink = palette(rng)[0]
    canvas += np.asarray(stencil, dtype=np.float32)[..., None] / 255 * (ink - canvas)


# From a scene to a picture


def blur(canvas: np.ndarray, radius: float) -> np.ndarray:
    """Out of focus: (H, W, 3) -> (H, W, 3)."""
    picture = Image.fromarray(_bytes(canvas)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(picture, dtype=np.float32) / 255


def light(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Slow shadows, contrast and brightness."""
    side = canvas.shape[0]
    canvas = canvas * (1 + rng.uniform(0, 0.2) * np.tanh(noise(rng, side, 2.5)))[..., None]
    contrast, brightness = rng.uniform(0.6, 1.3), rng.normal() * 0.08
    return (canvas - 0.5) * contrast + 0.5 + brightness


def develop(rng: np.random.Generator, canvas: np.ndarray, size: int) -> np.ndarray:
    """The camera's part: a little blur, the reduction to (size, size, 3) uint8, and grain; one in eight in grey."""
    canvas = np.clip(canvas, 0, 1)
    if rng.random() < 0.5:
        canvas = blur(canvas, rng.exponential(1.0))
    small = canvas.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
    if rng.random() < 0.125:
        small = np.repeat(small @ np.array([[0.299], [0.587], [0.114]]), 3, axis=-1)
    if rng.random() < 0.3:
        small = small + rng.normal(size=(size, size, 1)) * rng.exponential(0.01)
    return _bytes(small)


def _bytes(canvas: np.ndarray) -> np.ndarray:
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
