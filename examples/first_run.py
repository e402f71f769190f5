"""Prunes a fifth of a model, and shows what it writes before and after.

`--small` took 48 seconds on a busy core.
"""

from inputs import given, model, options, texts, tokenizer

import adapruner

output = "runs/first-small" if given.small else "runs/first"
result = adapruner.prune(model, texts, tokenizer=tokenizer, ratio=0.2, output=output, **options)
for table in result.tables():
    print(table.markdown())

for name, one in {"dense": model, "pruned": result.model}.items():
    prompt = tokenizer("the water in the river", return_tensors="pt").to(one.device)
    print(f"{name}: {tokenizer.decode(one.generate(**prompt, max_new_tokens=24, do_sample=False)[0])}")
print(f"model {result.model_folder}, report {result.report}")
