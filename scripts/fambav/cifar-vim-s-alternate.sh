#!/usr/bin/env bash
# Vim-S on CIFAR-100, 300 epochs from scratch: 14 tokens merged after every other layer.
# usage: bash scripts/fambav/cifar-vim-s-alternate.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav s CIFAR alternate "$@"
