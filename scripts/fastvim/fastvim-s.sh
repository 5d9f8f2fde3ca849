#!/usr/bin/env bash
# FastVim-S, ImageNet-1k, 300 epochs from scratch, total batch 1024 on 8 GPUs. Published: 81.1 % top-1.
# usage: bash scripts/fastvim/fastvim-s.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

# 5e-4 for 512 images, scaled to 1e-3 for 1024
launch fastvim-s IMNET "$@" -- \
    --model fastvim_small_patch16_224 --batch-size 128 --epochs 300 --num_workers 10 \
    --lr 5e-4 --warmup-epochs 5 --warmup-lr 1e-6 --min-lr 1e-5 --weight-decay 0.05 --drop-path 0.05 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 \
    --model-ema --model-ema-decay 0.9999
