#!/usr/bin/env bash
# MambaReg-B, stage 3 of 3: 20 epochs from stage 2, warm-up, then a constant rate, total batch 512 on 8 GPUs (arXiv:2405.14858).
# usage: bash scripts/mambareg/stage3-b.sh DATA_PATH --finetune FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch mambareg-b-stage3 IMNET "$@" -- \
    --model mambareg_base_patch16_224 --input-size 224 --batch-size 64 --epochs 20 \
    --unscale-lr --lr 1e-5 --weight-decay 0.1 --drop-path 0.4 --no-repeated-aug --reprob 0 --smoothing 0.1 \
    --eval-crop-ratio 1.0 --if_amp --amp-dtype bfloat16 --num_workers 25
