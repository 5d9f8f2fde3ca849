#!/usr/bin/env bash
# UPerNet on FastVim-T, ADE20K, 160k steps from an ImageNet FastVim-T, total batch 16 on 8 GPUs. Published: mIoU 41.8.
# usage: bash scripts/seg/fastvim-t.sh DATA_PATH --finetune FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch seg-fastvim-t ADE20K "$@" -- \
    --task segment --model fastvim_tiny_patch16_224 \
    --iterations 160000 --eval-interval 16000 --warmup-iters 1500 --batch-size 2 --lr 6e-5 --weight-decay 0.01 \
    --drop-path 0.1 --num_workers 8 --dist-eval
