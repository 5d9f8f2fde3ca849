#!/usr/bin/env bash
# Linear probe of Vim-L's masked autoencoder, ImageNet-1k, 90 epochs, total batch 4096 on 8 GPUs. No published figure.
# The release ships LARS and runs SGD (timm's --opt lars wants always_adapt).
# Environment: PRETRAINED, the autoencoder's checkpoint (default: that of pretrain-vim-l.sh).
# usage: bash scripts/mae/linear-vim-l.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch mae-linear-vim-l IMNET "$@" -- \
    --linear-probe --model vim_large_patch16_224_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --finetune "${PRETRAINED:-output/mae-pretrain-vim-l/checkpoint.pth}" \
    --batch-size 512 --epochs 90 --num_workers 10 \
    --opt momentum --momentum 0.9 --weight-decay 0 --blr 0.1 --min-lr 0 --warmup-lr 0 --warmup-epochs 10 --sched-on-updates \
    --scale 0.08 1 --aa none --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --smoothing 0 --no-repeated-aug \
    --drop-path 0 --no-model-ema --no_amp
