from datasets import load_dataset
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

arguments = TrainingArguments("out", dataloader_num_workers=4, remove_unused_columns=False)
trainer = Trainer(AutoModelForImageClassification.from_pretrained("x"), arguments, train_dataset=load_dataset("y"))
trainer.train()  # expect: missing-guard
