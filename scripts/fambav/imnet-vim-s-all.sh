#!/usr/bin/env bash
# Vim-S on ImageNet-1k, 300 epochs from scratch: 7 tokens merged after every layer.
# usage: bash scripts/fambav/imnet-vim-s-all.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav s IMNET all "$@"
