#!/usr/bin/env bash
# The accuracy of a trained model on the test part of plate BR00116991, and on every subset of its channels: a table by
# number of channels, each subset in OUTPUT_DIR/channel_subsets.csv.
# usage: bash scripts/cells/eval-subsets.sh DATA_PATH --resume CHECKPOINT [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

launch cells-eval JUMPCP "$@" -- --task cells \
    --eval --channel-subsets --model fastchannelvim_small_patch16_224 --plates BR00116991 --perturbation compound \
    --batch-size 32 --num_workers 10 --no_amp
