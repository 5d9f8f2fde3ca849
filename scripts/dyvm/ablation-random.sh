#!/usr/bin/env bash
# DyVM-S, ablation: tokens and directions drawn at random instead of chosen.
# usage: bash scripts/dyvm/ablation-random.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-s-random}
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-s.sh" ${1+"$1" --pruning-policy random} "${@:2}"
