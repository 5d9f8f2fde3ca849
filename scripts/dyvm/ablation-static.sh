#!/usr/bin/env bash
# DyVM on Vim-Ti, tokens alone, ablation: tokens spread evenly instead of chosen; nothing is learned about them.
# usage: bash scripts/dyvm/ablation-static.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-t-static}
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-t.sh" ${1+"$1" --pruning token --pruning-policy static} "${@:2}"
