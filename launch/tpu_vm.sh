#!/usr/bin/env bash
# Trains on every host of a TPU VM slice; run it where gcloud is.
# Usage: launch/tpu_vm.sh NAME ZONE WORKDIR FLAGS...
#   launch/tpu_vm.sh my-slice us-west4-a gs://my-bucket/runs/a --config=configs/cifar10.py
# Each host needs this repository in ~/densejax with its environment made by `make tpu`:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#     --command="git clone REPOSITORY densejax && make -C densejax tpu"
set -euo pipefail
if (($# < 4)); then
  sed -n '3,4s/^# //p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 workdir=$3
shift 3
printf -v flags ' %q' "--workdir=$workdir" "$@"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd densejax && .venv/bin/python -m densejax.main$flags"
