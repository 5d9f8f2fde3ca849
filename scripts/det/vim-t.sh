#!/usr/bin/env bash
# Cascade Mask R-CNN on Vim-Ti, COCO, 184,375 steps from an ImageNet Vim-Ti, total batch 64 on 8 GPUs. Published: box AP 45.7.
# usage: bash scripts/det/vim-t.sh DATA_PATH --finetune FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch det-vim-t COCO "$@" -- \
    --task detect --model vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --iterations 184375 --eval-interval 7375 --decay-iters 163889 177546 --warmup-iters 250 --batch-size 8 --lr 1e-4 \
    --weight-decay 0.1 --layer-decay 0.837 --drop-path 0.1 --if_amp --num_workers 8 --dist-eval
