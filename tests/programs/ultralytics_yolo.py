# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "ultralytics==8.4.190",
#   "anyio==4.16.0", "certifi==2026.10.19.post1", "charset-normalizer==3.5.3", "contourpy==1.3.3", "cycler==0.12.1",
#   "fonttools==4.68.0", "h11==0.16.0", "httpcore==1.0.9", "httpx==0.28.1", "idna==3.20", "kiwisolver==1.5.1",
#   "matplotlib==3.11.2", "numpy==2.4.6", "nvidia-ml-py==13.615.71", "opencv-python-headless==5.0.0.93",
#   "packaging==26.4", "pillow==13.0.0", "polars-runtime-32==2.1.0", "polars==2.1.0", "psutil==7.2.2",
#   "pyparsing==3.3.3", "python-dateutil==4.0.0", "pyyaml==6.0.4", "requests==2.34.2", "torchvision==0.28.0",
#   "tzdata==2026.6", "ultralytics-platform==0.1.99", "ultralytics-thop==2.2.3", "urllib3==2.8.0",
# ]
#
# [tool.programs]
# about = "ultralytics: YOLOv8n trained, validated and used from scratch by its own trainer; its classifier too"
# devices = ["cpu", "cuda"]
# rtol = 1e-3
# atol = 1e-3
# routes = 150
# ///
import argparse
import csv
import logging
from pathlib import Path

import cv2
import numpy as np
from ultralytics import YOLO


def draw(rng, size=96):
    """A grey image with one to three coloured rectangles (class 0) and discs (class 1), and their labels."""
    image = np.full((size, size, 3), rng.integers(60, 120), np.uint8)
    lines = []
    for _ in range(rng.integers(1, 4)):
        kind, colour = int(rng.integers(2)), tuple(int(c) for c in rng.integers(130, 255, 3))
        half = int(rng.integers(9, 18))
        x, y = (int(v) for v in rng.integers(half, size - half, 2))
        if kind:
            cv2.circle(image, (x, y), half, colour, -1)
        else:
            cv2.rectangle(image, (x - half, y - half), (x + half, y + half), colour, -1)
        lines.append(f"{kind} {x / size:.6f} {y / size:.6f} {2 * half / size:.6f} {2 * half / size:.6f}")
    return image, lines


def make_detection_set(root):
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, lines = draw(rng)
            cv2.imwrite(str(root / "images" / split / f"{number:03}.png"), image)
            (root / "labels" / split / f"{number:03}.txt").write_text("\n".join(lines) + "\n")
    path = root / "shapes.yaml"
    path.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: {{0: rectangle, 1: disc}}\n")
    return path


def make_classification_set(root):
    rng = np.random.default_rng(1)
    for split, count in (("train", 8), ("val", 4)):
        for kind, name in enumerate(("bright", "dark")):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                low = 20 + 130 * (1 - kind)
                cv2.imwrite(str(folder / f"{number}.png"), rng.integers(low, low + 90, (48, 48, 3), dtype=np.uint8))
    return root


def show(results_csv):
    """Every loss and metric per epoch; the learning rate too, the time not."""
    with open(results_csv, newline="") as file:
        for row in csv.DictReader(file):
            print(" ".join(f"{name.strip()}={float(value):.5f}" for name, value in row.items() if name != "time"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = "0" if args.device == "cuda" else args.device
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    work = Path("yolo").resolve()
    # Each loss is a sum over whole images, so rounding shows little; SGD, because Adam divides by small gradients.
    common = {
        "device": device, "workers": 2, "seed": 0, "deterministic": True, "amp": False, "plots": False,
        "verbose": False, "optimizer": "SGD", "lr0": 0.002, "warmup_epochs": 0, "project": str(work),
        "exist_ok": True, "pretrained": False,
    }  # fmt: skip

    model = YOLO("yolov8n.yaml")
    data = make_detection_set(work / "shapes")
    losses = []
    model.add_callback(
        "on_train_batch_end", lambda trainer: losses.append([float(v) for v in trainer.loss_items.values()])
    )
    model.train(data=str(data), epochs=2, imgsz=96, batch=8, name="detect", close_mosaic=1, **common)
    for number, items in enumerate(losses):
        print("batch", number, "losses", " ".join(f"{float(value):.5f}" for value in items))
    show(work / "detect" / "results.csv")

    trained = YOLO(work / "detect" / "weights" / "last.pt")
    image = cv2.imread(str(work / "shapes" / "images" / "val" / "000.png"))
    result = trained.predict(image, imgsz=96, conf=1e-5, device=device, max_det=5, verbose=False)[0]
    print("detections", len(result.boxes), "best confidence", f"{result.boxes.conf.max().item():.6f}")

    classifier = YOLO("yolov8n-cls.yaml")
    classifier.train(
        data=str(make_classification_set(work / "shades")), epochs=1, imgsz=64, batch=8, name="classify", **common
    )
    show(work / "classify" / "results.csv")


if __name__ == "__main__":
    main()
