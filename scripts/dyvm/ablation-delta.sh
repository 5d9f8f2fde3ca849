#!/usr/bin/env bash
# DyVM-S, ablation: the predictor looks at the step sizes of the mixer before it.
# usage: bash scripts/dyvm/ablation-delta.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-s-delta}
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-s.sh" ${1+"$1" --predictor-input delta} "${@:2}"
