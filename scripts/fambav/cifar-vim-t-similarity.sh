#!/usr/bin/env bash
# Vim-Ti on CIFAR-100 without merging: pictures of how alike its tokens are after every layer, and accuracy.
# usage: bash scripts/fambav/cifar-vim-t-similarity.sh DATA_PATH --model-path FILE [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

pictures=${OUTPUT_DIR:-./output/fambav-vim-t-CIFAR-none}/pictures
fambav t CIFAR none ${1+"$1" --eval --visualize "$pictures"} "${@:2}"
