#!/usr/bin/env bash
# Vim-Ti on ImageNet-1k, 300 epochs from scratch: 9 tokens merged after each of the layers 19 to 23.
# usage: bash scripts/fambav/imnet-vim-t-upper.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav t IMNET upper "$@"
