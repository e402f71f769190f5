"""Prunes a model in memory on a list of strings, then evaluates and saves it: nothing needs a path.

`--small` took 26 seconds on two cores.
"""

from inputs import model, options, perplexity, texts, tokenizer

import adapruner

held_out, calibration = texts[:50], texts[50:]
result = adapruner.prune(model, calibration, tokenizer=tokenizer, ratio=0.2, **options)
pruned = result.model  # an ordinary PreTrainedModel

# Every number carries its protocol, without which a perplexity means nothing.
for name, one in {"dense": model, "pruned": pruned}.items():
    measured = perplexity(one, "held out", held_out)
    print(f"{name}: perplexity {measured.perplexity:.2f}, {measured.protocol}")

prompt = tokenizer(held_out[0][:20], return_tensors="pt").to(pruned.device)
print(tokenizer.decode(pruned.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
pruned.save_pretrained("runs/in-memory")
