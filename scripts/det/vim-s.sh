#!/usr/bin/env bash
# Cascade Mask R-CNN on Vim-S with FastVim's heads and recipe, COCO, total batch 16 on 8 GPUs. Published by FastVim: box AP 47.1.
# usage: bash scripts/det/vim-s.sh DATA_PATH --finetune FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch det-vim-s COCO "$@" -- \
    --task detect --model vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --iterations 184375 --eval-interval 7375 --decay-iters 163889 177546 --warmup-iters 250 --batch-size 2 --lr 1e-4 \
    --det-heads fastvim --weight-decay 0.05 --clip-grad 35 --drop-path 0.1 --num_workers 8 --dist-eval
