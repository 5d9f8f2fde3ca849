#!/usr/bin/env bash
# UPerNet on DyVM-T, ADE20K, 80k steps from an ImageNet Vim-T or DyVM-T, tokens 0.9 and scan directions 0.8, total
# batch 16 on 8 GPUs.
# usage: bash scripts/seg/dyvm-t.sh DATA_PATH --finetune FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch seg-dyvm-t ADE20K "$@" -- \
    --task segment --model Vim-Tiny --pruning both --token-keep-ratio 0.9 --block-keep-ratio 0.8 \
    --iterations 80000 --eval-interval 8000 --warmup-iters 1500 --batch-size 2 --lr 6e-5 --weight-decay 0.01 \
    --layer-decay 0.92 --clip-grad 5 --drop-path 0.1 --num_workers 8 --dist-eval
