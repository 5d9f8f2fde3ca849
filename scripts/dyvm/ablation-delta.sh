#!/usr/bin/env bash
# DyVM on Vim-Ti, tokens alone, ablation: the predictor looks at the step sizes of the mixer before it.
# usage: bash scripts/dyvm/ablation-delta.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-t-delta}
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-t.sh" ${1+"$1" --pruning token --predictor-input delta} "${@:2}"
