#!/usr/bin/env bash
# Trains the record's network with a seed into FOLDER: run.sh SEED FOLDER; DATA names the images.
# Prints the seconds from the first process's start to the last one's end, and the test accuracy.
set -euo pipefail
seed=${1:?a seed} folder=${2:?a folder}
cd "$(dirname "$0")/../../.."
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"
export JAX_NUM_CPU_DEVICES=2 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
export JAX_COMPILATION_CACHE_DIR="$folder/compiled" # empty: compilation counts
start=$(date +%s.%N)

train() { # a stage into its folder, and its flags
  "$python" -m densejax.main --workdir="$folder/$1" --config=configs/fashion_mnist.py \
    --config.data.manual_dir="${DATA:-/usr/share/datasets/fashion-mnist}" --config.seed="$seed" \
    --config.model.bottleneck=False "--config.model.blocks=(1,2,4)" \
    "--config.model.growth_rate=(8,32,64)" --config.augmentation.shift=0 \
    --config.augmentation.alternate_flip --config.train.average_decay=0.998 \
    --config.train.batch_size=256 --config.optimizer.name=muon \
    --config.optimizer.learning_rate=0.5 --config.evaluate.mirror "${@:2}"
}
train small --config.data.image_size=20 --config.train.epochs=6 \
  --config.optimizer.schedule=constant --config.optimizer.warmup_epochs=0.25
train large --config.train.weights="$folder/small" --config.train.epochs=7 \
  --config.optimizer.schedule=linear --config.optimizer.warmup_epochs=0

end=$(date +%s.%N)
"$python" - "$folder" "$start" "$end" <<'PYTHON'
import json, pathlib, sys
folder, start, end = pathlib.Path(sys.argv[1]), *map(float, sys.argv[2:])
found = json.loads((folder / "large/summary.json").read_text())
print(f"{end - start:.0f} s, test accuracy {found['test_accuracy']:.2%}")
(folder / "time.json").write_text(json.dumps({"seconds": end - start}))
PYTHON
