#!/usr/bin/env bash
# DyVM on Vim-Ti, ablation: scan directions alone, 0.8 of them, tokens of the teacher left out, else as vim-t.sh.
# usage: bash scripts/dyvm/ablation-block-t.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-t-block}
set -- ${1+"$1" --pruning block --pruning-teacher logits --block-keep-ratio 0.8} "${@:2}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-t.sh" "$@"
