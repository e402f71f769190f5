#!/bin/bash
# bash examples/vocabulary.sh
#
# Removes the tokens that English text does not use, and then a tenth of the remaining parameters.
# For Gemma 3 270M and 59 MB of text, the first command took 63 seconds on two CPU cores.
set -euo pipefail

adapruner vocabulary Qwen/Qwen3-0.6B --vocabulary c4 -o runs/english-tokens
adapruner evaluate runs/english-tokens --evaluate wikitext2
adapruner prune runs/english-tokens -o runs/english-and-smaller --ratio 0.1 --calibration c4
