#!/usr/bin/env bash
# Pretraining objectives at equal cost: one model, one text, the same FLOPs for each, several seeds; curves and a table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash examples/compare_objectives.sh [--text PATH] [--output FOLDER] [--flops F] [--seeds "N ..."]
                                           [--variants "NAME ..."] [--plan]

  --text      text to train on: JSON lines or plain text, a file, a folder or a quoted pattern
              (default: the documentation of the Python language that CPython carries)
  --output    folder of everything that is written (default: runs/compare)
  --flops     FLOPs of the pretraining of each run (default: 5e12, two to three minutes of a CPU core)
  --seeds     one run of each variant per seed (default: "1 2 3")
  --variants  some of: t5 spactor metro metro-spans metro-decoder-rtd (default: all)
  --plan      print the steps of each variant and stop

Each variant is pretrained, and its encoder-decoder then trained on as a prefix language model, which none of them was,
for a tenth of the FLOPs; "none" is the same from random weights. A second call goes on where the first one ended: what
is finished is skipped. So seeds and variants may be added later, or run one by one.
TEXT
}

text="" output=runs/compare flops=5e12 seeds="1 2 3" variants="t5 spactor metro metro-spans metro-decoder-rtd" plan=no
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage && exit 0 ;;
        --plan) plan=yes && shift && continue ;;
        --text | --output | --flops | --seeds | --variants)
            [ $# -gt 1 ] && [ -n "$2" ] || { echo "$1 needs a value: see --help" >&2 && exit 64; } ;;&
        --text) text="$2" && shift 2 ;;
        --output) output="$2" && shift 2 ;;
        --flops) flops="$2" && shift 2 ;;
        --seeds) seeds="$2" && shift 2 ;;
        --variants) variants="$2" && shift 2 ;;
        *) echo "unknown argument $1: see --help" >&2 && exit 64 ;;
    esac
done
[[ "$flops" =~ ^[0-9]+(\.[0-9]+)?(e[0-9]+)?$ ]] || { echo "--flops $flops is not a number like 5e12" >&2 && exit 64; }
for seed in $seeds; do
    [[ "$seed" =~ ^[0-9]+$ ]] || { echo "--seeds $seed is not a whole number" >&2 && exit 64; }
done

flags_of() { # VARIANT: what tells it from METRO, into the array `flags`
    case "$1" in
        t5) flags=(--objective t5-span) ;;
        spactor) flags=(--objective spactor) ;;
        metro) flags=() ;;
        metro-spans) flags=(--mask-spans) ;;
        metro-decoder-rtd) flags=(--rtd-position decoder) ;;
        transfer) flags=(--objective prefix-lm) ;;
        *) echo "--variants $1 is none of: t5 spactor metro metro-spans metro-decoder-rtd" >&2 && exit 64 ;;
    esac
}
for variant in $variants; do flags_of "$variant"; done

source examples/environment.sh
prepare_environment logging

start=$SECONDS
step() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - start)); }

mkdir -p "$output"
settings="text: ${text:-documentation of Python}, FLOPs: $flops"
[ -e "$output/settings.txt" ] || echo "$settings" >"$output/settings.txt"
[ "$(cat "$output/settings.txt")" = "$settings" ] || {
    echo "--output $output holds runs of other settings ($(cat "$output/settings.txt")); give another folder" >&2
    exit 64
}

# A width of 64 leaves the unigram plateau within such a budget only with a small vocabulary.
if [ ! -e "$output/tokenizer.model" ]; then
    step "tokenizer"
    if [ -z "$text" ]; then
        python examples/quickstart_corpus.py --output-folder "$output/text"
        text="$output/text"
    fi
    python tools/train_tokenizer.py --input "$text" --vocab-size 512 --allow-smaller-vocab --max-sentences 100000 \
        --output-prefix "$output/tokenizer"
fi
text="${text:-$output/text}"

# All variants: METRO's architecture and optimizer, the recipe of the quickstart, no clipping (it could hide what
# diverges). What differs are objective, generator and heads.
num_sentinels=128
model=(--preset metro-tiny --vocab-size $(($(wc -l <"$output/tokenizer.vocab") + num_sentinels))
    --vocab-extra-ids "$num_sentinels" --micro-batch-size 16 --global-batch-size 16)

share() { awk -v flops="$flops" -v part="$1" 'BEGIN { printf "%.0f", flops / part }'; }

plan_of() { # VARIANT FLOPS: `flags` and `steps` of a run of that cost; SPACTOR's generator takes part in half of it
    flags_of "$1"
    if [ "$1" = spactor ]; then
        local one_stage=("${model[@]}" "${flags[@]}" --spactor-tau none)
        flags+=(--spactor-tau "$(python tools/plan.py --flops "$(($2 / 2))" "${one_stage[@]}")")
    fi
    steps="$(python tools/plan.py --flops "$2" "${model[@]}" "${flags[@]}")"
}

step "steps that cost as much"
for variant in $variants transfer; do
    [ "$variant" = transfer ] && part=10 || part=1
    plan_of "$variant" "$(share $part)"
    echo "$variant: $steps steps${flags[*]:+ (${flags[*]})}"
done
[ "$plan" = no ] || exit 0

if [ ! -e "$output/text_document.done" ]; then
    step "data: Megatron's .bin and .idx"
    python tools/preprocess_data.py --input "$text" --output-prefix "$output/all" \
        --tokenizer-model "$output/tokenizer.model" --workers 2
    touch "$output/text_document.done"
fi

pretrain() { # FOLDER STEPS SEED FLAGS...: a run, unless it is finished; goes on from its last checkpoint
    local folder="$1" steps="$2" seed="$3"
    shift 3
    if [ "$(cat "$folder/latest_checkpointed_iteration.txt" 2>/dev/null)" = "$steps" ]; then
        echo "$folder: finished before"
        return
    fi
    step "$folder: $steps steps; its log is $folder/log.txt"
    mkdir -p "$folder"
    python tools/pretrain.py "${model[@]}" --tokenizer-model "$output/tokenizer.model" \
        --data-path "$output/all_text_document" --split 90,10,0 --data-cache-path "$output/cache" \
        --train-iters "$steps" --lr-warmup-iters $((steps / 15)) --hidden-dropout 0 --attention-dropout 0 \
        --eval-interval $(((steps + 3) / 4)) --eval-iters 20 --log-interval 20 --seed "$seed" --save "$folder" "$@" \
        >>"$folder/log.txt" || { echo "$folder failed; the end of $folder/log.txt says where it was" >&2 && exit 1; }
    grep -o 'validation loss .*' "$folder/log.txt" | tail -n 1
}

transfer() { # FOLDER SEED FLAGS...: trains on as a prefix language model; a run cut short starts anew
    local folder="$1" seed="$2"
    shift 2
    plan_of transfer "$(share 10)"
    [ -e "$folder/latest_checkpointed_iteration.txt" ] || rm -rf "$folder"
    pretrain "$folder" "$steps" "$seed" "${flags[@]}" --lr 1e-3 "$@"
}

for seed in $seeds; do
    for variant in $variants; do
        plan_of "$variant" "$(share 1)"
        run="$output/pretrain/$variant/seed$seed"
        pretrain "$run" "$steps" "$seed" "${flags[@]}" --lr 3e-3 --load "$run" --save-interval $(((steps + 3) / 4))
        transfer "$output/transfer/$variant/seed$seed" "$seed" --load "$run" --finetune
    done
    transfer "$output/transfer/none/seed$seed" "$seed"
done

pretrained=() transferred=()
for variant in $variants; do
    pretrained+=("$output/pretrain/$variant")
    transferred+=("$output/transfer/$variant")
done
step "held-out text, after pretraining and after the transfer: mean and standard deviation over seeds"
python tools/plot_run.py "${pretrained[@]}" --x-axis FLOPs --window 5 --table --output "$output/pretrain.png" \
    --names lm_loss mlm_loss rtd_loss rtd_replaced_accuracy
python tools/plot_run.py "${transferred[@]}" "$output/transfer/none" --x-axis FLOPs --table --output "$output/transfer.png" \
    --names lm_loss
