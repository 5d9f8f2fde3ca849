#!/usr/bin/env bash
# Vim on CIFAR-100, 300 epochs from scratch, R tokens merged after each of the sites below or above K: one point of the
# published sweeps over r and K, which docs/experiments.md lists.
# usage: STRATEGY=lower R=8 K=4 SIZE=t bash scripts/fambav/cifar-sweep.sh DATA_PATH [FLAGS...]
# Environment: STRATEGY lower or upper, R, K, SIZE t or s (defaults: as above), and the launcher's.
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

fambav "${SIZE:-t}" CIFAR "${STRATEGY:-lower} ${R:-8} ${K:-4}" "$@"
