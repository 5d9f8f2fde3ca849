#!/usr/bin/env bash
# Vim-S on ImageNet-1k, 300 epochs from scratch: 14 tokens merged after every other layer.
# usage: bash scripts/fambav/imnet-vim-s-alternate.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav s IMNET alternate "$@"
