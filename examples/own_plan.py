"""The steps one by one, with the plan edited as JSON in between: measure, score, plan, cut, compensate.

`--small` took 27 seconds on a busy core.
"""

import json

from inputs import model, round_to, seq_len, texts, tokenizer

import adapruner

structure = adapruner.inspect(model)
windows = adapruner.make_windows(texts, tokenizer, count=32, seq_len=seq_len)  # [windows, tokens]
statistics = adapruner.measure(model, structure, windows[:8])  # per sample and vector
scores = adapruner.score(statistics, structure, {"fine_first": 1.0, "fluctuation": 0.5})  # [groups]
plan = adapruner.PruningPlan.from_scores(structure, scores, ratio=0.1, round_to=round_to)

edited = json.loads(plan.model_dump_json())
for block in edited["blocks"]:
    if (block["layer"], block["kind"]) == (2, "channels"):
        block["kept"] = list(range(0, block["groups"], 2))  # every second channel
plan = adapruner.PruningPlan.of(structure, [block["kept"] for block in edited["blocks"]])

cut = adapruner.cut(model, structure, plan)
compensated = adapruner.compensate(model, structure, plan, windows[8:])
for name, one in {"dense": model, "cut": cut, "compensated": compensated}.items():
    tokens = windows[:8].to(one.device)
    print(f"{name:12} {one.num_parameters():,} parameters, loss {one(tokens, labels=tokens).loss:.4f}")
