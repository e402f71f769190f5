"""Importance metrics under one budget: cut alone and corrected, three seeds, three texts; writes metrics.json.

`--small` took 11 seconds on two cores.
"""

import json
from pathlib import Path

from inputs import given, model, perplexity, round_to, seq_len, texts, tokenizer

import adapruner

# Weights of importance terms; register yours as own_term.py does, and add it here.
metrics = {"LLM-Pruner": {"fine_first": 1.0}, "Wanda-sp": {"activation_norm": 1.0}, "FLAP": {"fluctuation": 1.0}}
known = ["wikitext2:validation", "ptb", "boolq-passages@report"]
reports = {"held out": texts[:50]} if given.small else dict.fromkeys(known)
structure, rows = adapruner.inspect(model), []
for seed in range(3):
    windows = adapruner.make_windows(texts[50:], tokenizer, 32 if given.small else 138, seq_len, seed)
    statistics = adapruner.measure(model, structure, windows[:10])
    for name, metric in metrics.items():
        plan = adapruner.PruningPlan.from_scores(
            structure, adapruner.score(statistics, structure, metric), 0.2, round_to=round_to
        )
        cut = adapruner.cut(model, structure, plan)
        for step, pruned in ("cut", cut), ("corrected", adapruner.compensate(model, structure, plan, windows[10:])):
            for text in [perplexity(pruned, *report) for report in reports.items()]:
                rows.append({"metric": name, "seed": seed, "step": step, "ratio": plan.ratio, **text.model_dump()})
                print(f"{name:12} seed {seed} {step:10} {text.perplexity:10.2f} {text.protocol}", flush=True)
content = {"adapruner": adapruner.__version__, "model": model.name_or_path, "metrics": metrics, "rows": rows}
Path("metrics.json").write_text(json.dumps(content, indent=1))
