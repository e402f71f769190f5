"""Prunes a mixture of experts in two ways, whole experts and channels inside each expert, and compares them.

python examples/mixture.py --small mixtral        # took 51 seconds on two cores
python examples/mixture.py Qwen/Qwen3-30B-A3B     # not run: 61 GB of weights
"""

from inputs import model, options, perplexity, texts, tokenizer

import adapruner

held_out, calibration = texts[:50], texts[50:]
pruned = {"dense": model}
for granularity in ("expert", "channel"):
    result = adapruner.prune(
        model, calibration, tokenizer=tokenizer, ratio=0.2, expert_granularity=granularity, **options | {"round_to": 8}
    )
    pruned[granularity] = result.model
    left = {block.kind: f"{len(block.kept)} of {block.groups}" for block in result.plan.blocks}
    print(f"{granularity}: the last layer keeps {left}")

for name, one in pruned.items():
    measured = perplexity(one, "held out", held_out)
    print(f"{name:8} {one.num_parameters():,} parameters, perplexity {measured.perplexity:.2f}")
