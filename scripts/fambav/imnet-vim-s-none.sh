#!/usr/bin/env bash
# Vim-S on ImageNet-1k, 300 epochs from scratch: no merging.
# usage: bash scripts/fambav/imnet-vim-s-none.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav s IMNET none "$@"
