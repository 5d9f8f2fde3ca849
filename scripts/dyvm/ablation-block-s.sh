#!/usr/bin/env bash
# DyVM on Vim-S, ablation: scan directions alone, 0.7 of them, tokens of the teacher left out, else as vim-s.sh.
# usage: bash scripts/dyvm/ablation-block-s.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-s-block}
set -- ${1+"$1" --pruning block --pruning-teacher logits --block-keep-ratio 0.7} "${@:2}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-s.sh" "$@"
