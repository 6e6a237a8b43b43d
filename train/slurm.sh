#!/usr/bin/env bash
# A run over several GPU nodes under Slurm, one process a GPU: sbatch train/slurm.sh train.pretrain --data … --run.out …
# Folders must be shared by the nodes, or lie in a bucket. jax finds the other processes by Slurm's own variables.
# A run that Slurm preempts, or whose node fails, is put back into the queue, and goes on from its last checkpoint.
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" .venv/bin/python -m "$@"
