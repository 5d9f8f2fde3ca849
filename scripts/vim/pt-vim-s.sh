#!/usr/bin/env bash
# Vim-S, ImageNet-1k, 300 epochs from scratch, 64 images on each of 8 GPUs at lr 1e-3 (linear in batch / 512).
# usage: bash scripts/vim/pt-vim-s.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch vim-s-pretrain IMNET "$@" -- \
    --model vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --batch-size 64 --epochs 300 --lr 1e-3 --drop-path 0.05 --weight-decay 0.05 --num_workers 25 --no_amp
