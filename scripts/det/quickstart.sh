#!/usr/bin/env bash
# Install what is missing, make SHAPES, train a small detector on it, evaluate it, and draw what it finds.
# Environment: OUTPUT_DIR (default output/det-quickstart), ITERATIONS (default 350), MODEL (default
# fastvim_nano_patch4_32).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup.sh

output=${OUTPUT_DIR:-output/det-quickstart}
run=(--task detect --data-set SHAPES --model "${MODEL:-fastvim_nano_patch4_32}" --num_workers 0)
# many small steps teach a small model sooner than few large ones
recipe=(--batch-size 4)

# a finished run, or one that was interrupted, goes on from where it is
"$PYTHON" main.py "${run[@]}" "${recipe[@]}" --iterations "${ITERATIONS:-350}" --eval-interval "$((${ITERATIONS:-350} / 2))" \
    --output_dir "$output" --resume auto
printf '\n== The saved detector, evaluated with --eval\n'
"$PYTHON" main.py "${run[@]}" --eval --resume "$output/best_checkpoint.pth" --output_dir "$output" \
    --visualize "$output/pictures"
cat <<TEXT

What to look at next:
  image, truth, found:      $output/pictures/image_0.png
  detections, COCO's form:  $output/predictions.json
  the curves:               .venv/bin/tensorboard --logdir $output
  the published runs:       ls scripts/det
TEXT
