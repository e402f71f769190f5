#!/bin/bash
# bash examples/vocabulary.sh
#
# Removes the tokens that English text does not use, alone and together with a tenth of the layers' parameters.
# For Gemma 3 270M and 59 MB of text, the first command took 63 seconds on two CPU cores.
set -euo pipefail

adapruner vocabulary Qwen/Qwen3-0.6B --vocabulary c4 -o runs/english-tokens
adapruner evaluate runs/english-tokens --evaluate wikitext2
adapruner prune Qwen/Qwen3-0.6B -o runs/english-and-smaller --ratio 0.3 --vocabulary c4 --calibration c4
