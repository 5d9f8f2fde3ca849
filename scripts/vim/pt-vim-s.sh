#!/usr/bin/env bash
# Vim-S, ImageNet-1k, 300 epochs from scratch: total batch 1024 on 16 GPUs (arXiv:2401.09417, section 4.1).
# usage: bash scripts/vim/pt-vim-s.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch vim-s-pretrain IMNET "$@" -- \
    --model vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --batch-size 64 --epochs 300 --drop-path 0.05 --weight-decay 0.05 --num_workers 25 --no_amp
