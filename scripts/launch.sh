#!/usr/bin/env bash
# The one launcher behind every experiment script. Source it, then
#
#     launch NAME DATA_SET "$@" -- FLAGS...
#
# The script's first argument is the data path (DIGITS needs none: give "-"), the rest are flags that override FLAGS.
# Environment: GPUS processes on this machine (default: one per CUDA device, else 1); NNODES, NODE_RANK, MASTER_ADDR and
# MASTER_PORT for several machines; OUTPUT_DIR (default ./output/NAME); PYTHON (default .venv's, else python3).
set -euo pipefail

launch() {
    local root name=$1 data_set=$2 data_path=${3:-} extra=() output python
    if [ $# -lt 3 ] || [ "$data_path" = -- ]; then
        echo "usage: bash $0 DATA_PATH [FLAGS...]; wanted the path of the $data_set data first." >&2
        exit 2
    fi
    shift 3
    while [ "$1" != -- ]; do
        extra+=("$1")
        shift
    done
    shift

    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    python=${PYTHON:-python3}
    if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then
        python=$root/.venv/bin/python
    fi
    output=${OUTPUT_DIR:-./output/$name}
    local gpus=${GPUS:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    local command=("$python")
    if [ "${NNODES:-1}" -gt 1 ]; then
        # torch 2.14 keeps one store across restarts, where ranks that start again find dead addresses
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        command+=(-m torch.distributed.run --nnodes "$NNODES" --node-rank "${NODE_RANK:?}" --nproc-per-node "$gpus"
            --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:-29500}")
    elif [ "$gpus" -gt 1 ]; then
        command+=(-m torch.distributed.run --standalone --nproc-per-node "$gpus")
    fi
    command+=("$root/main.py" --data-set "$data_set" --output_dir "$output")
    if [ "$data_path" != - ]; then
        command+=(--data-path "$data_path")
    fi
    # argparse keeps the last of a repeated flag, so the caller's come last
    command+=("$@" ${extra[@]+"${extra[@]}"})
    exec "${command[@]}"
}
