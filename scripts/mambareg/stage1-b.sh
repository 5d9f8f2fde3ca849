#!/usr/bin/env bash
# MambaReg-B, stage 1 of 3: 300 epochs from scratch at 128 px, total batch 1024 on 8 GPUs (arXiv:2405.14858).
# usage: bash scripts/mambareg/stage1-b.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch mambareg-b-stage1 IMNET "$@" -- \
    --model mambareg_base_patch16_224 --input-size 128 --batch-size 128 --epochs 300 \
    --lr 5e-4 --weight-decay 0.05 --drop-path 0.1 \
    --ThreeAugment --reprob 0 --smoothing 0 --if_amp --amp-dtype bfloat16 --num_workers 25
