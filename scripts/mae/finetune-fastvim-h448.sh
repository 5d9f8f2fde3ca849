#!/usr/bin/env bash
# FastVim-H at 448 px from its masked autoencoder, ImageNet-1k, 50 epochs, total batch 1024 on 8 GPUs. Published: 86.7 % top-1.
# Environment: PRETRAINED, the autoencoder's checkpoint (default: that of pretrain-fastvim-h.sh).
# usage: bash scripts/mae/finetune-fastvim-h448.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch mae-finetune-fastvim-h448 IMNET "$@" -- \
    --model fastvim_huge_patch14_224 --pool-scale 0.25 --input-size 448 --clip-grad 3 --eval-crop-ratio 1 \
    --finetune "${PRETRAINED:-output/mae-pretrain-fastvim-h/checkpoint.pth}" \
    --batch-size 16 --accum-iter 8 --epochs 50 --num_workers 10 \
    --blr 1e-3 --min-lr 1e-5 --warmup-lr 0 --warmup-epochs 5 --sched-on-updates --layer-decay 0.75 \
    --weight-decay 0.05 --opt-betas 0.9 0.999 --drop-path 0.3 --no-model-ema --no_amp \
    --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --no-repeated-aug
