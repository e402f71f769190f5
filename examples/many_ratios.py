"""Several ratios from one measurement: the channels kept in every layer, and the perplexity.

`--small` took 84 seconds on a busy core.
"""

from inputs import model, options, texts, tokenizer

import adapruner

results = adapruner.prune_ratios(model, texts, tokenizer=tokenizer, ratio=(0.05, 0.1, 0.15, 0.2), **options)
# From one search too, without trials of its own:
# adapruner.plan_again(results[0].output, "runs/other", ratio=0.12)

dense = results[0].result.model("dense")
for numbers, kept in ((dense, None), *((result.result.final, result.plan.blocks) for result in results)):
    [measured] = numbers.perplexity.values()
    print(f"{numbers.parameters:,} parameters, perplexity {measured.perplexity:.2f}")
    if kept:
        shares = [f"{len(block.kept) / block.groups:.0%}" for block in kept if block.kind == "channels"]
        print(f"  channels kept, layer by layer: {' '.join(shares)}")
print(measured.protocol)
