#!/usr/bin/env bash
# Evaluate the pruned model in FILE: accuracy, what it keeps, speed against the unpruned model, multiply-adds.
# usage: bash scripts/dyvm/eval.sh DATA_PATH --model-path FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch dyvm-eval IMNET "$@" -- \
    --eval --model Vim-Small --pruning both --token-keep-ratio 0.7 --block-keep-ratio 0.8 \
    --batch-size 64 --num_workers 25 --no_amp
