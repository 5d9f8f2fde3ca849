#!/usr/bin/env bash
# Vim-Ti, ImageNet-1k, 300 epochs from scratch: total batch 1024 on 8 GPUs (arXiv:2401.09417, section 4.1).
# usage: bash scripts/vim/pt-vim-t.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch vim-t-pretrain IMNET "$@" -- \
    --model vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --batch-size 128 --epochs 300 --drop-path 0.0 --weight-decay 0.1 --num_workers 25 --no_amp
