"""examples/thermal_detection: the frames are what they are said to be. The training is `make demo-thermal`."""

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, python

EXAMPLE = ROOT / "examples/thermal_detection"
MAKER = str(EXAMPLE / "make_frames.py")
pytestmark = pytest.mark.torch_free


@pytest.fixture(scope="module")
def frames():
    """The generator, as a module."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        import make_frames
    finally:
        sys.path.remove(str(EXAMPLE))
    return make_frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small data set."""
    out = tmp_path_factory.mktemp("thermal") / "frames"
    python(MAKER, "--out", str(out), "--frames", "8", "--size", "160", "--processes", "2")
    return out


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def scenes(frames):
    """What a sensor would look at, before it does."""
    return [frames.make_scene(np.random.default_rng([5, index]), 192, 240) for index in range(24)]


def test_the_same_seed_gives_the_same_bytes_in_one_process_too(frames, folder, tmp_path):
    sequence = frames.Sequence(8, 160, 128, seed=0)
    assert frames.make(tmp_path / "again", sequence)
    assert contents(tmp_path / "again") == contents(folder)
    frames.make(tmp_path / "other", dataclasses.replace(sequence, seed=1))
    other, first = contents(tmp_path / "other"), contents(folder)
    assert all(other[name] != first[name] for name in first if name.endswith(".png"))


def test_the_layout_is_that_of_a_yolo_data_set(folder):
    text = (folder / "data.yaml").read_text()
    assert "train: images/train" in text and "val: images/val" in text
    assert re.findall(r"  (\d): (\w+)", text) == [("0", "person"), ("1", "vehicle"), ("2", "machine")]
    for split, number in (("train", 8), ("val", 2)):
        images = sorted((folder / "images" / split).iterdir())
        labels = sorted((folder / "labels" / split).iterdir())
        assert [path.stem for path in images] == [path.stem for path in labels] and len(images) == number
        for path in labels:
            rows = np.array([line.split() for line in path.read_text().splitlines()], float).reshape(-1, 5)
            assert set(rows[:, 0]) <= {0, 1, 2}
            low, high = rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2
            assert (low >= -1e-5).all() and (high <= 1 + 1e-5).all() and (rows[:, 3:] > 0).all()
    assert json.loads((folder / "sequence.json").read_text())["synthetic"] is True


def test_frames_are_16_bit_counts_of_40_millikelvin(frames, folder):
    for path in (folder / "images/train").iterdir():
        data = path.read_bytes()
        assert data[24:26] == bytes([16, 0])  # bit depth and colour type, in the header
        counts = np.asarray(Image.open(io.BytesIO(data))).astype(np.int64)
        assert counts.shape == (128, 160) and counts.min() == 0 and counts.max() == 65535  # the stuck pixels
        kelvin = counts[(counts > 0) & (counts < 65535)] * frames.KELVIN_PER_COUNT
        assert kelvin.min() > 220 and 260 < np.median(kelvin) < 310 and kelvin.max() < 450
        assert len(np.unique(counts)) > 256  # more than 8 bits could hold


def test_a_png_holds_the_counts_that_were_given(frames):
    counts = np.random.default_rng(0).integers(0, 65536, (31, 17), dtype=np.uint16)
    assert (np.asarray(Image.open(io.BytesIO(frames.png(counts)))) == counts).all()


def test_boxes_hold_what_differs_from_its_surroundings(scenes):
    """Before the sensor: a part of what is in a box is warmer than what is around it, or (where only the cold part of
    an object can be seen, or what it stands before is hotter still) at least another temperature."""
    warmer, other = [], []
    for scene in scenes:
        height, width = scene.kelvin.shape
        for box in scene.boxes:
            edges = [round(value) for value in (box.left, box.top, box.right, box.bottom)]
            left, top, right, bottom = edges
            inside = scene.kelvin[top:bottom, left:right]
            around = np.ones((height, width), bool)
            around[top:bottom, left:right] = False
            aside, up = (right - left) // 2 + 2, (bottom - top) // 4 + 2
            near = np.s_[max(top - up, 0) : bottom + up, max(left - aside, 0) : right + aside]
            ring = scene.kelvin[near][around[near]]
            difference = inside - np.median(ring)
            warmer.append((np.percentile(difference, 95), box.kind))
            other.append(np.percentile(abs(difference), 95))
    kelvin, kinds = np.array(warmer).T
    assert len(kelvin) > 50 and set(kinds) == {0, 1, 2}
    assert min(other) > 1 and (kelvin > 2).mean() > 0.95
    for kind, usual in ((0, 5), (1, 5), (2, 15)):
        assert np.median(kelvin[kinds == kind]) > usual


def test_boxes_end_where_objects_end(frames):
    """A hot object in an even field: the box is the extent of what differs."""
    for draw in (frames.person, frames.vehicle, frames.machine):
        for seed in range(5):
            x, y = np.linspace(-3, 3, 600)[None], np.linspace(2.2, -0.1, 230)[:, None]
            drawing = frames.Drawing(x, y)
            draw(drawing, np.random.default_rng(seed), 280.0)
            assert 0.02 < drawing.mask.mean() < 0.6
            edges = drawing.mask[[0, -1]].any() or drawing.mask[:, [0, -1]].any()
            assert not edges  # nothing reaches beyond the part of the frame that is drawn
            kelvin = drawing.kelvin[drawing.mask]
            assert kelvin.min() > 260 and kelvin.max() < 450


def test_people_are_as_warm_as_people(frames):
    for seed in range(20):
        drawing = frames.Drawing(np.linspace(-1, 1, 200)[None], np.linspace(2.1, 0, 210)[:, None])
        frames.person(drawing, np.random.default_rng(seed), 285.0)
        kelvin = drawing.kelvin[drawing.mask]
        assert 303 <= kelvin.max() <= 310 and np.median(kelvin) < 303  # skin, and clothing


def test_no_two_boxes_are_the_same_and_none_is_too_small(frames, scenes):
    for scene in scenes:
        boxes = [(box.left, box.top, box.right, box.bottom) for box in scene.boxes]
        assert len(set(boxes)) == len(boxes)
        for left, top, right, bottom in boxes:
            assert min(right - left, bottom - top) >= frames.SMALLEST


def test_the_sensor_has_the_noise_and_the_stuck_pixels_that_were_asked_for(frames):
    shape = (200, 250)
    sensor = frames.Sensor(noise=0.2, column_noise=0, row_noise=0, pixel_noise=0, gain_noise=0, dead=0.002, hot=0.001)
    pattern = frames.make_pattern(sensor, np.random.default_rng(0), *shape)
    assert pattern.dead.sum() == 100 and pattern.hot.sum() == 50 and not (pattern.dead & pattern.hot).any()
    flat = frames.Scene(np.full(shape, 300, np.float32), [])
    counts = frames.expose(flat, sensor, pattern, (0.0, 0.0), np.random.default_rng(1))
    assert counts.dtype == np.uint16
    assert (counts[pattern.dead] == 0).all() and (counts[pattern.hot] == 65535).all()
    kelvin = counts[~(pattern.dead | pattern.hot)] * frames.KELVIN_PER_COUNT
    assert abs(kelvin.mean() - 300) < 0.01 and abs(kelvin.std() - 0.2) < 0.01
    drifted = frames.expose(flat, sensor, pattern, (1.0, 0.0), np.random.default_rng(1))
    assert np.median(drifted) - np.median(counts) == 25  # one kelvin


def test_columns_stay_where_they_are_and_drift_starts_anew_when_the_shutter_closes(frames):
    sensor = frames.Sensor(column_noise=1.0, row_noise=0, pixel_noise=0, gain_noise=0)
    pattern = frames.make_pattern(sensor, np.random.default_rng(0), 40, 60)
    assert (pattern.offset == pattern.offset[:1]).all() and 0.7 < pattern.offset[0].std() < 1.3
    offsets = [frames.drift_of(sensor, 0, 0, index)[0] for index in range(101)]
    assert offsets[0] == offsets[50] == offsets[100] == 0
    assert abs(offsets[49]) > abs(offsets[1]) > 0
    assert offsets[49] / offsets[7] == pytest.approx(7) and offsets[99] / offsets[49] != pytest.approx(1)


def test_the_blur_keeps_the_heat(frames):
    point = np.zeros((21, 21), np.float32)
    point[10, 10] = 1
    spread = frames.blurred(point, 0.7)
    assert spread.sum() == pytest.approx(1, abs=1e-5) and (spread == spread.T).all()
    rows = np.arange(21) - 10
    assert np.sqrt((spread.sum(1) * rows**2).sum()) == pytest.approx(0.7, rel=0.03)


def test_a_complete_data_set_is_used_again_and_another_one_is_left_alone(folder):
    before = contents(folder)
    again = python(MAKER, "--out", str(folder), "--frames", "8", "--size", "160")
    assert again.stdout.startswith("found")
    other = python(MAKER, "--out", str(folder), "--frames", "9", "--size", "160", check=False)
    assert other.returncode == 1 and "holds other frames" in other.stderr and "hint: rm -r" in other.stderr
    assert contents(folder) == before


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_generator_leaves_no_half_data_set(tmp_path, sig):
    out = tmp_path / "frames"
    command = [sys.executable, MAKER, "--out", str(out), "--frames", "100000", "--size", "80", "--processes", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    begun = tmp_path / "frames.partial/labels/train/000002.txt"
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sig)
    assert process.wait(30) != 0
    assert begun.exists() and not out.exists()
    done = python(MAKER, "--out", str(out), "--frames", "1", "--size", "80", "--processes", "1")
    assert done.stdout.startswith("made") and len(list((out / "images/train").iterdir())) == 1
    assert not (tmp_path / "frames.partial").exists()


def test_what_cannot_be_made_is_said(tmp_path):
    done = python(MAKER, "--out", str(tmp_path / "frames"), "--size", "81", check=False)
    assert done.returncode == 2 and "hint:" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_training_knows_nothing_of_this_package():
    for name in ("train.py", "make_frames.py"):
        text = (EXAMPLE / name).read_text()
        assert "rocm_patch" not in text and "rocm-patch" not in text and "patches" not in text
