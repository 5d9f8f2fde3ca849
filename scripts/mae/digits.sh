#!/usr/bin/env bash
# Masked pre-training on handwritten digits without their labels, then what it bought: fine-tuning with every tenth label
# against training from scratch with the same ones (three seeds each), and a linear probe. Minutes on two cores.
# Environment: FAMILY fastvim or vim (default fastvim), OUTPUT_DIR (default output/mae-digits, with -FAMILY behind it if one
# is named), STEPS of pre-training (default 264, 12 epochs), FEW_STEPS of the rest (default 110, 18 epochs of the few), SEEDS
# (default "0 1 2"). Safe to interrupt: the same command goes on.
# usage: bash scripts/mae/digits.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup.sh

family=${FAMILY:-fastvim}
output=${OUTPUT_DIR:-output/mae-digits${FAMILY:+-$FAMILY}}
steps=${STEPS:-264}
few=${FEW_STEPS:-110}
plain=(--num_workers 0 --no-model-ema --drop-path 0 --mixup 0 --cutmix 0 --reprob 0 --aa none --color-jitter 0
    --no-repeated-aug --sched-on-updates --warmup-lr 0)

run() {
    local name=$1
    shift
    printf '\n== %s: main.py %s\n' "$name" "$*"
    # a finished run, or one that was interrupted, goes on from where it is
    "$PYTHON" main.py --data-set DIGITS "${plain[@]}" --output_dir "$output/$name" --resume auto "$@"
}

run pretrain --task pretrain --model "mae_${family}_nano_patch4_32" --iterations "$steps" --eval-interval $((steps / 4)) \
    --batch-size 64 --unscale-lr --lr 1e-3 --min-lr 0 --warmup-iters $((steps / 12)) --visualize "$output/pictures"
weights=$output/pretrain/checkpoint.pth
classifier=${family}_nano_patch4_32
# the Vim that is pre-trained has a norm behind its scans
[ "$family" != vim ] || classifier+=_final_pool_mean_abs_pos_embed_with_midclstok_div2
labels=(--model "$classifier" --label-share 0.1 --iterations "$few" --batch-size 24 --warmup-iters $((few / 12))
    --min-lr 1e-5 --smoothing 0.1 --unscale-lr --lr 2e-3)
for seed in ${SEEDS:-0 1 2}; do
    run "finetuned-$seed" "${labels[@]}" --seed "$seed" --finetune "$weights"
    run "scratch-$seed" "${labels[@]}" --seed "$seed"
done
run probe --model "$classifier" --linear-probe --finetune "$weights" --iterations "$few" --batch-size 64 \
    --opt momentum --weight-decay 0 --unscale-lr --lr 0.1 --warmup-iters $((few / 12)) --min-lr 0 --smoothing 0

printf '\n== What was hidden, and what was rebuilt: %s\n\n' "$output/pictures/rebuilt.png"
"$PYTHON" -m benchmarks.few_labels "$output"
