#!/usr/bin/env bash
# DyVM-S, ablation: tokens and directions spread evenly instead of chosen; nothing is learned about them.
# usage: bash scripts/dyvm/ablation-static.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-s-static}
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-s.sh" ${1+"$1" --pruning-policy static} "${@:2}"
