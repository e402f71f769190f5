"""Training a pruned model: healing and fine-tuning, with scales, LoRA or all weights."""
