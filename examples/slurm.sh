#!/bin/bash
# sbatch examples/slurm.sh runs/7b/model runs/7b/tuned
#
# One process for each GPU of two nodes, which share the file system. Not tried on a cluster yet.
#SBATCH --job-name=adapruner
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node gpu \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m adapruner recover "$1" --data c4 -o "$2" --batch-size 32
