# What the experiments of Famba-V share; the scripts beside this one source it, then
#
#     fambav SIZE DATA_SET STRATEGY "$@"
#
# SIZE t or s; DATA_SET as main.py names it; STRATEGY none, all, alternate, lower, upper or readme, or "lower R K" and
# "upper R K" for other r and K. Settings as published for the 24 layers of Vim-Ti and Vim-S (arXiv:2409.09808), which
# train alike; flags after the data path override them.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

fambav() {
    local size=$1 data_set=$2 strategy=$3 model merging
    shift 3
    case $size in
    t) model=vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 ;;
    s) model=vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 ;;
    *) echo "$0: the size is '$size'; wanted t or s." >&2 && exit 2 ;;
    esac
    case $strategy in
    none) merging=(--fusion-strategy no) ;;
    all) merging=(--fusion-strategy all --fusion-token 7) ;;
    alternate) merging=(--fusion-strategy alternate --fusion-token 14) ;;
    lower) merging=(--fusion-strategy lower --fusion-layer 5 --fusion-token 9) ;;
    upper) merging=(--fusion-strategy upper --fusion-layer 18 --fusion-token 9) ;;
    readme) merging=(--fusion-strategy upper --fusion-layer 4 --fusion-token 8) ;;
    *" "*" "*)
        local kind r k
        read -r kind r k <<<"$strategy"
        merging=(--fusion-strategy "$kind" --fusion-layer "$k" --fusion-token "$r")
        ;;
    *) echo "$0: the strategy is '$strategy'; wanted none, all, alternate, lower or upper." >&2 && exit 2 ;;
    esac
    launch "fambav-vim-$size-$data_set-${strategy// /-}" "$data_set" "$@" -- \
        --model "$model" --batch-size 128 --drop-path 0.0 --weight-decay 0.1 "${merging[@]}" --num_workers 25 --no_amp
}
