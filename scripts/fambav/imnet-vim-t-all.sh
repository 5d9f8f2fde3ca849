#!/usr/bin/env bash
# Vim-Ti on ImageNet-1k, 300 epochs from scratch: 7 tokens merged after every layer.
# usage: bash scripts/fambav/imnet-vim-t-all.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav t IMNET all "$@"
