#!/usr/bin/env bash
# GPT-2 124M on 2 nodes of 8 GPUs each, under Slurm. Submit it from the folder of the repository,
# which all nodes must share, with its environment .venv (jax[cuda12]):
#
#     sbatch launch/slurm_gpu.sh
#
# Five minutes before the time limit, and when Slurm preempts the job, SIGTERM saves a checkpoint;
# the job is then queued again and resumes.
#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8  # one process per GPU; JAX takes the GPU with the number of the task
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

status=0
srun .venv/bin/python train.py configs/gpt2_124m.py --parallel.processes 0 --name gpt2 \
  --data.paths hf:HuggingFaceFW/fineweb-edu/sample-10BT --data.stream True \
  --train.batch 512 --train.micro 2 || status=$?
if [ "$status" -eq 143 ]; then # 128 + SIGTERM: stopped with a checkpoint
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
