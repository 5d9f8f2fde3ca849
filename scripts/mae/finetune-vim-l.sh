#!/usr/bin/env bash
# Vim-L from its masked autoencoder, ImageNet-1k, 50 epochs, total batch 1024 on 8 GPUs. Published: 85.1 % top-1.
# Environment: PRETRAINED, the autoencoder's checkpoint (default: that of pretrain-vim-l.sh).
# usage: bash scripts/mae/finetune-vim-l.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch mae-finetune-vim-l IMNET "$@" -- \
    --model vim_large_patch16_224_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --finetune "${PRETRAINED:-output/mae-pretrain-vim-l/checkpoint.pth}" \
    --batch-size 64 --accum-iter 2 --epochs 50 --num_workers 10 \
    --blr 1e-3 --min-lr 1e-5 --warmup-lr 0 --warmup-epochs 5 --sched-on-updates --layer-decay 0.75 \
    --weight-decay 0.05 --opt-betas 0.9 0.999 --drop-path 0.3 --no-model-ema --no_amp \
    --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --no-repeated-aug
