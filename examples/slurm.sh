#!/usr/bin/env bash
# A run in eight shares, one for each task of an array: sbatch slurm.sh --model NAME -o DIR
# A share that was stopped goes on with: sbatch --array=ITS_NUMBER slurm.sh --model NAME -o DIR
#SBATCH --array=1-8
#SBATCH --gpus-per-task=1
set -euo pipefail
exec llm-attack run --progress json --shard "$SLURM_ARRAY_TASK_ID/${SHARES:-8}" "$@"
