#!/usr/bin/env bash
# DyVM on Vim-B, ablation: scan directions alone, 0.8 of them, lr 2e-5, tokens of the teacher left out, else as vim-b.sh.
# usage: bash scripts/dyvm/ablation-block-b.sh DATA_PATH --model-path FILE [FLAGS...]
set -euo pipefail
export OUTPUT_DIR=${OUTPUT_DIR:-./output/dyvm-vim-b-block}
weights=(--token-pruning-weight 16 --block-pruning-weight 4)
set -- ${1+"$1" --pruning block --pruning-teacher logits --block-keep-ratio 0.8 --lr 2e-5 "${weights[@]}"} "${@:2}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/vim-b.sh" "$@"
