"""A function of your own judges the trials: here, the loss on the second half of documents, given the first half.

`--small` took 57 seconds on a busy core.
"""

from inputs import model, options, seq_len, texts, tokenizer

import adapruner

windows = adapruner.make_windows(texts[:50], tokenizer, count=8, seq_len=seq_len)
labels = windows.clone()
labels[:, : seq_len // 2] = -100  # of these tokens, no loss is taken


def second_halves(pruned):
    """[items]: one loss for each item, of the same items for every model; lower is better."""
    pairs = zip(windows.to(pruned.device), labels.to(pruned.device), strict=True)
    return [pruned(window[None], labels=label[None]).loss.item() for window, label in pairs]


result = adapruner.prune(model, texts[50:], tokenizer=tokenizer, ratio=0.2, objective=second_halves, **options)
print(f"best trial {result.result.search.best_loss:.4f}, dense model {sum(second_halves(model)) / len(windows):.4f}")
