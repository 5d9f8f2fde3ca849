#!/usr/bin/env bash
# DyVM on Vim-Ti, 30 epochs from a trained Vim-Ti, tokens 0.9 and scan directions 0.8, on 4 GPUs as published.
# usage: bash scripts/dyvm/vim-t.sh DATA_PATH --model-path FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch dyvm-vim-t IMNET "$@" -- \
    --model Vim-Tiny --pruning both --token-keep-ratio 0.9 --block-keep-ratio 0.8 \
    --batch-size 128 --epochs 30 --lr 3e-5 --min-lr 1e-6 --warmup-lr 1e-5 --warmup-epochs 5 --drop-path 0.0 \
    --weight-decay 1e-8 --token-pruning-weight 10 --block-pruning-weight 10 --num_workers 25 --no_amp
