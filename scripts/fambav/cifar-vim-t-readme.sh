#!/usr/bin/env bash
# Vim-Ti on CIFAR-100, 300 epochs from scratch: the read-me's command, 8 tokens merged after each of the layers 5 to 23.
# usage: bash scripts/fambav/cifar-vim-t-readme.sh DATA_PATH [FLAGS...]
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav t CIFAR readme "$@"
