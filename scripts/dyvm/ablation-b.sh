#!/usr/bin/env bash
# DyVM-S, ablation: the predictor looks at B of the mixer before it.
# usage: bash scripts/dyvm/ablation-b.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-s-b}
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-s.sh" ${1+"$1" --predictor-input B} "${@:2}"
