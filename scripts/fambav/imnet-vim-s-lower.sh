#!/usr/bin/env bash
# Vim-S on ImageNet-1k, 300 epochs from scratch: 9 tokens merged after each of the layers 0 to 4.
# usage: bash scripts/fambav/imnet-vim-s-lower.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav s IMNET lower "$@"
