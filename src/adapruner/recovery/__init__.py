"""Recovery of a pruned model: fine-tuning or distillation, with LoRA or of all weights."""
