#!/usr/bin/env bash
# DyVM-S, ablation: token pruning alone.
# usage: bash scripts/dyvm/ablation-token.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-s-token}
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-s.sh" ${1+"$1" --pruning token} "${@:2}"
