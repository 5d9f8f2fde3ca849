#!/usr/bin/env bash
# Vim-S on CIFAR-100, 300 epochs from scratch: no merging.
# usage: bash scripts/fambav/cifar-vim-s-none.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav s CIFAR none "$@"
