"""Heals a pruned model, or not: it is trained to predict as the dense model does, on 400,000 tokens.

The second call changes the healing alone, so it reuses the plan. Not run with a real model.
"""

from inputs import given, model, options, texts, tokenizer

import adapruner

for tokens in ("none", "4k" if given.small else "400k"):
    result = adapruner.prune(
        *(model, texts), tokenizer=tokenizer, output="runs/distil", overwrite=True, **options | {"heal": tokens}
    )
    measured, *_ = result.result.final.perplexity.values()
    print(f"heal {tokens}: perplexity {measured.perplexity:.2f} on {measured.protocol}")
    healing = result.result.healing
    if healing and healing.record:
        losses = f"{healing.record.loss_before:.4f} → {healing.record.loss_after:.4f}"
        print(f"{healing.trained}: divergence from the dense model {losses} nats per token")
