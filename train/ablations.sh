#!/usr/bin/env bash
# Two questions of the paper at the size of the small world, every model from nothing with the same number of steps and tokens:
# does one model beat two separate ones, and which latent embedding is best? Every command resumes when run again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
NPROC="${NPROC:-2}"
STEPS="${STEPS:-800}"
OUT="${OUT:-runs/ablations}"
AUTOENCODER="${AUTOENCODER:-runs/small/autoencoder/final}"

variant() {  # name, tasks that it is scored on, overrides of configs/small/language.yaml
    local name="$1" tasks="$2"
    shift 2
    torchrun --nproc-per-node "$NPROC" -m train.pretrain configs/small/language.yaml autoencoder="$AUTOENCODER" \
        data.rows_per_batch=11 data.row_length=240 data.plans=0.9 data.drop.t2i=0.12 \
        data.tasks.recite=0 data.tasks.look_up=0 data.tasks.read=0 \
        run.output_dir="$OUT/$name" run.num_steps="$STEPS" optim.decay_fraction=0.4 "$@"
    python -m eval.small_world model="$OUT/$name/final" output="$OUT/$name/eval" tasks="$tasks"
    cp "$OUT/$name/eval/results.json" "$OUT/$name.json"
}

draw=(data.tasks.t2i=0.55)
read=(data.tasks.vqa=0.35 data.tasks.describe=0.1)
variant softmax "[geneval, mme, describe]" "${draw[@]}" "${read[@]}"
variant draw-only "[geneval]" "${draw[@]}"
variant read-only "[mme, describe]" "${read[@]}"
variant argmin "[geneval, mme, describe]" "${draw[@]}" "${read[@]}" options.latent_embedding=argmin
variant linear "[geneval, mme, describe]" "${draw[@]}" "${read[@]}" options.latent_embedding=linear
python -m eval.report --beside "$OUT"/*.json --markdown "$OUT/ablations.md"
cat "$OUT/ablations.md"
