#!/usr/bin/env bash
# The short sweeps of docs/results.md, two epochs each: depth without shortcuts, and few images.
# Start one for each core, or on each machine that shares ROOT; start it again after an interruption:
#   taskset -c 0 experiments/laboratory.sh ROOT & taskset -c 1 experiments/laboratory.sh ROOT
# More arguments go to every sweep: --dry_run lists the runs and the hours that they would take.
set -euo pipefail
root=${1:?give the folder of the results}
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages: steps a tenth faster

sweep() { # the sweep, and more flags
  "$python" experiments/run.py --sweep="$1" --root="$root" --config=configs/fashion_mnist_small.py \
    --config.data.manual_dir="${DATA:-/usr/share/datasets/fashion-mnist}" \
    --config.train.epochs=2 "${@:2}"
}

sweep learning_rate --seeds=1 "$@" # on held-out images
tuned=(--learning_rates="$root/learning_rate")
for argument in "$@"; do [[ $argument == --dry_run ]] && tuned=(); done # there are no results yet
sweep degradation "${tuned[@]}" --config.model.growth_rate=6 "$@"
sweep train_size "${tuned[@]}" --only='*_plain_images_*' "$@"
