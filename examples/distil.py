# python examples/distil.py HuggingFaceTB/SmolLM2-360M c4 wikitext2 runs/distil
"""Prunes a model, then trains it in two ways on one text: on the text itself, and on what the dense model predicts.

Arguments: a model, the dataset to calibrate and train on, the dataset to report on, a run folder. Both trainings start
from the same pruned model, which is not changed. Rerun the command to resume a training from its last saved step.
"""

import sys
from pathlib import Path

import adapruner

model, text, report, output = sys.argv[1:]
pruned = adapruner.prune(model, output=output, ratio=0.2, calibration=text).model_folder

# Documents are split by their use, so that nothing is reported on documents of the calibration or the training.
data = f"{text}@calibration"
settings = {"steps": 100, "batch_size": 16, "learning_rate": 1e-3, "lora_dropout": 0.0}

# The adapters are merged into a normal checkpoint of the same size.
for name, teacher in (("labels", None), ("distillation", model)):
    record = adapruner.recover(pruned, data, Path(output, name), teacher, **settings)
    before, after = record.loss_before, record.loss_after
    print(f"{name}: validation loss {before:.4f} → {after:.4f} nats per token after {record.tokens:,} tokens")

for name in (model, pruned, Path(output, "labels"), Path(output, "distillation")):
    for measured in adapruner.evaluate(name, perplexity=[f"{text}@report", report], limit=64).perplexity:
        print(f"{name}: {measured.perplexity:.2f} on {measured.protocol}")
