#!/usr/bin/env bash
# DyVM on Vim-S, ablation: tokens alone, 0.8 of them, else as vim-s.sh.
# usage: bash scripts/dyvm/ablation-token-s.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-s-token}
set -- ${1+"$1" --pruning token --token-keep-ratio 0.8} "${@:2}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-s.sh" "$@"
