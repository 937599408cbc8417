#!/usr/bin/env bash
# From raw text to a pretrained METRO model: tokenizer, data, two processes, loss curves, checkpoint, restored text.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash examples/quickstart.sh [--text FILE_OR_DIR] [--layout tp2|dp2] [--steps N]

  --text    text to train on (default: the documentation of the Python language that CPython carries)
  --layout  tp2: two processes share each layer, with sequence parallelism (default)
            dp2: two processes share the batch and the optimizer state
  --steps   optimizer steps (default: 1500)

Writes to runs/quickstart/. Needs no GPU: under 6 minutes on 2 CPU cores after installation.
TEXT
}

text=()
layout=tp2
steps=1500
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage && exit 0 ;;
        --text | --layout | --steps) [ $# -gt 1 ] || { echo "$1 needs a value: see --help" >&2 && exit 64; } ;;&
        --text) text=(--text "$(realpath -- "$2")") && shift 2 ;;
        --layout) layout="$2" && shift 2 ;;
        --steps) steps="$2" && shift 2 ;;
        *) echo "unknown argument $1: the known ones are --text, --layout and --steps" >&2 && exit 64 ;;
    esac
done
case "$layout" in
    tp2) micro_batch=16 layout_flags=(--tensor-model-parallel-size 2 --sequence-parallel) ;;
    dp2) micro_batch=8 layout_flags=(--use-distributed-optimizer --overlap-grad-reduce) ;;
    *) echo "--layout $layout is none of tp2 and dp2" >&2 && exit 64 ;;
esac
[[ "$steps" =~ ^[1-9][0-9]*$ ]] || { echo "--steps $steps is not a positive number" >&2 && exit 64; }

source examples/environment.sh
prepare_environment logging

# Two processes on what may be two cores: one thread each.
export OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1
run=runs/quickstart
checkpoint="$run/checkpoint-$layout"
start=$SECONDS

step() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - start)); }

step "1. text: documents for training and for validation"
python examples/quickstart_corpus.py "${text[@]}" --output-folder "$run"

step "2. tokenizer: SentencePiece with sentinels"
python tools/train_tokenizer.py --input "$run/train.jsonl" --vocab-size 500 --allow-smaller-vocab \
    --output-prefix "$run/tokenizer"

step "3. data: Megatron's .bin and .idx"
for part in train valid; do
    python tools/preprocess_data.py --input "$run/$part.jsonl" --output-prefix "$run/$part" \
        --tokenizer-model "$run/tokenizer.model" --workers 2
done

# A model of this size leaves the unigram plateau in minutes only with a small vocabulary, a high learning rate and no
# dropout.
step "4. pretraining: metro-tiny on two processes, layout $layout"
rm -rf "$checkpoint"
python -m torch.distributed.run --standalone --nproc-per-node 2 tools/pretrain.py --preset metro-tiny \
    --tokenizer-model "$run/tokenizer.model" \
    --train-data-path "$run/train_text_document" --valid-data-path "$run/valid_text_document" \
    --train-iters "$steps" --micro-batch-size "$micro_batch" --global-batch-size 16 \
    --lr 3e-3 --lr-warmup-iters $((steps / 15)) --clip-grad 1.0 --hidden-dropout 0 --attention-dropout 0 \
    --eval-interval 500 --eval-iters 4 --log-interval 50 \
    --save "$checkpoint" "${layout_flags[@]}"

step "5. loss curves"
python tools/plot_run.py "$checkpoint" --output "$run/curves-$layout.png"

step "6. the saved checkpoint, loaded into one process, restores held-out text"
python examples/quickstart_report.py "$checkpoint"

step "done: curves in $run/curves-$layout.png, metrics in $checkpoint/metrics.jsonl"
