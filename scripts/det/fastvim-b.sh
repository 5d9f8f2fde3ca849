#!/usr/bin/env bash
# Cascade Mask R-CNN on FastVim-B, COCO, 184,375 steps from an ImageNet FastVim-B, total batch 16 on 8 GPUs. Published: box AP 50.0.
# usage: bash scripts/det/fastvim-b.sh DATA_PATH --finetune FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch det-fastvim-b COCO "$@" -- \
    --task detect --model fastvim_base_patch16_224 \
    --iterations 184375 --eval-interval 7375 --decay-iters 163889 177546 --warmup-iters 250 --batch-size 2 --lr 1e-4 \
    --weight-decay 0.05 --clip-grad 35 --drop-path 0.4 --num_workers 8 --dist-eval
