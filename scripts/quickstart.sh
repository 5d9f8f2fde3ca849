#!/usr/bin/env bash
# Install what is missing, train small Vision Mambas on real handwritten digits, evaluate them, and compare.
# Environment: OUTPUT_DIR (default output/quickstart), EPOCHS (default 12), METHODS (default "none upper fastvim dyvm
# cells").
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

output=${OUTPUT_DIR:-output/quickstart}
epochs=${EPOCHS:-12}
data=(--data-set DIGITS --num_workers 0)
# 1,437 training images are few: a short schedule wants plain augmentation, and a high learning rate that falls at every step
schedule=(--epochs "$epochs" --batch-size 32 --unscale-lr --lr 4e-3 --warmup-epochs 1 --sched-on-updates --drop-path 0)
recipe=("${schedule[@]}" --no-model-ema --mixup 0 --cutmix 0 --reprob 0 --aa none --color-jitter 0 --no-repeated-aug)

# Says how long a stage takes: $1 hundredths of the time of the Vim's training, which is measured on this machine once it
# is over; before that, of what was measured elsewhere on two cores that did nothing else (benchmarks/RESULTS.md).
announce() {
    local vim seconds
    vim=$(grep -o '"seconds": [0-9.]*' "$output/none/log.txt" 2>/dev/null |
        awk -v epochs="$epochs" '{sum += $2} END {if (NR) printf "%.0f", sum / NR * epochs}' || true)
    if [ -n "$vim" ]; then
        seconds="about $((vim * $1 / 100 + 10)) s here"
    else
        seconds="$((epochs * 3 * $1 / 100 + 10)) s on two free cores with AVX-512, three times that with AVX2"
    fi
    printf '\n== %s: %s\n   (%s; stopped, it goes on from where it was)\n' "$2" "$3" "$seconds"
}

train() {
    local cost=$1 name=$2
    shift 2
    announce "$cost" "$name" "main.py $*"
    # a finished run, or one that was interrupted, goes on from where it is
    "$PYTHON" main.py "${data[@]}" "${recipe[@]}" --output_dir "$output/$name" --resume auto "$@"
}

train_cells() {
    local cost=$1 name=$2
    shift 2
    announce "$cost" "$name" "main.py --task cells $*"
    "$PYTHON" main.py --task cells --data-set CELLS_DIGITS --num_workers 0 "${schedule[@]}" \
        --lr 2e-3 --weight-decay 0.05 --output_dir "$output/$name" --resume auto "$@"
}

methods=${METHODS:-none upper fastvim dyvm cells}
for method in $methods; do
    case $method in
    none) train 100 none --model vim_nano_patch4_32 --fusion-strategy no ;;
    upper) train 85 upper --model vim_nano_patch4_32 --fusion-strategy upper --fusion-layer 2 --fusion-token 8 ;;
    fastvim) train 65 fastvim --model fastvim_nano_patch4_32 ;;
    dyvm) train 190 dyvm --model dyvm_nano_patch4_32 --model-path "$output/none/checkpoint.pth" --token-keep-ratio 0.7 \
        --token-pruning-weight 10 --block-pruning-weight 10 --warmup-lr 1e-6 \
        --block-keep-ratio 0.8 --gate-noise-end 0 ;;
    cells) train_cells 155 cells --model fastchannelvim_nano_patch4_32 ;;
    *) echo "METHODS names $method; wanted none, upper, fastvim, dyvm or cells." >&2 && exit 2 ;;
    esac
done

if [[ " $methods " == *" none "* ]]; then
    announce 0 'The saved Vim, evaluated' 'main.py --eval'
    "$PYTHON" main.py "${data[@]}" --eval --model vim_nano_patch4_32 --resume "$output/none/checkpoint.pth"
fi

printf '\n'
"$PYTHON" -m benchmarks.summary "$output"/*/
cat <<TEXT

What to try next:
  merge tokens in that Vim without training it again:
    .venv/bin/python main.py --data-set DIGITS --eval --resume $output/none/checkpoint.pth \\
        --fusion-strategy upper --fusion-layer 2 --fusion-token 4 --fusion-order raster
  see the curves:           .venv/bin/tensorboard --logdir $output
  train on your own images: .venv/bin/python main.py --model vim_tiny_patch16_224 --data-set IMNET --data-path FOLDER
  the published runs:       ls scripts/vim scripts/fambav scripts/fastvim scripts/dyvm scripts/cells
TEXT
