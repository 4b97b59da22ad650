#!/usr/bin/env bash
# Trains the record's network with a seed into FOLDER: run.sh SEED FOLDER; DATA names the images.
set -euo pipefail
seed=${1:?a seed} folder=${2:?a folder}
cd "$(dirname "$0")/../../.."
exec "${PYTHON:-.venv/bin/python}" -m densejax.main --workdir="$folder" \
  --config=configs/fashion_mnist.py --config.seed="$seed" \
  --config.data.manual_dir="${DATA:-/usr/share/datasets/fashion-mnist}" \
  --config.model.bottleneck=False "--config.model.blocks=(3,4,5)" \
  "--config.model.growth_rate=(24,40,56)" --config.train.epochs=300 \
  --config.train.batch_size=256 --config.train.dtype=bfloat16 --config.train.average_decay=0.998 \
  --config.optimizer.learning_rate=0.2 --config.optimizer.warmup_epochs=2 \
  --config.augmentation.alternate_flip --config.augmentation.erasing=0.5 \
  --config.evaluate.mirror --config.evaluate.shift=1 --config.checkpoint.every_epochs=100 \
  --config.log.every_steps=100
