#!/usr/bin/env bash
# DyVM on MambaReg-S, 30 epochs from a trained MambaReg-S, tokens 0.7 and scan directions 0.8, on 4 GPUs as published
# (but tested on whole images, as those weights want).
# usage: bash scripts/dyvm/mambareg-s.sh DATA_PATH --model-path FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch dyvm-mambareg-s IMNET "$@" -- \
    --model MambaReg-Small --pruning both --token-keep-ratio 0.7 --block-keep-ratio 0.8 \
    --batch-size 64 --epochs 30 --lr 5e-5 --min-lr 1e-6 --warmup-lr 1e-5 --warmup-epochs 5 --drop-path 0.0 \
    --weight-decay 1e-8 --token-pruning-weight 10 --block-pruning-weight 10 --eval-crop-ratio 1.0 --num_workers 25 --no_amp
