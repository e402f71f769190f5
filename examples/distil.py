"""Fine-tunes a pruned model in two ways on one text: on the text itself, and on what the dense model predicts.

The second call changes the recovery alone, so it resumes the run behind the pruned model.

`--small` took 81 seconds on a busy core.
"""

from inputs import given, model, options, seq_len, texts, tokenizer

import adapruner

settings = {"steps": 2 if given.small else 100, "batch_size": 4, "seq_len": seq_len, "learning_rate": 1e-3}
for label_weight in (1.0, 0.0):
    result = adapruner.prune(
        *(model, texts),
        tokenizer=tokenizer,
        output="runs/distil",
        overwrite=True,
        recover=texts,
        recovery={"label_weight": label_weight, "lora_dropout": 0.0, **settings},
        **options,
    )
    [measured] = result.result.final.perplexity.values()
    record = result.result.recovery
    print(f"{record.method}: validation loss {record.loss_before:.4f} → {record.loss_after:.4f} nats per token")
    print(f"perplexity {measured.perplexity:.2f} on {measured.protocol}")
