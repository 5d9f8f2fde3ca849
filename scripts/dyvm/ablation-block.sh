#!/usr/bin/env bash
# DyVM-S, ablation: block pruning alone.
# usage: bash scripts/dyvm/ablation-block.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-s-block}
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-s.sh" ${1+"$1" --pruning block} "${@:2}"
