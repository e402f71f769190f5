"""The divergence from a teacher of which the most probable tokens are known (docs/guides/large-models.md).

ADAPRUNER_DATA=.data:DATA python benchmarks/teacher_top.py --pruned runs/a/model
"""

from __future__ import annotations

import torch
from cyclopts import run

import adapruner
from adapruner.calibration import parse_source, text_windows
from adapruner.models import find_model, load_tokenizer
from adapruner.recovery._loss import fill_teacher, loss_and_gradient


def main(
    *, pruned: str, dense: str = "smollm2", data: str = "boolq-passages", windows: int = 8, seq_len: int = 256
) -> None:
    """Prints, for numbers of known tokens: the divergence in nats per token, as a share of the full one, and the cosine
    between the two gradients with respect to the logits."""
    student, teacher = (adapruner.load(name, dtype="float32") for name in (pruned, dense))
    tokens = text_windows(parse_source(data), load_tokenizer(find_model(dense)), seq_len)[:windows]
    sums: dict[int, list[float]] = {}
    for window in tokens.split(1):
        with torch.no_grad():
            predicted, wanted = (model(window).logits[0, :-1].float() for model in (student, teacher))
        labels, weights = window[0, 1:], torch.zeros(seq_len - 1)
        taught = wanted.log_softmax(-1)
        full, of_full = loss_and_gradient(predicted, wanted, labels, weights)
        for known in (8, 16, 32, 64, 128, 512):
            top = taught.topk(known)
            filled = fill_teacher(predicted, top.indices, top.values)
            loss, gradient = loss_and_gradient(predicted, filled, labels, weights)
            cosine = torch.cosine_similarity(gradient.flatten(), of_full.flatten(), dim=0)
            rest = 1 - top.values.exp().sum(-1).mean()
            for number, value in enumerate((float(loss), float(full), float(cosine), float(rest))):
                sums.setdefault(known, [0.0] * 4)[number] += value
    for known, (found, whole, angle, mass) in sums.items():
        nats = found / (len(tokens) * (seq_len - 1))
        print(
            f"| {known} | {nats:.4f} | {found / whole:.3f} | {angle / len(tokens):.4f} | {mass / len(tokens):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
