#!/usr/bin/env bash
# DyVM on Vim-Ti, ablation: tokens alone, 0.9 of them, else as vim-t.sh.
# usage: bash scripts/dyvm/ablation-token-t.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-t-token}
set -- ${1+"$1" --pruning token --token-keep-ratio 0.9} "${@:2}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-t.sh" "$@"
