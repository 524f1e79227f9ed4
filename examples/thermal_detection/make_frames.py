"""Make a data set of synthetic 16-bit thermal frames, in the layout that YOLO programs read.

    python make_frames.py --out frames --frames 600 --size 320 --seed 0

No camera has taken these frames: scenes are drawn in kelvin, and a model of an uncooled long-wave infrared sensor
turns them into counts. The data set looks like this:

    frames/data.yaml                 class names, and where the frames are
    frames/sequence.json             what the frames were made with; written last
    frames/images/train/000000.png   one channel of 16 bits
    frames/labels/train/000000.txt   a line for each object: class, centre x, centre y, width, height; of the frame's
    frames/images/val/ labels/val/   the frames that no training sees

Counts are linear in temperature, 40 mK each, with 0 at absolute zero, as in the 14-bit TIFF files of FLIR's Duo Pro R
("[counts@High Resolution] * 0.04 - 273.15 = deg C", its user guide, section 6.2.2). Temperatures are apparent ones,
those of a black body that looks the same. The optics, the noise and the temperatures of things are chosen, not
measured; the noise is near the 50 mK that data sheets of such sensors state (FLIR Lepton: "Thermal sensitivity
<50 mK").

A data set that is there already is used again; another one in its place is an error. Frames are written into a folder
beside the data set, which gets its name when it is complete. The same numbers give the same bytes with the same
versions of this file, numpy and zlib on the same kind of processor.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

VERSION = 1  # of the frames: another number for other bytes
NAMES = ("person", "vehicle", "machine")
KELVIN_PER_COUNT = 0.04
FULL_SCALE = 65535  # counts
ZOOM = 2  # scenes are drawn with this many pixels per pixel of the sensor, in each direction
SMALLEST = 6  # pixels of the sensor; an object whose visible part is narrower or lower has no label
VISIBLE = 0.35  # nor has one of which less than this part can be seen


@dataclass(frozen=True)
class Sensor:
    """What a sensor does to a scene. Chosen values: see the top of this file.

    Offsets are residuals after the camera's own correction, in kelvin; what drifts is reset by a shutter every
    `between_shutters` frames.
    """

    blur: float = 0.7  # standard deviation of the point spread function, in pixels
    noise: float = 0.06  # kelvin: temporal noise, the noise-equivalent temperature difference
    column_noise: float = 0.08  # kelvin
    row_noise: float = 0.04  # kelvin
    pixel_noise: float = 0.05  # kelvin
    gain_noise: float = 0.01  # of the difference to the sensor's own temperature
    drift: float = 1.5  # kelvin: standard deviation of the offset when the shutter closes
    gain_drift: float = 0.01
    temperature: float = 300.0  # kelvin, of the sensor
    between_shutters: int = 50  # frames
    dead: float = 0.0005  # part of the pixels that always give 0
    hot: float = 0.0002  # part of the pixels that always give the full scale


@dataclass
class Box:
    """Visible extent of an object, in pixels of the sensor: the outer edges of its outermost pixels."""

    kind: int  # index into NAMES
    left: float
    top: float
    right: float
    bottom: float


@dataclass
class Scene:
    """What the sensor looks at.

    Attributes:
        kelvin: apparent temperatures, float32, (H, W).
        boxes: the objects that can be seen.
    """

    kelvin: np.ndarray
    boxes: list[Box]


# Shapes. Each takes coordinates in metres, x to the right and y up from the point where an object stands, and returns
# a mask.


def ellipse(x: np.ndarray, y: np.ndarray, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1


def rectangle(x: np.ndarray, y: np.ndarray, left: float, right: float, low: float, high: float) -> np.ndarray:
    return (x >= left) & (x <= right) & (y >= low) & (y <= high)


def limb(x: np.ndarray, y: np.ndarray, start: tuple[float, float], end: tuple[float, float], *radii: float):
    """All points nearer to a line than its radius, which goes from the first to the second of two."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
    radius = radii[0] + (radii[-1] - radii[0]) * along
    return (x - start[0] - along * dx) ** 2 + (y - start[1] - along * dy) ** 2 <= radius**2


def polygon(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """A convex one, with its corners in anticlockwise order."""
    inside = np.ones(np.broadcast(x, y).shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    return inside


def glow(x: np.ndarray, y: np.ndarray, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    """1 in the centre of a hot spot, falling off as a Gaussian."""
    return np.exp(-0.5 * (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2))


@dataclass
class Drawing:
    """One object: the pixels around it, which of them it covers, and how warm they are.

    Attributes:
        x, y: metres, (1, w) and (h, 1).
        mask: bool, (h, w).
        kelvin: float32, (h, w).
    """

    x: np.ndarray
    y: np.ndarray
    mask: np.ndarray = field(init=False)
    kelvin: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.y.shape[0], self.x.shape[1])
        self.mask = np.zeros(shape, bool)
        self.kelvin = np.zeros(shape, np.float32)

    def add(self, shape: np.ndarray, kelvin: float | np.ndarray) -> None:
        self.mask |= shape
        self.kelvin = np.where(shape, kelvin, self.kelvin).astype(np.float32)

    def heat(self, kelvin: np.ndarray) -> None:
        """Warms what is drawn already."""
        self.kelvin += (kelvin * self.mask).astype(np.float32)


def person(draw: Drawing, rng: np.random.Generator, ambient: float) -> None:
    """Skin at 304 to 308 K, clothing between it and the air. Seen from the front, the side or the back."""
    x, y = draw.x, draw.y
    tall = rng.uniform(1.55, 1.92)
    wide = tall * rng.uniform(0.85, 1.1) * rng.choice([1.0, 0.7])  # narrower from the side
    skin = rng.uniform(304, 308)
    share = rng.uniform(0.35, 0.65)  # how much of the body's warmth comes through the coat
    coat, trousers = (ambient + s * (skin - ambient) for s in (share, share * rng.uniform(0.75, 1.05)))
    stride, swing = rng.uniform(0, 0.16) * tall, rng.uniform(-0.1, 0.12) * tall
    for side in (-1, 1):
        hip, foot = (side * 0.055 * wide, 0.5 * tall), (side * (0.06 * wide + stride), 0.03 * tall)
        knee = (side * (0.06 * wide + 0.6 * stride), 0.27 * tall)
        draw.add(limb(x, y, hip, knee, 0.055 * tall, 0.042 * tall), trousers)
        draw.add(limb(x, y, knee, foot, 0.042 * tall, 0.028 * tall), trousers - 0.1 * (trousers - ambient))
        draw.add(limb(x, y, foot, (foot[0] + 0.05 * wide, foot[1]), 0.025 * tall), ambient + 2)
    draw.add(limb(x, y, (0, 0.54 * tall), (0, 0.75 * tall), 0.1 * wide, 0.125 * wide), coat)
    draw.heat(1.5 * glow(x, y, 0, 0.68 * tall, 0.08 * wide, 0.12 * tall))
    for side in (-1, 1):
        shoulder = (side * 0.12 * wide, 0.78 * tall)
        elbow = (side * (0.16 * wide + 0.4 * max(swing, 0)), 0.62 * tall)
        hand = (side * 0.15 * wide + swing, 0.47 * tall)
        draw.add(limb(x, y, shoulder, elbow, 0.04 * tall, 0.033 * tall), coat - 0.5)
        draw.add(limb(x, y, elbow, hand, 0.033 * tall, 0.025 * tall), coat - 1)
        draw.add(ellipse(x, y, *hand, 0.026 * tall, 0.03 * tall), skin - rng.uniform(1, 4))
    draw.add(limb(x, y, (0, 0.8 * tall), (0, 0.88 * tall), 0.035 * tall), skin)
    draw.add(ellipse(x, y, 0, 0.925 * tall, 0.05 * tall, 0.072 * tall), skin)
    if rng.random() < 0.6:  # hair or a cap
        hair = ellipse(x, y, 0, 0.935 * tall, 0.055 * tall, 0.07 * tall) & (y > 0.945 * tall)
        draw.add(hair, ambient + rng.uniform(0.3, 0.6) * (skin - ambient))


def tyre(draw: Drawing, x: float, radius: float, body: float, warm: float) -> None:
    draw.add(ellipse(draw.x, draw.y, x, radius, radius, radius), body + warm)
    draw.add(ellipse(draw.x, draw.y, x, radius, 0.6 * radius, 0.6 * radius), body + 0.4 * warm)
    draw.heat(0.8 * warm * glow(draw.x, draw.y, x, radius, 0.2 * radius, 0.2 * radius))  # the brake


def car_from_the_side(draw: Drawing, rng: np.random.Generator, ambient: float) -> None:
    long, tall = rng.uniform(3.8, 4.9), rng.uniform(1.4, 1.75)
    facing = rng.choice([-1, 1])
    draw.x = draw.x * facing
    x, y = draw.x, draw.y
    body, engine, warm = ambient + rng.uniform(1, 5), rng.uniform(8, 38), rng.uniform(4, 15)
    half = long / 2
    draw.add(
        rectangle(x, y, -0.93 * half, 0.9 * half, 0.16 * tall, 0.3 * tall), body + 0.15 * engine
    )  # under the floor
    draw.add(limb(x, y, (-0.86 * half, 0.45 * tall), (0.84 * half, 0.42 * tall), 0.19 * tall, 0.16 * tall), body)
    draw.add(rectangle(x, y, -0.9 * half, 0.88 * half, 0.26 * tall, 0.52 * tall), body)
    back = rng.uniform(-0.95, -0.7)
    cabin = [(back * half, 0.55 * tall), (0.5 * half, 0.55 * tall), (0.16 * half, tall), (back * 0.8 * half, tall)]
    draw.add(polygon(x, y, cabin), body)
    glass = [(back * 0.86 * half, 0.61 * tall), (0.37 * half, 0.61 * tall)]
    glass += [(0.12 * half, 0.93 * tall), (back * 0.74 * half, 0.93 * tall)]
    pillar = rectangle(x, y, -0.24 * half, -0.18 * half, 0, tall)
    draw.add(polygon(x, y, glass) & ~pillar, ambient - rng.uniform(1, 7))  # reflects the sky
    draw.heat(engine * glow(x, y, 0.68 * half, 0.5 * tall, 0.2 * half, 0.14 * tall))
    for place in (-0.6, 0.62):
        tyre(draw, place * half, 0.21 * tall, body, warm)
    draw.add(ellipse(x, y, -0.93 * half, 0.2 * tall, 0.07, 0.06), body + rng.uniform(0.6, 1.6) * engine)  # exhaust


def car_from_the_front(draw: Drawing, rng: np.random.Generator, ambient: float) -> None:
    wide, tall = rng.uniform(1.7, 1.95), rng.uniform(1.4, 1.8)
    x, y = draw.x, draw.y
    body, engine, warm = ambient + rng.uniform(1, 5), rng.uniform(8, 38), rng.uniform(4, 15)
    half = wide / 2
    for side in (-1, 1):
        draw.add(rectangle(x, y, *sorted((side * 0.66 * half, side * 0.95 * half)), 0, 0.3 * tall), body + warm)
    draw.add(rectangle(x, y, -0.97 * half, 0.97 * half, 0.13 * tall, 0.58 * tall), body)
    cabin = [(-0.9 * half, 0.56 * tall), (0.9 * half, 0.56 * tall), (0.68 * half, tall), (-0.68 * half, tall)]
    draw.add(polygon(x, y, cabin), body)
    glass = [(-0.78 * half, 0.62 * tall), (0.78 * half, 0.62 * tall), (0.62 * half, 0.93 * tall)]
    draw.add(polygon(x, y, glass + [(-0.62 * half, 0.93 * tall)]), ambient - rng.uniform(1, 7))
    draw.heat(engine * glow(x, y, 0, 0.48 * tall, 0.5 * half, 0.1 * tall))  # the bonnet
    draw.add(rectangle(x, y, -0.5 * half, 0.5 * half, 0.24 * tall, 0.4 * tall), body + 0.8 * engine)  # the radiator
    for side in (-1, 1):
        draw.add(ellipse(x, y, side * 0.76 * half, 0.42 * tall, 0.14, 0.09), body + rng.uniform(1, 6))  # a lamp


def vehicle(draw: Drawing, rng: np.random.Generator, ambient: float) -> None:
    """Body near the air's temperature, engine, exhaust and tyres above it, glass that reflects the colder sky."""
    (car_from_the_side if rng.random() < 0.65 else car_from_the_front)(draw, rng, ambient)


def motor(draw: Drawing, rng: np.random.Generator, ambient: float) -> None:
    """An electric motor on its feet, with cooling fins and a shaft."""
    long, radius = rng.uniform(0.9, 1.4), rng.uniform(0.28, 0.4)
    draw.x = draw.x * rng.choice([-1, 1])
    x, y = draw.x, draw.y
    above = rng.uniform(22, 55)
    middle = radius + 0.14
    for place in (-0.3, 0.3):
        draw.add(rectangle(x, y, (place - 0.12) * long, (place + 0.12) * long, 0, 0.2), ambient + 0.25 * above)
    draw.add(limb(x, y, (0.4 * long, middle), (0.68 * long, middle), 0.06), ambient + 0.8 * above)
    fins = 1 - 0.22 * (np.sin(2 * math.pi * (y - middle) / 0.11) > 0.3)
    across = 1 - 0.3 * ((y - middle) / radius) ** 2  # seen at a flatter angle, the rim looks colder
    draw.add(
        rectangle(x, y, -0.5 * long, 0.42 * long, middle - radius, middle + radius), ambient + above * fins * across
    )
    draw.add(
        rectangle(x, y, -0.62 * long, -0.48 * long, middle - 0.9 * radius, middle + 0.9 * radius),
        ambient + 0.4 * above,
    )
    box = rectangle(x, y, -0.2 * long, 0.1 * long, middle + 0.9 * radius, middle + 1.3 * radius)
    draw.add(box, ambient + 0.5 * above)
    draw.heat(rng.uniform(8, 30) * glow(x, y, 0.38 * long, middle, 0.07, 0.1))  # the bearing


def pump(draw: Drawing, rng: np.random.Generator, ambient: float) -> None:
    """A round casing with a hot seal, an inlet from the side and an outlet upwards."""
    radius = rng.uniform(0.38, 0.55)
    draw.x = draw.x * rng.choice([-1, 1])
    x, y = draw.x, draw.y
    above = rng.uniform(20, 50)
    middle = radius + 0.22
    draw.add(rectangle(x, y, -0.8 * radius, 0.8 * radius, 0, 0.3), ambient + 0.2 * above)
    high = middle + rng.uniform(1.3, 2.1) * radius
    draw.add(rectangle(x, y, 0.35 * radius, 0.8 * radius, middle, high), ambient + 0.9 * above)
    draw.add(rectangle(x, y, 0.22 * radius, 0.93 * radius, high - 0.12, high), ambient + 0.6 * above)
    draw.add(
        rectangle(x, y, -1.6 * radius, 0, middle - 0.25 * radius, middle + 0.25 * radius), ambient + 0.75 * above
    )
    draw.add(
        rectangle(x, y, -1.65 * radius, -1.45 * radius, middle - 0.4 * radius, middle + 0.4 * radius),
        ambient + 0.5 * above,
    )
    rim = np.sqrt((x / radius) ** 2 + ((y - middle) / radius) ** 2)
    draw.add(ellipse(x, y, 0, middle, radius, radius), ambient + above * (1.05 - 0.3 * rim**2))
    draw.heat(rng.uniform(12, 45) * glow(x, y, 0, middle, 0.22 * radius, 0.22 * radius))


def pipe(draw: Drawing, rng: np.random.Generator, ambient: float) -> None:
    """A hot pipe with flanges and a valve, on posts."""
    long, radius, high = rng.uniform(2.0, 3.4), rng.uniform(0.12, 0.2), rng.uniform(0.5, 1.1)
    x, y = draw.x, draw.y
    above = rng.uniform(30, 80)
    for place in (-0.35, 0.35):
        draw.add(rectangle(x, y, place * long - 0.06, place * long + 0.06, 0, high), ambient + 0.1 * above)
    across = 1 - 0.35 * ((y - high) / radius) ** 2
    draw.add(rectangle(x, y, -0.5 * long, 0.5 * long, high - radius, high + radius), ambient + above * across)
    for place in (-0.46, rng.uniform(-0.2, 0.2), 0.46):
        flange = rectangle(x, y, place * long - 0.05, place * long + 0.05, high - 1.7 * radius, high + 1.7 * radius)
        draw.add(flange, ambient + 0.7 * above)
    valve = rng.uniform(-0.3, 0.3) * long
    draw.add(rectangle(x, y, valve - 0.04, valve + 0.04, high, high + 0.38), ambient + 0.5 * above)
    draw.add(ellipse(x, y, valve, high + 0.4, 0.2, 0.05), ambient + 0.3 * above)
    draw.heat(rng.uniform(10, 40) * glow(x, y, rng.uniform(-0.4, 0.4) * long, high, 0.25, radius))


def machine(draw: Drawing, rng: np.random.Generator, ambient: float) -> None:
    """Twenty to a hundred kelvin above the air."""
    rng.choice(np.array([motor, pump, pipe], dtype=object))(draw, rng, ambient)


OBJECTS: tuple[Callable[[Drawing, np.random.Generator, float], None], ...] = (person, vehicle, machine)
# Pixels per metre, as a part of the frame's height: from how far each kind is seen.
DISTANCES = ((0.07, 0.2), (0.05, 0.11), (0.07, 0.19))
REACH = ((0.8, 2.1), (2.7, 2.0), (2.0, 2.2))  # metres to either side and up that a drawing may need


def texture(rng: np.random.Generator, height: int, width: int, coarse: int, octaves: int = 4) -> np.ndarray:
    """Noise of several sizes, float32, (height, width), with a standard deviation near 1.

    Random grids, the first with cells of `coarse` pixels, each next one twice as fine and half as strong, enlarged
    bilinearly and added: value noise.
    """
    total = np.zeros((height, width), np.float32)
    strength, cell = 1.0, coarse
    for _ in range(octaves):
        rows, columns = height // cell + 2, width // cell + 2
        grid = rng.standard_normal((rows, columns)).astype(np.float32)
        total += strength * enlarged(grid, np.arange(height) / cell, np.arange(width) / cell)
        strength, cell = strength / 2, max(cell // 2, 1)
    return total


def enlarged(grid: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A grid, bilinearly between its points, at the given (broken) rows and columns."""

    def along(grid: np.ndarray, at: np.ndarray) -> np.ndarray:  # the first axis
        low = at.astype(int)
        part = (at - low).astype(np.float32)[:, None]
        return grid[low] * (1 - part) + grid[low + 1] * part

    return along(along(grid, rows).T, columns).T


def background(rng: np.random.Generator, height: int, width: int, horizon: int, ambient: float) -> np.ndarray:
    """Sky, ground, a road, buildings and trees, float32, (height, width), in kelvin.

    A clear sky looks colder the higher one looks, since less of the warm air lies in between.
    """
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None]
    up = np.clip((horizon - y) / max(horizon, 1), 0, 1)
    zenith = ambient - rng.uniform(8, 40)  # clouds to clear
    kelvin = ambient - 2 - (ambient - 2 - zenith) * np.sqrt(up) + np.zeros_like(x)
    kelvin += rng.uniform(0.2, 1.5) * texture(rng, height, width, height // 3, 3)
    ground = ambient + rng.uniform(-2, 5) + rng.uniform(0.4, 1.3) * texture(rng, height, width, height // 6)
    kelvin = np.where(y > horizon, ground, kelvin)
    if rng.random() < 0.7:  # a road, narrower towards the horizon
        depth = np.clip((y - horizon) / (height - horizon), 0, None)
        middle = rng.uniform(0.2, 0.8) * width + rng.uniform(-0.5, 0.5) * width * depth
        road = (np.abs(x - middle) < 0.05 * width + rng.uniform(0.1, 0.3) * width * depth) & (y > horizon)
        kelvin += road * rng.uniform(1, 5)
    for _ in range(rng.integers(0, 4)):
        kelvin = building(rng, kelvin, x, y, horizon, ambient)
    for _ in range(rng.integers(0, 6)):  # crowns of trees, at the temperature of the air
        size = rng.uniform(0.06, 0.2) * height
        cx, cy = rng.uniform(0, width), horizon - rng.uniform(0, 0.6) * size
        ragged = 1 + 0.18 * texture(rng, height, width, max(int(size) // 2, 2), 2)
        crown = (
            ellipse(x, y, cx, cy, 0.7 * size, size) if size < 3 else np.hypot((x - cx) / 0.75, y - cy) < size * ragged
        )
        kelvin = np.where(crown, ambient + rng.uniform(-1.5, 1.5) + 0.5 * (ragged - 1) / 0.18, kelvin)
    for _ in range(rng.integers(0, 4)):  # warm places on the ground: drains, sunlit stones, where a car stood
        size = rng.uniform(0.01, 0.05) * height
        place = glow(x, y, rng.uniform(0, width), rng.uniform(horizon, height), rng.uniform(1, 3) * size, 0.5 * size)
        kelvin = kelvin + rng.uniform(2, 12) * place * (y > horizon)
    return kelvin.astype(np.float32)


def building(
    rng: np.random.Generator, kelvin: np.ndarray, x: np.ndarray, y: np.ndarray, horizon: int, ambient: float
) -> np.ndarray:
    """The scene with a wall on the horizon, and windows in it that leak heat or reflect the sky."""
    height, width = kelvin.shape
    wide, tall = rng.uniform(0.15, 0.5) * width, rng.uniform(0.12, 0.36) * height
    left, foot = rng.uniform(-0.1, 0.9) * width, horizon + rng.uniform(0, 0.04) * height
    wall = rectangle(x, y, left, left + wide, foot - tall, foot)
    kelvin = np.where(wall, ambient + rng.uniform(0, 5) + 0.4 * texture(rng, height, width, height // 10, 3), kelvin)
    cell = rng.uniform(0.05, 0.1) * height
    column, row = (x - left) % cell / cell, (foot - y) % cell / cell
    number = ((x - left) // cell + 31 * ((foot - y) // cell)).astype(int)
    lit = rng.uniform(-6, 7, 997)[number % 997]
    windows = wall & rectangle(column, row, 0.3, 0.75, 0.3, 0.8)
    return np.where(windows, kelvin + lit, kelvin)


def obstacle(draw: Drawing, rng: np.random.Generator, ambient: float) -> None:
    """What stands in front of objects and has no label: a post, a bush, or a low wall."""
    x, y = draw.x, draw.y
    kind = rng.integers(3)
    kelvin = ambient + rng.uniform(-2, 3)
    if kind == 0:
        draw.add(rectangle(x, y, -0.09, 0.09, 0, rng.uniform(1.8, 2.2)), kelvin)
    elif kind == 1:
        for _ in range(7):
            at = rng.uniform(-0.6, 0.6), rng.uniform(0.1, 0.7)
            draw.add(
                ellipse(x, y, *at, rng.uniform(0.2, 0.4), rng.uniform(0.2, 0.35)), kelvin + rng.uniform(-0.7, 0.7)
            )
    else:
        draw.add(rectangle(x, y, -1.4, 1.4, 0, rng.uniform(0.5, 0.9)), kelvin)


def make_scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """A street or a yard, with one to six objects on the ground, nearer ones in front of farther ones."""
    tall, wide = height * ZOOM, width * ZOOM
    ambient = rng.uniform(274, 296)
    horizon = int(rng.uniform(0.28, 0.42) * tall)
    eye = rng.uniform(2.5, 4.5)  # metres above the ground
    kelvin = background(rng, tall, wide, horizon, ambient)
    owner = np.zeros((tall, wide), np.int16)  # whose pixel it is; 0 for nobody's
    # The more pixels to the metre, the nearer, and the lower in the frame is the point where a thing stands.
    things: list[tuple[float, int]] = []
    for _ in range(rng.integers(1, 7)):
        kind = int(rng.integers(len(NAMES)))
        low, high = DISTANCES[kind]
        things.append((math.exp(rng.uniform(math.log(low), math.log(high))) * tall, kind))
    things += [(rng.uniform(0.07, 0.2) * tall, -1) for _ in range(rng.integers(0, 3))]
    whole: dict[int, tuple[int, int]] = {}
    for number, (scale, kind) in enumerate(sorted(things), 1):
        foot = min(horizon + scale * eye * rng.uniform(0.85, 1.0), 1.04 * tall)
        middle = rng.uniform(0.03, 0.97) * wide
        aside, up = REACH[kind] if kind >= 0 else (1.5, 2.3)
        rows = np.arange(max(int(foot - up * scale), 0), min(int(foot) + 2, tall))
        columns = np.arange(max(int(middle - aside * scale), 0), min(int(middle + aside * scale) + 1, wide))
        if not len(rows) or not len(columns):
            continue
        draw = Drawing((columns[None] + 0.5 - middle) / scale, (foot - rows[:, None] - 0.5) / scale)
        (OBJECTS[kind] if kind >= 0 else obstacle)(draw, rng, ambient)
        part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        kelvin[part] = np.where(draw.mask, draw.kelvin, kelvin[part])
        owner[part] = np.where(draw.mask, number, owner[part])
        if kind >= 0:
            whole[number] = kind, int(draw.mask.sum())
    boxes = []
    for number, (kind, pixels) in whole.items():
        rows, columns = np.nonzero(owner == number)
        if not len(rows) or len(rows) < VISIBLE * pixels:
            continue
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        box = Box(kind, *(float(edge) / ZOOM for edge in edges))
        if min(box.right - box.left, box.bottom - box.top) >= SMALLEST:
            boxes.append(box)
    return Scene(kelvin.reshape(height, ZOOM, width, ZOOM).mean((1, 3)), boxes)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """An image (H, W) after a Gaussian point spread function, its border repeated outwards."""
    reach = max(math.ceil(3 * sigma), 1)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for _ in range(2):  # both axes: each pass works on columns, and turns the image round
        padded = np.pad(image, ((reach, reach), (0, 0)), mode="edge")
        image = sum(w * padded[k : k + image.shape[0]] for k, w in enumerate(weights)).T
    return image


@dataclass(frozen=True)
class Pattern:
    """What is the same in every frame of a sensor: offset (kelvin) and gain of each pixel, and pixels that are stuck.

    Attributes:
        offset, gain: float32, (H, W).
        dead, hot: bool, (H, W).
    """

    offset: np.ndarray
    gain: np.ndarray
    dead: np.ndarray
    hot: np.ndarray


def make_pattern(sensor: Sensor, rng: np.random.Generator, height: int, width: int) -> Pattern:
    normal = partial(rng.normal, 0.0)
    offset = normal(sensor.column_noise, (1, width)) + normal(sensor.row_noise, (height, 1))
    offset = offset + normal(sensor.pixel_noise, (height, width))
    gain = 1 + normal(sensor.gain_noise, (height, width))
    order = rng.permutation(height * width).reshape(height, width)
    dead, hot = (round(part * height * width) for part in (sensor.dead, sensor.hot))
    return Pattern(
        offset.astype(np.float32), gain.astype(np.float32), order < dead, (order >= dead) & (order < dead + hot)
    )


def expose(
    scene: Scene, sensor: Sensor, pattern: Pattern, drift: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A frame of the scene: counts, uint16, (H, W). `drift` is an offset in kelvin and a factor beside 1."""
    seen = blurred(scene.kelvin, sensor.blur) - sensor.temperature
    signal = seen * pattern.gain * (1 + drift[1]) + pattern.offset + drift[0] + sensor.temperature
    signal = signal + rng.normal(0, sensor.noise, scene.kelvin.shape)
    counts = np.clip(np.rint(signal / KELVIN_PER_COUNT), 0, FULL_SCALE).astype(np.uint16)
    counts[pattern.dead] = 0
    counts[pattern.hot] = FULL_SCALE
    return counts


def drift_of(sensor: Sensor, seed: int, split: int, index: int) -> tuple[float, float]:
    """Offset and gain grow after each closing of the shutter, in a direction of their own."""
    period, since = divmod(index, sensor.between_shutters)
    rng = np.random.default_rng([seed, split, 1, period])
    grown = since / sensor.between_shutters
    return float(rng.normal(0, sensor.drift)) * grown, float(rng.normal(0, sensor.gain_drift)) * grown


def png(counts: np.ndarray) -> bytes:
    """A PNG file of an image (H, W), uint16: W3C's specification, third edition, colour type 0, bit depth 16.

    Each row holds differences to the row above ("up", filter 2), byte by byte: smaller than the counts themselves.
    """
    height, width = counts.shape
    rows = counts.astype(">u2").view(np.uint8).reshape(height, 2 * width)
    filtered = np.full((height, 2 * width + 1), 2, np.uint8)
    filtered[0, 1:] = rows[0]
    filtered[1:, 1:] = rows[1:] - rows[:-1]  # modulo 256

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(filtered.tobytes(), 1)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def label_lines(boxes: list[Box], height: int, width: int) -> str:
    """A line for each box: class, centre x, centre y, width and height, as parts of the frame's width and height."""
    lines = []
    for box in boxes:
        place = (box.left + box.right) / 2 / width, (box.top + box.bottom) / 2 / height
        size = (box.right - box.left) / width, (box.bottom - box.top) / height
        lines.append(f"{box.kind} " + " ".join(f"{value:.6f}" for value in place + size) + "\n")
    return "".join(lines)


@dataclass(frozen=True)
class Sequence:
    """What a data set is made with; the same values give the same frames.

    Attributes:
        frames: for training; a quarter as many more are for validation.
        width, height: of a frame, in pixels.
    """

    frames: int
    width: int
    height: int
    seed: int
    sensor: Sensor = Sensor()
    version: int = VERSION


def make_frame(sequence: Sequence, split: int, index: int) -> tuple[bytes, str]:
    """One frame as a PNG file and its labels. `split` is 0 for training and 1 for validation."""
    shape = sequence.height, sequence.width
    pattern = make_pattern(sequence.sensor, np.random.default_rng([sequence.seed, 2]), *shape)
    rng = np.random.default_rng([sequence.seed, split, 0, index])
    scene = make_scene(rng, *shape)
    drift = drift_of(sequence.sensor, sequence.seed, split, index)
    return png(expose(scene, sequence.sensor, pattern, drift, rng)), label_lines(scene.boxes, *shape)


def _write(sequence: Sequence, folder: Path, name: str, split: int, index: int) -> None:
    image, labels = make_frame(sequence, split, index)
    (folder / "images" / name / f"{index:06}.png").write_bytes(image)
    (folder / "labels" / name / f"{index:06}.txt").write_text(labels)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Keeps others that make the same data set waiting; the kernel lets go of the lock of a process that ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def describe(sequence: Sequence) -> dict[str, object]:
    return {"synthetic": True, "kelvin_per_count": KELVIN_PER_COUNT, "names": list(NAMES), **asdict(sequence)}


def make(out: Path, sequence: Sequence, processes: int = 1) -> bool:
    """Makes the data set, or finds it made; whether it was made now.

    Raises:
        FileExistsError: `out` holds something else.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_one(out.with_name(out.name + ".lock")):
        if out.exists():
            record = out / "sequence.json"
            if record.is_file() and json.loads(record.read_text()) == describe(sequence):
                return False
            raise FileExistsError(f"asked for frames in {out}, which holds other frames or other files")
        partial_folder = out.with_name(out.name + ".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)  # of one that was killed
        jobs = []
        for split, (name, count) in enumerate((("train", sequence.frames), ("val", max(sequence.frames // 4, 1)))):
            for kind in ("images", "labels"):
                (partial_folder / kind / name).mkdir(parents=True)
            jobs += [(name, split, index) for index in range(count)]
        write = partial(_write, sequence, partial_folder)
        if processes > 1:
            with ProcessPoolExecutor(processes) as pool:
                list(pool.map(write, *zip(*jobs, strict=True), chunksize=8))
        else:
            for job in jobs:
                write(*job)
        names = "".join(f"  {number}: {name}\n" for number, name in enumerate(NAMES))
        (partial_folder / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{names}")
        (partial_folder / "sequence.json").write_text(json.dumps(describe(sequence), indent=1) + "\n")
        partial_folder.rename(out)
    return True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--frames", type=int, default=1000, help="for training; a quarter more for validation")
    parser.add_argument("--size", type=int, default=640, help="width in pixels; the height is four fifths of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if arguments.frames < 1 or arguments.size < 80 or arguments.size % 5:
        parser.error("frames must be 1 or more, and the size 80 or more and a multiple of 5\nhint: --size 320")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    sequence = Sequence(arguments.frames, arguments.size, arguments.size * 4 // 5, arguments.seed)
    try:
        made = make(arguments.out, sequence, arguments.processes)
    except FileExistsError as error:
        sys.exit(f"{error}\nhint: rm -r {arguments.out}, or another folder with --out")
    print(f"{'made' if made else 'found'} {arguments.out}: synthetic thermal frames, {sequence.frames} for training")


if __name__ == "__main__":
    main()
