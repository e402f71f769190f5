#!/bin/bash
# ADAPRUNER_STORAGE=postgresql://user:password@host/name sbatch examples/slurm.sh MODEL runs/big
#
# A run and three workers that share its search, each on a GPU of its own. Not tried on a cluster yet.
#SBATCH --job-name=adapruner
#SBATCH --array=0-3
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
set -euo pipefail

if [ "$SLURM_ARRAY_TASK_ID" = 0 ]; then
    adapruner prune "$1" -o "$2" --ratio 0.2 --calibration c4 --storage "$ADAPRUNER_STORAGE"
else
    # Until the run has begun, there is nothing to join.
    for _ in $(seq 20); do
        adapruner join "$2" --storage "$ADAPRUNER_STORAGE" && exit 0
        sleep 30
    done
    exit 1
fi
