#!/usr/bin/env bash
# FastVim-B from its masked autoencoder, ImageNet-1k, 100 epochs, total batch 1024 on 8 GPUs. Published: 83.0 % top-1.
# Environment: PRETRAINED, the autoencoder's checkpoint (default: that of pretrain-fastvim-b.sh).
# usage: bash scripts/mae/finetune-fastvim-b.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch mae-finetune-fastvim-b IMNET "$@" -- \
    --model fastvim_base_patch16_224 --pool-scale 0.25 \
    --finetune "${PRETRAINED:-output/mae-pretrain-fastvim-b/checkpoint.pth}" \
    --batch-size 128 --epochs 100 --num_workers 10 \
    --blr 5e-4 --min-lr 1e-5 --warmup-lr 0 --warmup-epochs 5 --sched-on-updates --layer-decay 0.65 \
    --weight-decay 0.05 --opt-betas 0.9 0.999 --drop-path 0.3 --no-model-ema --no_amp \
    --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --no-repeated-aug
