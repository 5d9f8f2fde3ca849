#!/usr/bin/env bash
# Vim-B as a masked autoencoder, ImageNet-1k, 1600 epochs at ratio 0.75, total batch 4096 on 8 GPUs.
# Published: last loss 0.414.
# usage: bash scripts/mae/pretrain-vim-b.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch mae-pretrain-vim-b IMNET "$@" -- \
    --task pretrain --model mae_vim_base_patch16_224 \
    --batch-size 128 --accum-iter 4 --epochs 1600 --num_workers 10 \
    --mask-ratio 0.75 --norm-pix-loss --scale 0.2 1 --train-interpolation bicubic \
    --blr 1.5e-4 --min-lr 0 --warmup-lr 0 --warmup-epochs 40 --sched-on-updates --weight-decay 0.05 --opt-betas 0.9 0.95 \
    --no_amp
