#!/usr/bin/env bash
# Vim-Ti on CIFAR-100, 300 epochs from scratch: no merging.
# usage: bash scripts/fambav/cifar-vim-t-none.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav t CIFAR none "$@"
