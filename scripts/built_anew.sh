# Sourced, after setup.sh, by scripts that test the C++ kernels as other flags make them: `build_anew FLAGS [LINK_FLAGS]`
# builds both packages with g++ in a scratch folder, which goes when the script ends, and puts them first on PYTHONPATH.

build_anew() {
    local package
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    # the second is built by the headers of the copied first, not of one that is installed
    for package in causal_conv1d mamba-1p1p1; do
        cp -r "$package" "$scratch/$package"
        find "$scratch/$package" -name '*.so' -delete
        (cd "$scratch/$package" &&
            PYTHONPATH=$scratch/causal_conv1d CXX=${CXX:-g++} CFLAGS=$1 CXXFLAGS=$1 LDFLAGS=${2:-} \
                "$PYTHON" setup.py --quiet build_ext --inplace)
        compgen -G "$scratch/$package/*/_cpu*" >/dev/null || {
            echo "$0: $package was not built; wanted g++, and what $1 needs." >&2
            exit 1
        }
    done
    export PYTHONPATH="$scratch/causal_conv1d:$scratch/mamba-1p1p1:$PWD"
}
