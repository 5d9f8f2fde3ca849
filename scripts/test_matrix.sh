#!/usr/bin/env bash
# The lowest Python and torch that the packages name. In a copy of the checkout with an environment of its own: both packages
# are made into wheels and source archives, and installed elsewhere from each of them alone; then the suite (arguments, if
# any, go to pytest instead) and the read-me's quickstart and commands, an epoch each. Gigabytes and an hour on two cores;
# what it made is removed in the end.
# Environment: PYTHON (default python3.10), TORCH and TORCHVISION (default 2.6.0 and 0.21.0), FOLDER (default a new one; one
# that was kept is gone on with: nothing is installed again),
# STEPS (default "packages suite quickstart"), KEEP=1 to keep what was made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch=${TORCH:-2.6.0}
torchvision=${TORCHVISION:-0.21.0}
base=${PYTHON:-python3.10}
folder=${FOLDER:-$(mktemp -d)}
copy=$folder/checkout
[ "${KEEP:-}" = 1 ] || trap 'rm -rf "$folder"' EXIT

mkdir -p "$copy"
git ls-files -z | xargs -0 cp --parents -t "$copy"
cd "$copy"
# CUDA's bindings are of torch's own major version
sed -i -e "s/^torch==.*/torch==$torch/" -e "s/^torchvision==.*/torchvision==$torchvision/" \
    -e 's/^cuda-bindings[^;]*/cuda-bindings>=12,<13 /' vim_requirements.txt
PYTHON=$base bash scripts/setup.sh
python=$copy/.venv/bin/python
"$python" -c 'import sys, torch; print("Python %d.%d.%d, torch %s" % (*sys.version_info[:3], torch.__version__))'

# what a user calls who has the packages and nothing else; run from a folder of its own
check() {
    cat <<'PYTHON'
import sys
from importlib.metadata import version

import torch
import causal_conv1d
import mamba_ssm
from causal_conv1d import causal_conv1d_fn, causal_conv1d_ref
from causal_conv1d.kernels.registry import backends as convolution
from mamba_ssm.kernels.registry import backends as scan
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

elsewhere = sys.argv[1]
for package in (causal_conv1d, mamba_ssm):
    assert package.__file__.startswith(elsewhere), package.__file__
assert convolution.available("cpu") == scan.available("cpu") == "cpp"
torch.manual_seed(0)
x, weight = torch.randn(2, 8, 40), torch.randn(8, 4)
torch.testing.assert_close(causal_conv1d_fn(x, weight), causal_conv1d_ref(x, weight))
u, delta, A, B, C = x, torch.rand(2, 8, 40), -torch.rand(8, 4), torch.randn(2, 4, 40), torch.randn(2, 4, 40)
torch.testing.assert_close(selective_scan_fn(u, delta, A, B, C), selective_scan_ref(u, delta, A, B, C))
Mamba(16, bimamba_type="v2")(torch.randn(2, 10, 16)).sum().backward()
print("mamba_ssm", version("mamba_ssm"), "in", elsewhere, "on", scan.available("cpu"))
PYTHON
}

packages() {
    local kind package elsewhere where
    where=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for kind in wheel archive; do
        elsewhere=$folder/$kind
        mkdir -p "$folder/dist-$kind" "$elsewhere"
        "$base" -m venv "$elsewhere/venv"
        # torch and what builds are seen from here; the editable packages are not, since their entries are not followed
        echo "$where" >"$("$elsewhere/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
        for package in causal_conv1d mamba-1p1p1; do
            if [ "$kind" = wheel ]; then
                "$python" -m pip wheel --quiet --no-deps --no-build-isolation -w "$folder/dist-$kind" "./$package"
            else
                (cd "$package" && "$python" setup.py --quiet sdist -d "$folder/dist-$kind")
            fi
        done
        for package in causal_conv1d mamba_ssm; do
            (cd "$folder" && "$elsewhere/venv/bin/python" -m pip install --quiet --no-index --no-deps --no-build-isolation \
                --ignore-installed "$folder/dist-$kind/$package"-*)
        done
        (cd "$elsewhere" && check | "$elsewhere/venv/bin/python" - "$elsewhere")
    done
}

suite() {
    bash scripts/test.sh "$@"
}

quickstart() {
    EPOCHS=1 OUTPUT_DIR=$folder/quickstart bash scripts/quickstart.sh
    "$python" main.py --data-set DIGITS --num_workers 0 --epochs 1 --batch-size 32 --unscale-lr --lr 3e-3 --warmup-epochs 0 \
        --drop-path 0 --no-model-ema --mixup 0 --cutmix 0 --reprob 0 --aa none --color-jitter 0 --no-repeated-aug \
        --model vim_nano_patch4_32 --fusion-strategy upper --fusion-layer 2 --fusion-token 8 --output_dir "$folder/famba-v"
    "$python" main.py --data-set DIGITS --eval --model vim_nano_patch4_32 --resume "$folder/quickstart/none/checkpoint.pth"
    "$python" -m benchmarks.plot "$folder/quickstart/none" "$folder/famba-v" --file "$folder/curves.png"
}

steps=${STEPS:-packages suite quickstart}
unset STEPS # scripts of the suite take one of their own
for step in $steps; do
    printf '\n== %s\n' "$step"
    case $step in
    packages) packages ;;
    suite) suite "$@" ;;
    quickstart) quickstart ;;
    *) echo "STEPS names $step; wanted packages, suite or quickstart." >&2 && exit 2 ;;
    esac
done
