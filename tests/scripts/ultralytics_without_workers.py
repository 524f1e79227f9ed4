"""Its loaders have no workers: clean."""

import ultralytics

model = ultralytics.YOLO("yolov8n.yaml")
model.train(data="coco8.yaml", epochs=3, workers=0)
results = model.predict("bus.jpg")
