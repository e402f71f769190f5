# python examples/distil.py HuggingFaceTB/SmolLM2-360M c4 wikitext2 runs/distil
"""Prunes a model, then trains it in two ways on one text: on the text itself, and on what the dense model predicts.

Arguments: a model, the text to calibrate and train on, the text to report on, a run folder. Both trainings begin
with the same pruned model, which stays as it is; a training that was killed goes on from its last saved step.
"""

import sys
from pathlib import Path

import adapruner

model, text, report, output = sys.argv[1:]
pruned = adapruner.prune(model, output, ratio=0.2, calibration=text).model_folder

# Only documents that nothing was calibrated on or judged by are reported on; those for training are of another part.
data = f"{text}@calibration"
settings = {"steps": 100, "batch_size": 16, "learning_rate": 1e-3, "lora_dropout": 0.0}

# What is learnt is merged into a normal checkpoint of the same size.
for name, teacher in (("labels", None), ("distillation", model)):
    record = adapruner.recover(pruned, data, Path(output, name), teacher, **settings)
    before, after = record["loss_before"], record["loss_after"]
    print(f"{name}: validation loss {before:.4f} → {after:.4f} nats per token after {record['tokens']:,} tokens")

for name in (model, pruned, Path(output, "labels"), Path(output, "distillation")):
    for measured in adapruner.evaluate(name, perplexity=[f"{text}@report", report], limit=64).perplexity:
        print(f"{name}: {measured.perplexity:.2f} on {measured.protocol}")
