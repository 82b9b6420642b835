#!/usr/bin/env bash
# The whole recipe of the shipped checkpoint on one machine without a GPU. Every command resumes when run again.
# LEVEL=free OUT=runs/free bash train/speedrun.sh: the same on the harder level, where objects stand anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
NPROC="${NPROC:-2}"
OUT="${OUT:-runs/small}"
LEVEL="${LEVEL:-grid}"
torchrun --nproc-per-node "$NPROC" -m train.autoencoder configs/small/autoencoder.yaml \
    run.output_dir="$OUT/autoencoder" world.level="$LEVEL"
torchrun --nproc-per-node "$NPROC" -m train.pretrain configs/small/language.yaml \
    run.output_dir="$OUT/language" autoencoder="$OUT/autoencoder/final" data.world.level="$LEVEL"
torchrun --nproc-per-node "$NPROC" -m train.posttrain configs/small/base.yaml \
    run.output_dir="$OUT/base" model="$OUT/language/final" data.world.level="$LEVEL"
torchrun --nproc-per-node "$NPROC" -m train.posttrain configs/small/posttrain.yaml \
    run.output_dir="$OUT/posttrain" model="$OUT/base/final" data.world.level="$LEVEL"
python -m eval.small_world model="$OUT/posttrain/final" output="$OUT/eval" world.level="$LEVEL"
python -m eval.report --run "$OUT/eval" --html "$OUT/eval/report.html"
echo "model $OUT/posttrain/final, results $OUT/eval/results.json, report $OUT/eval/report.html"
