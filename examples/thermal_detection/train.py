"""Train a YOLOv8n from scratch to find people, vehicles and hot machines in 16-bit thermal frames.

    python train.py                   640 px, for a GPU
    python train.py --small           160 px, for a CPU

A plain ultralytics program: its trainer, its model, its augmentation and its validation, with a data set that decodes
16-bit frames in the loader's workers. The frames are synthetic, and made by make_frames.py if they are not there yet.
Nothing is downloaded. The results folder gets results.json, whose content is also the last line of the output,
detections.png, and what ultralytics itself writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import ultralytics
from ultralytics import YOLO
from ultralytics.data.build import InfiniteDataLoader, seed_worker
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer

STUCK = 2000  # counts, 80 K: no optics puts such a step between one pixel and all of its neighbours
PLATEAU = 3.0  # times the mean of the counts that occur
COLDEST, HOTTEST = 0.005, 0.998  # parts of the pixels that are colder than black, and than white
COLOURS = ((90, 255, 90), (255, 220, 60), (255, 90, 255))  # blue, green, red; a colour for each class


def read_frame(path: str | Path) -> np.ndarray:
    """Counts of a 16-bit PNG file, uint16, (H, W)."""
    counts = cv2.imread(str(path), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_GRAYSCALE)
    if counts is None or counts.dtype != np.uint16:
        raise ValueError(
            f"asked for the 16-bit frame {path}, which is none\nhint: python make_frames.py --out FOLDER"
        )
    return counts


def decode(counts: np.ndarray) -> np.ndarray:
    """An image that a detector can read, uint8, (H, W, 3), of a frame's counts, uint16, (H, W).

    Stuck pixels become the median of their neighbourhood. A grey level is then the mean of two: that of plateau
    equalisation (V. E. Vickers, Optical Engineering 35(7), 1996), the running sum of a histogram that is cut off at a
    plateau, which shows what is on the ground; and that of the temperature itself, between percentiles, which shows
    what is in a hot machine. An offset or a gain that drifts changes neither.
    """
    median = cv2.medianBlur(counts, 3)
    counts = np.where(np.abs(counts.astype(np.int32) - median) > STUCK, median, counts)
    histogram = np.bincount(counts.ravel(), minlength=65536)
    plateau = PLATEAU * counts.size / np.count_nonzero(histogram)
    equalised = np.minimum(histogram, plateau).cumsum()
    low, high = np.searchsorted(histogram.cumsum(), (COLDEST * counts.size, HOTTEST * counts.size))
    linear = ((np.arange(65536) - low) / max(high - low, 1)).clip(0, 1)
    grey = (255 * (equalised / equalised[-1] + linear) / 2).astype(np.uint8)[counts]
    return np.repeat(grey[..., None], 3, axis=2)


class ThermalDataset(YOLODataset):
    """A YOLO data set whose images have one channel of 16 bits; workers decode them."""

    def load_image(
        self, i: int, rect_mode: bool = True, resize_short: bool = False
    ) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """Image number i, uint8, (h, w, 3), its own height and width, and those after it was resized to `imgsz`."""
        if self.ims[i] is None:
            image = decode(read_frame(self.im_files[i]))
            height, width = image.shape[:2]
            ratio = self.imgsz / max(height, width)
            if ratio != 1:
                image = cv2.resize(image, (round(width * ratio), round(height * ratio)))
            self.ims[i], self.im_hw0[i], self.im_hw[i] = image, (height, width), image.shape[:2]
            self.buffer.append(i)  # the mosaic takes its other three images from here
            if len(self.buffer) > max(self.max_buffer_length, 1):
                gone = self.buffer.pop(0)
                self.ims[gone] = self.im_hw0[gone] = self.im_hw[gone] = None
        return super().load_image(i, rect_mode, resize_short)


class ThermalTrainer(DetectionTrainer):
    """ultralytics' trainer, with thermal frames for training and for validation."""

    def __init__(self, workers: int, **overrides: object) -> None:
        self.workers = workers
        super().__init__(overrides=overrides)

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> ThermalDataset:
        """The frames of a folder, augmented if the mode is `train`."""
        return ThermalDataset(
            img_path=img_path,
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=mode == "train",
            hyp=self.args,
            rect=mode == "val",
            stride=self.stride,
            pad=0.0 if mode == "train" else 0.5,
            prefix=f"{mode}: ",
            data=self.data,
        )

    def get_dataloader(
        self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train"
    ) -> InfiniteDataLoader:
        """A loader with as many workers as were asked for: ultralytics has none on a CPU, and no more than cores."""
        dataset = self.build_dataset(dataset_path, mode, batch_size)
        return InfiniteDataLoader(
            dataset=dataset,
            batch_size=min(batch_size, len(dataset)),
            shuffle=mode == "train",
            num_workers=self.workers,
            collate_fn=dataset.collate_fn,
            worker_init_fn=seed_worker,
            generator=torch.Generator().manual_seed(self.args.seed),
            pin_memory=self.device.type == "cuda",
        )


def draw_boxes(image: np.ndarray, boxes: np.ndarray, titles: list[str], kinds: np.ndarray, zoom: int) -> np.ndarray:
    """The image (H, W, 3), `zoom` times as large, in false colours, with boxes (N, 4) of left, top, right, bottom."""
    shown = cv2.applyColorMap(image, cv2.COLORMAP_INFERNO)
    shown = cv2.resize(shown, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
    for box, title, kind in zip(boxes, titles, kinds, strict=True):
        left, top, right, bottom = (round(zoom * float(edge)) for edge in box)
        colour = COLOURS[int(kind)]
        cv2.rectangle(shown, (left, top), (right, bottom), colour, 1)
        (wide, high), _ = cv2.getTextSize(title, cv2.FONT_HERSHEY_PLAIN, 0.8, 1)
        x, y = min(max(left, 0), shown.shape[1] - wide), top - 2 if top > high + 4 else bottom + high + 3
        cv2.rectangle(shown, (x, y - high - 1), (x + wide, y + 1), (0, 0, 0), cv2.FILLED)
        cv2.putText(shown, title, (x, y), cv2.FONT_HERSHEY_PLAIN, 0.8, colour, 1)
    return shown


def picture(weights: Path, data: Path, size: int, device: str, number: int = 4) -> np.ndarray:
    """Validation frames in rows: what is there on the left, what the detector finds on the right."""
    model = YOLO(weights)
    paths = sorted((data / "images/val").glob("*.png"))
    labels = {path: (data / "labels/val" / f"{path.stem}.txt").read_text().splitlines() for path in paths}
    full = [path for path in paths if len(labels[path]) > 2]  # a frame with one car says little
    chosen = full[:: max(len(full) // number, 1)][:number]
    rows = []
    for path in chosen:
        image = decode(read_frame(path))
        height, width = image.shape[:2]
        zoom = max(1, round(320 / width))
        truth = np.array([line.split() for line in labels[path]], float).reshape(-1, 5)
        corners = np.concatenate([truth[:, 1:3] - truth[:, 3:] / 2, truth[:, 1:3] + truth[:, 3:] / 2], 1)
        names = [model.names[int(kind)] for kind in truth[:, 0]]
        left = draw_boxes(image, corners * [width, height, width, height], names, truth[:, 0], zoom)
        found = model.predict(image, imgsz=size, conf=0.25, device=device, verbose=False)[0].boxes.cpu().numpy()
        names = [f"{model.names[int(kind)]} {sure:.2f}" for kind, sure in zip(found.cls, found.conf, strict=True)]
        rows.append(
            np.hstack([left, np.full_like(left[:, :4], 255), draw_boxes(image, found.xyxy, names, found.cls, zoom)])
        )
        rows.append(np.full_like(rows[-1][:4], 255))
    return np.vstack(rows[:-1])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="what a CPU can train in minutes")
    parser.add_argument(
        "--device", default="0" if torch.cuda.is_available() else "cpu", help="cpu, or a GPU's number"
    )
    parser.add_argument("--workers", type=int, default=4, help="of each loader; there is one more for validation")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--frames", type=int, help="for training; a quarter more for validation")
    parser.add_argument("--size", type=int, help="width of a frame in pixels, a multiple of 160")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the training; the frames are the same for all")
    parser.add_argument("--amp", action="store_true", help="mixed precision with bfloat16, on a GPU that has it")
    parser.add_argument("--data", type=Path, help="folder of the frames")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    arguments = parser.parse_args()
    usual = {"epochs": 12, "frames": 200, "size": 160, "batch": 8} if arguments.small else {
        "epochs": 20, "frames": 1000, "size": 640, "batch": 16,
    }  # fmt: skip
    for name, value in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.amp and arguments.device == "cpu":
        parser.error("bfloat16 was asked for on a CPU, where ultralytics has none\nhint: leave out --amp")
    if arguments.size % 160:
        parser.error(
            f"frames of {arguments.size} pixels were asked for; strides need a multiple of 160\nhint: --size 320"
        )
    if arguments.data is None:
        arguments.data = Path(f"frames-{arguments.size}-{arguments.frames}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    started = time.perf_counter()
    maker = [sys.executable, str(Path(__file__).with_name("make_frames.py")), "--out", str(arguments.data)]
    subprocess.run([*maker, "--frames", str(arguments.frames), "--size", str(arguments.size)], check=True)

    out = arguments.out.resolve()
    trainer = ThermalTrainer(
        workers=arguments.workers,
        model="yolov8n.yaml",
        pretrained=False,
        data=str((arguments.data / "data.yaml").resolve()),
        imgsz=arguments.size,
        epochs=arguments.epochs,
        batch=arguments.batch,
        nbs=arguments.batch,  # a step of the optimizer for each batch
        optimizer="AdamW",
        lr0=0.002,
        warmup_epochs=1,
        mosaic=0.0 if arguments.small else 1.0,
        close_mosaic=max(arguments.epochs // 4, 1),
        hsv_h=0.0,  # grey has no hue
        hsv_s=0.0,
        val=not arguments.small,  # after each epoch; after the last one in any case
        amp="bf16" if arguments.amp else False,  # the check before float16 downloads a model
        plots=False,  # ultralytics' own need a font that it downloads
        seed=arguments.seed,
        device=arguments.device,
        project=str(out.parent),
        name=out.name,
        exist_ok=True,
    )
    history: list[dict[str, float]] = []

    def note(trainer: ThermalTrainer) -> None:
        score = float(trainer.metrics["metrics/mAP50(B)"])
        history.append({"loss": round(float(sum(trainer.tloss.values())), 5), "mAP50": round(score, 5)})

    first: list[float] = []

    def note_first(trainer: ThermalTrainer) -> None:
        if not first:
            first.append(float(sum(trainer.loss_items.values())))

    trainer.add_callback("on_fit_epoch_end", note)
    trainer.add_callback("on_train_batch_end", note_first)
    trained = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - trained

    shown = picture(trainer.best, arguments.data, arguments.size, arguments.device)
    cv2.imwrite(str(out / "detections.png"), shown, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    del history[arguments.epochs :]  # ultralytics calls back once more, for the best weights
    for number, row in enumerate(history, 1):
        print(f"epoch {number}: loss {row['loss']:.4f}" + (f", mAP50 {row['mAP50']:.4f}" if row["mAP50"] else ""))
    cuda = trainer.device.type == "cuda"
    results = {
        "mAP50": round(float(trainer.metrics["metrics/mAP50(B)"]), 5),
        "mAP50-95": round(float(trainer.metrics["metrics/mAP50-95(B)"]), 5),
        "loss": [row["loss"] for row in history],
        "first_loss": first[0],  # of the first batch, with the weights that the seed gives
        "seconds": {"training": round(seconds, 1), "all": round(time.perf_counter() - started, 1)},
        "seed": arguments.seed,
        "epochs": arguments.epochs,
        "frames": arguments.frames,
        "size": arguments.size,
        "batch": arguments.batch,
        "workers": trainer.train_loader.num_workers,
        "device": torch.cuda.get_device_name(trainer.device) if cuda else "cpu",
        "versions": {"torch": torch.__version__, "ultralytics": ultralytics.__version__, "opencv": cv2.__version__},
    }
    text = json.dumps(results)
    (out / "results.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
