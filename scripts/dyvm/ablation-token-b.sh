#!/usr/bin/env bash
# DyVM on Vim-B, ablation: tokens alone, 0.9 of them, lr 2e-5, else as vim-b.sh.
# usage: bash scripts/dyvm/ablation-token-b.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-b-token}
set -- ${1+"$1" --pruning token --token-keep-ratio 0.9 --lr 2e-5 --token-pruning-weight 16 --block-pruning-weight 4} "${@:2}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-b.sh" "$@"
