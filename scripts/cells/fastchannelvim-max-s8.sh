#!/usr/bin/env bash
# FastChannelVim-S/8, pooling by maximum: JUMP-CP, plate BR00116991 (compounds, 161 classes).
# 100 epochs from scratch, total batch 256 on 8 GPUs. Published: 85.0 % top-1.
# usage: bash scripts/cells/fastchannelvim-max-s8.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

# 2e-3 for 512 images, scaled to 1e-3 for 256; weight decay rises from 0.04 to 0.4 along a cosine
launch cells-fastchannelvim-max-s8 JUMPCP "$@" -- --task cells \
    --model fastchannelvim_small_patch8_224_maxpool --channel-sampling hcs \
    --plates BR00116991 --perturbation compound \
    --batch-size 32 --epochs 100 --num_workers 10 --lr 2e-3 --warmup-epochs 10 --warmup-lr 0 --min-lr 1e-6 \
    --weight-decay 0.04 --weight-decay-end 0.4 --drop-path 0.05 --no-model-ema --no_amp
