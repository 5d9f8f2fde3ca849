#!/usr/bin/env bash
# Vim-S at stride 8, 30 epochs from a trained Vim-S (add --finetune FILE): constant lr 1e-5, weight decay 1e-8 (section 4.1).
# usage: bash scripts/vim/ft-vim-s.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch vim-s-finetune IMNET "$@" -- \
    --model vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --batch-size 128 --epochs 30 --unscale-lr --lr 1e-5 --min-lr 1e-5 --warmup-lr 1e-5 --warmup-epochs 0 \
    --drop-path 0.0 --weight-decay 1e-8 --num_workers 25 --no_amp
