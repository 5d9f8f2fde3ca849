#!/usr/bin/env bash
# MambaReg-S, stage 2 of 3: 100 epochs at 224 px from stage 1, total batch 1024 on 8 GPUs,
# as published for B (arXiv:2405.14858).
# usage: bash scripts/mambareg/stage2-s.sh DATA_PATH --finetune FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch mambareg-s-stage2 IMNET "$@" -- \
    --model mambareg_small_patch16_224 --input-size 224 --batch-size 128 --epochs 100 \
    --lr 2e-4 --weight-decay 0.05 --drop-path 0.4 \
    --ThreeAugment --reprob 0 --smoothing 0 --if_amp --amp-dtype bfloat16 --num_workers 25
