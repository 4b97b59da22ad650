#!/usr/bin/env bash
# Five patterns for the same time on a CPU: all train as long as the dense network in eight epochs.
# ROOT is the folder of study_connections.sh, which chose the learning rates. First time the steps,
# with nothing beside, and then start one for each core:
#   taskset -c 0 experiments/study_time.sh ROOT --training_time
#   taskset -c 0 experiments/study_time.sh ROOT --equal_time=dense &
#   taskset -c 1 experiments/study_time.sh ROOT --equal_time=dense
set -euo pipefail
root=${1:?give the folder of the results}
shift
. "$(dirname "$0")/sweep.sh"

tune "$root/tuning/patterns_x_learning_rate" "$@"
sweep patterns_equal_time "$root/time" --config.model.blocks="(8,8,8)" --config.model.growth_rate=6 \
  --config.train.epochs=8 "${tuned[@]}" "$@"
