#!/usr/bin/env bash
#SBATCH --job-name=easyaira
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# A run under SLURM: one process per node with all of its GPUs (one per GPU: --ntasks-per-node=8). Three
# minutes before the time limit the run saves and the job is requeued. The job is also requeued after a
# stop signal (exit status 75), a lost host (5) or a killed host (137, 143).
#   sbatch --time=24:00:00 scripts/launch/slurm.sh train_dpo --config configs/... --mesh ...
set -euo pipefail
status=0
srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" -m easyaira."$@" || status=$?
if [[ $status == 75 || ($status =~ ^(5|137|143)$ && ${SLURM_RESTART_COUNT:-0} -lt 10) ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
