"""What the examples prune. `python examples/NAME.py [MODEL [TEXT]]` takes SmolLM2-135M and C4 by default; `--small`
takes a tiny random model and random words, for a try in a minute."""

import argparse

import tiny
from transformers import PreTrainedModel

import adapruner
from adapruner.evaluation.losses import Perplexity, measure_perplexity
from adapruner.text.reading import read_documents
from adapruner.text.sources import parse_source
from adapruner.text.windows import evaluation_text

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="smollm2", help="Hub id, model folder, .gguf file, or smollm2")
parser.add_argument("text", nargs="?", default="c4", help="a known dataset, hf:…, or a .txt, .jsonl or .parquet file")
parser.add_argument(
    "--small", nargs="?", const="llama", help="a tiny random model, by default a Llama, and random words"
)
given = parser.parse_args()

model = tiny.model(given.small) if given.small else adapruner.load(given.model)
tokenizer = tiny.tokenizer() if given.small else adapruner.load_tokenizer(given.model)
texts = tiny.texts() if given.small else read_documents(parse_source(given.text))
# Of a run, and of single steps.
options = tiny.OPTIONS if given.small else {}
seq_len, round_to = (16, 1) if given.small else (128, 32)


def perplexity(model: PreTrainedModel, name: str, documents: list[str] | None = None) -> Perplexity:
    """Of a model in memory, on 64 windows of documents, or of a known dataset."""
    source = "\n\n".join(documents) if documents else parse_source(name, "report")
    text = evaluation_text(source, tokenizer, seq_len, limit=64, name=name)
    return measure_perplexity(model, text.windows, name, **text.about)
