# python examples/prune_and_compare.py HuggingFaceTB/SmolLM2-360M c4 wikitext2 runs/compare
"""Prunes a model by a fifth and compares it with the dense model: perplexity, size, speed, and generated text.

Arguments: a model, the dataset to calibrate on, the dataset to report on, a run folder. Rerun the command to resume.
"""

import sys

from transformers import AutoTokenizer

import adapruner

model, calibration, report, output = sys.argv[1:]

# Measures, searches, cuts, compensates, saves, and evaluates; invalid input raises AdaPrunerError before any work.
result = adapruner.prune(model, output=output, ratio=0.2, calibration=calibration, evaluate=(report,))

# Every number carries its protocol, without which a perplexity means nothing.
for text, measured in result.result.final.perplexity.items():
    print(measured.protocol)
    for of_run in result.result.models:
        print(f"  {of_run.role:12} {of_run.perplexity[text].perplexity:10.2f}")

# Both models take turns in this process, so that other load on the machine affects both.
speeds = adapruner.benchmark(result.model_folder, against=model, batch_sizes=(1,), repetitions=3)
for name, speed in speeds.items():
    print(f"{name}: {speed.parameters:,} parameters, {speed.weight_bytes / 1e6:,.1f} MB of weights")
    print(f"  reads {speed.prefill[1].median:,.0f} and writes {speed.decode[1].median:,.0f} tokens per second")

# An ordinary PreTrainedModel, with the tokenizer of the dense model.
tokenizer = AutoTokenizer.from_pretrained(model)
prompt = tokenizer("The capital of France is", return_tensors="pt")
for name in (model, result.model_folder):
    written = adapruner.load(name, device="cpu").generate(**prompt, max_new_tokens=12, do_sample=False)
    print(f"{name}: {tokenizer.decode(written[0], skip_special_tokens=True)}")
