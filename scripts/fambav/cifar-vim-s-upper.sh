#!/usr/bin/env bash
# Vim-S on CIFAR-100, 300 epochs from scratch: 9 tokens merged after each of the layers 19 to 23.
# usage: bash scripts/fambav/cifar-vim-s-upper.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav s CIFAR upper "$@"
