#!/usr/bin/env bash
# DyVM on Vim-Ti, tokens alone, ablation: tokens drawn at random instead of chosen.
# usage: bash scripts/dyvm/ablation-random.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-t-random}
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-t.sh" ${1+"$1" --pruning token --pruning-policy random} "${@:2}"
