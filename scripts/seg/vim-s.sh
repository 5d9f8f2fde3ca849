#!/usr/bin/env bash
# UPerNet on Vim-S, ADE20K, 60k steps from an ImageNet Vim-S, total batch 32 on 8 GPUs. Published: mIoU 44.9.
# usage: bash scripts/seg/vim-s.sh DATA_PATH --finetune FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch seg-vim-s ADE20K "$@" -- \
    --task segment --model vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --iterations 60000 --eval-interval 6000 --warmup-iters 1500 --batch-size 4 --lr 1e-4 --weight-decay 0.05 \
    --layer-decay 0.95 --drop-path 0.1 --dense-feature stream --num_workers 8 --dist-eval
