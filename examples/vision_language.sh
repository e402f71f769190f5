#!/bin/bash
# bash examples/vision_language.sh
#
# A model that reads images: its decoder is pruned, everything else is written back as it was. The result is a complete
# checkpoint, for AutoModelForMultimodalLM and AutoProcessor.
# Not run with this model (8.6 GB of weights). The tests run these commands with a tiny one.
set -euo pipefail

adapruner inspect google/gemma-3-4b-it                       # the share of the parameters that is in the decoder
adapruner prune google/gemma-3-4b-it -o runs/gemma --ratio 0.2 --layout uniform --calibration c4
adapruner recover runs/gemma/model --data c4 --steps 200 -o runs/gemma/tuned
