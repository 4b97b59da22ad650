#!/usr/bin/env bash
# The short sweeps of docs/results.md, two epochs each: depth without shortcuts, and few images.
# Start one for each core, or on each machine that shares ROOT; start it again after an interruption:
#   taskset -c 0 experiments/laboratory.sh ROOT & taskset -c 1 experiments/laboratory.sh ROOT
# More arguments go to every sweep: --dry_run lists the runs and the hours that they would take.
set -euo pipefail
root=${1:?give the folder of the results}
shift
. "$(dirname "$0")/sweep.sh"

two=(--config.train.epochs=2)
sweep learning_rate "$root" "${two[@]}" --seeds=1 "$@" # on held-out images
tune "$root/learning_rate" "$@"
sweep degradation "$root" "${two[@]}" "${tuned[@]}" --config.model.growth_rate=6 "$@"
sweep train_size "$root" "${two[@]}" "${tuned[@]}" --only='*_plain_images_*' "$@"
