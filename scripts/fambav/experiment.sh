# What the experiments of Famba-V share; the scripts beside this one source it, then
#
#     fambav SIZE DATA_SET STRATEGY "$@"
#
# SIZE t or s; DATA_SET as main.py names it; STRATEGY none, all, alternate, lower, upper or readme. Settings as published
# for the 24 layers of Vim-Ti and Vim-S (arXiv:2409.09808); flags after the data path override them.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

fambav() {
    local size=$1 data_set=$2 strategy=$3 model merging
    shift 3
    case $size in
    t) model=(--model vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2
        --batch-size 128 --drop-path 0.0 --weight-decay 0.1) ;;
    s) model=(--model vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2
        --batch-size 64 --drop-path 0.05 --weight-decay 0.05) ;;
    esac
    case $strategy in
    none) merging=(--fusion-strategy no) ;;
    all) merging=(--fusion-strategy all --fusion-token 7) ;;
    alternate) merging=(--fusion-strategy alternate --fusion-token 14) ;;
    lower) merging=(--fusion-strategy lower --fusion-layer 5 --fusion-token 9) ;;
    upper) merging=(--fusion-strategy upper --fusion-layer 18 --fusion-token 9) ;;
    readme) merging=(--fusion-strategy upper --fusion-layer 4 --fusion-token 8) ;;
    esac
    launch "fambav-vim-$size-$data_set-$strategy" "$data_set" "$@" -- \
        "${model[@]}" "${merging[@]}" --num_workers 25 --no_amp
}
