#!/usr/bin/env bash
# DyVM on Vim-S, 30 epochs from a trained Vim-S, tokens 0.7 and scan directions 0.8, on 4 GPUs as published.
# usage: bash scripts/dyvm/vim-s.sh DATA_PATH --model-path FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch dyvm-vim-s IMNET "$@" -- \
    --model Vim-Small --pruning both --token-keep-ratio 0.7 --block-keep-ratio 0.8 \
    --batch-size 64 --epochs 30 --lr 5e-5 --min-lr 1e-6 --warmup-lr 1e-5 --warmup-epochs 5 --drop-path 0.0 \
    --weight-decay 1e-8 --token-pruning-weight 10 --block-pruning-weight 10 --num_workers 25 --no_amp
