#!/usr/bin/env bash
# The connection study and the growth-rate ablation of docs/study_connections.md, from first to last.
# Start one for each core, or on each machine that shares ROOT; start it again after an interruption:
#   taskset -c 0 experiments/study_connections.sh ROOT & taskset -c 1 experiments/study_connections.sh ROOT
# More arguments go to every sweep: --dry_run lists the runs and the hours that they would take.
set -euo pipefail
root=${1:?give the folder of the results}
shift
. "$(dirname "$0")/sweep.sh"

# How the layers are joined: three blocks of eight layers, k = 6.
eight=(--config.model.blocks="(8,8,8)" --config.model.growth_rate=6)
ten=(--config.train.epochs=10)
# The peak of each kind's learning rate, by 5,000 held-out images: half as many images, two epochs.
sweep patterns "$root/tuning" "${eight[@]}" --axis=optimizer.learning_rate=0.1,0.2,0.4,0.8 --seeds=1 \
  --config.train.epochs=2 --config.data.train_size=30000 --config.data.validation_size=5000 \
  --config.evaluate.split=validation --config.evaluate.final_split=validation "$@"
tune "$root/tuning/patterns_x_learning_rate" "$@"
sweep patterns "$root/study" "${eight[@]}" "${ten[@]}" "${tuned[@]}" --seeds=1 "$@"

# How many feature maps a layer adds, at equal depth and at equal multiply-adds.
wide=(--config.model.blocks="(2,4,4)" --config.model.growth_rate=18)
sweep growth_rate "$root/growth" "${wide[@]}" "${ten[@]}" "${tuned[@]}" --values=6,12,18,24,32 "$@"
sweep growth_rate_equal_multiply_adds "$root/growth" "${wide[@]}" "${ten[@]}" "${tuned[@]}" "$@"

# Growth rates that double with each block, and depth against width: the network of the card.
sweep growth_schedule "$root/shapes" "${ten[@]}" "${tuned[@]}" "$@"
sweep depth_width "$root/shapes" "${ten[@]}" "${tuned[@]}" "$@"

# More seeds of each pattern; eight of those whose comparison was written down (sweeps.COMPARISONS).
sweep patterns "$root/study" "${eight[@]}" "${ten[@]}" "${tuned[@]}" --seeds=3 "$@"
sweep patterns "$root/study" "${eight[@]}" "${ten[@]}" "${tuned[@]}" --seeds=8 \
  --only="dense_*,residual_*,exponential_*,one_shot_*,weighted_*" "$@"

# The five patterns with the best means so far, with as many parameters as the dense network; and
# four patterns with half as many layers.
sweep patterns_equal_parameters "$root/study" "${eight[@]}" "${ten[@]}" "${tuned[@]}" --seeds=3 \
  --only="dense_*,laurel_*,hyper_*,residual_*,weighted_*" "$@"
sweep patterns "$root/depth" --axis=model.blocks="(4,4,4),(8,8,8)" --config.model.growth_rate=6 \
  "${ten[@]}" "${tuned[@]}" --seeds=3 --only="dense_*,residual_*,exponential_*,one_shot_*" "$@"
