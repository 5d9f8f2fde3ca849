#!/usr/bin/env bash
# UPerNet on DyVM-S, ADE20K, 80k steps from an ImageNet Vim-S or DyVM-S, tokens 0.8 and scan directions 0.8, total
# batch 32 on 8 GPUs.
# usage: bash scripts/seg/dyvm-s.sh DATA_PATH --finetune FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch seg-dyvm-s ADE20K "$@" -- \
    --task segment --model Vim-Small --pruning both --token-keep-ratio 0.8 --block-keep-ratio 0.8 \
    --iterations 80000 --eval-interval 8000 --warmup-iters 1500 --batch-size 4 --lr 1.2e-4 --weight-decay 0.01 \
    --layer-decay 0.92 --clip-grad 5 --drop-path 0.1 --num_workers 8 --dist-eval
