#!/usr/bin/env bash
#SBATCH --job-name=easyaira
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# A run under SLURM: one process on each node, with all of its GPUs (--ntasks-per-node=8 makes it one
# for each GPU). Three minutes before its time is up it saves, and the job is queued again; so it is
# where it was told to stop (75), or a host was lost (5) or killed (137, 143).
#   sbatch --time=24:00:00 scripts/launch/slurm.sh train_dpo --config configs/... --mesh ...
set -euo pipefail
status=0
srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" -m easyaira."$@" || status=$?
if [[ $status == 75 || ($status =~ ^(5|137|143)$ && ${SLURM_RESTART_COUNT:-0} -lt 10) ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
