#!/usr/bin/env bash
# A run on all hosts of a TPU VM pod; each has this folder with its .venv in the home folder. The run is
# restarted after a stop signal (exit status 75) or a lost host (5), while the pod exists.
#   TPU=my-pod ZONE=us-central2-b scripts/launch/tpu_vm.sh train_dpo --config configs/... --mesh ...
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?zone of the TPU VM}"
command="cd ${FOLDER:-easyaira} && exec .venv/bin/python -m easyaira.$(printf '%q ' "$@")"
status=1
for ((attempt = 1; attempt <= ${ATTEMPTS:-10}; attempt++)); do
  status=0
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all --command "$command" || status=$?
  [[ $status == 75 || $status == 5 ]] || break
done
exit "$status"
