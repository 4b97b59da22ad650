# What study_connections.sh, study_time.sh and laboratory.sh share; they source it, with their ROOT in `root`.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages: steps a tenth faster

sweep() { # the sweep, its folder, and more flags
  "$python" experiments/run.py --sweep="$1" --root="$2" --config=configs/fashion_mnist_small.py \
    --config.data.manual_dir="${DATA:-/usr/share/datasets/fashion-mnist}" "${@:3}"
}

tune() { # the folder of the rates, and the script's flags: sets `tuned`, the flag that reads them
  tuned=(--learning_rates="$1")
  for argument in "${@:2}"; do [[ $argument == --dry_run ]] && tuned=(); done # no results yet
  return 0
}
