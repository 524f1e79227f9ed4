from ultralytics import YOLO

model = YOLO("yolov8n.yaml")
if model.overrides:
    model.train(data="coco8.yaml", epochs=3, imgsz=64)  # expect: missing-guard
