#!/usr/bin/env bash
# Vim-Ti on ImageNet-1k, 300 epochs from scratch: no merging.
# usage: bash scripts/fambav/imnet-vim-t-none.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav t IMNET none "$@"
