#!/usr/bin/env bash
# Install what is missing, make SHAPES, train a small segmenter on it, evaluate it, and draw what it sees.
# Environment: OUTPUT_DIR (default output/seg-quickstart), ITERATIONS (default 900), MODEL (default
# fastvim_nano_patch4_32).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup.sh

output=${OUTPUT_DIR:-output/seg-quickstart}
iterations=${ITERATIONS:-900}
run=(--task segment --data-set SHAPES --model "${MODEL:-fastvim_nano_patch4_32}" --input-size 48 --seg-channels 64
    --num_workers 0)
# few steps want small batches, a high learning rate, and images of about the size that is tested
recipe=(--batch-size 4 --lr 4e-3 --scale-range 0.8 1.25 --drop 0 --drop-path 0)

# a finished run, or one that was interrupted, goes on from where it is
"$PYTHON" main.py "${run[@]}" "${recipe[@]}" --iterations "$iterations" --eval-interval "$((iterations / 2))" \
    --output_dir "$output" --resume auto
printf '\n== The saved segmenter, evaluated with --eval\n'
"$PYTHON" main.py "${run[@]}" --eval --resume "$output/best_checkpoint.pth" --output_dir "$output" \
    --visualize "$output/pictures"
cat <<TEXT

What to look at next:
  image, truth, prediction: $output/pictures/image_2.png
  predictions as PNGs:      $output/predictions
  the curves:               .venv/bin/tensorboard --logdir $output
  the published runs:       ls scripts/seg
TEXT
