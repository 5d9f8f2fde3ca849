#!/usr/bin/env bash
# Train and evaluate Vim, Famba-V, FastVim, DyVM, MambaReg and a DeiT of the same size, three seeds each; then one table
# (Markdown, CSV) and one plot of accuracy against speed and training time. Safe to interrupt: the same command goes on.
# usage: bash scripts/compare.sh                          handwritten digits, half an hour on Zen 4, twice that on Zen 3
#        bash scripts/compare.sh --task segment           SHAPES under a segmentation head, an hour on a CPU
#        bash scripts/compare.sh --seeds 0 1 2 3 4        five seeds, where three leave it open which is better
#        bash scripts/compare.sh DATA_PATH [FLAGS...]     ImageNet or another --data-set, on all GPUs, days
# What pre-training buys with few labels is another table: FAMILY=vim bash scripts/mae/digits.sh.
# Environment: OUTPUT_DIR (default output/compare), GPUS (default all).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
exec "$PYTHON" -m benchmarks.compare --output_dir "${OUTPUT_DIR:-output/compare}" "$@"
