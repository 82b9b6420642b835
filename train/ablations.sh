#!/usr/bin/env bash
# Two questions of the paper at the size of the small world, every model with the same number of steps and tokens from the same
# start: does one model beat two separate ones, and which latent embedding is best? Every command resumes when run again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
NPROC="${NPROC:-2}"
LANGUAGE_STEPS="${LANGUAGE_STEPS:-400}"
STEPS="${STEPS:-450}"
OUT="${OUT:-runs/ablations}"
AUTOENCODER="${AUTOENCODER:-runs/small/autoencoder/final}"

language() {  # name of the latent embedding
    torchrun --nproc-per-node "$NPROC" -m train.pretrain configs/small/language.yaml autoencoder="$AUTOENCODER" \
        run.output_dir="$OUT/language-$1" run.num_steps="$LANGUAGE_STEPS" options.latent_embedding="$1"
}

variant() {  # name, latent embedding, tasks that it is scored on, overrides of configs/small/base.yaml
    local name="$1" embedding="$2" tasks="$3"
    shift 3
    torchrun --nproc-per-node "$NPROC" -m train.posttrain configs/small/base.yaml model="$OUT/language-$embedding/final" \
        run.output_dir="$OUT/$name" run.num_steps="$STEPS" run.ema_decay=0.99 optim.decay_fraction=0.4 "$@"
    python -m eval.small_world model="$OUT/$name/final" output="$OUT/$name/eval" tasks="$tasks"
    cp "$OUT/$name/eval/results.json" "$OUT/$name.json"
}

for embedding in softmax argmin linear; do
    language "$embedding"
    variant "$embedding" "$embedding" "[geneval, mme, describe]"
done
variant draw-only softmax "[geneval]" data.tasks.vqa=0 data.tasks.describe=0 data.tasks.read=0
variant read-only softmax "[mme, describe]" data.tasks.t2i=0
python -m eval.report --beside "$OUT"/*.json --markdown "$OUT/ablations.md"
cat "$OUT/ablations.md"
