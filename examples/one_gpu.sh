#!/bin/bash
# bash examples/one_gpu.sh
#
# A model of 0.6 billion parameters on one GPU: prune, fine-tune on two million tokens, compare, and write a file for llama.cpp.
# Not run on a GPU yet. The tests run these commands with a tiny model.
set -euo pipefail

adapruner inspect Qwen/Qwen3-0.6B --cost --gpu-memory 8GB
adapruner prune Qwen/Qwen3-0.6B -o runs/small-qwen --ratio 0.2 --for llama.cpp --calibration c4 --evaluate wikitext2
adapruner recover runs/small-qwen/model --data c4 --teacher Qwen/Qwen3-0.6B --tokens 2M -o runs/small-qwen/tuned
adapruner evaluate runs/small-qwen/tuned --against Qwen/Qwen3-0.6B --evaluate wikitext2
adapruner benchmark runs/small-qwen/tuned --against Qwen/Qwen3-0.6B -o runs/small-qwen/speed.json
adapruner export runs/small-qwen/tuned --to gguf -o runs/small-qwen/small.gguf
