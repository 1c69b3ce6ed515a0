#!/usr/bin/env bash
# The whole path on real text, in minutes on two CPU cores: data, a small source, growth, continued training of the grown
# model with its source as teacher, the same model from scratch, and a report. Run it with `make quickstart`. TEXT=FOLDER
# uses your own text.
set -euo pipefail
cd "$(dirname "$0")/.."

runs=runs/quickstart
source_checkpoint=$runs/source/checkpoints/step_00000180
text=${TEXT:-$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')}

# Two processes: on two GPUs if there are two, otherwise on the CPU. One thread each, so that they do not compete for cores.
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -lt 2 ]; then export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step() {  # step NAME WHAT-TO-DO-IF-IT-FAILS COMMAND...
    local name=$1 remedy=$2
    shift 2
    printf '\n== %s (%d s since the start)\n' "$name" "$SECONDS"
    if ! "$@"; then
        printf '\nquickstart: the step "%s" failed; its message is above.\n  command: %s\n  %s\n' "$name" "$*" "$remedy" >&2
        exit 1
    fi
}

pretrain() {
    deepspeed --num_gpus 2 --master_port "$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')" \
        launchers/pretrain.py --config "ds_configs/runs/quickstart-$1.yaml"
}

verify_growth() {
    python tools/verify_checkpoint.py $runs/grown_checkpoint --against "$source_checkpoint" \
        --data $runs/data/text_validation_text_document --samples 16 --length 128 --json > $runs/proof.json
    python -c 'import json, sys; p = json.load(open(sys.argv[1])); print("source loss {source_loss:.6f}, grown loss {target_loss:.6f} on the same {tokens} held-out tokens; largest logit difference {max_difference:.2e}".format(**p))' $runs/proof.json
}

rm -rf $runs
mkdir -p $runs

step "1/7 text to tokens" "Name a folder with text: make quickstart TEXT=FOLDER" \
    python tools/prepare_data.py --input "$text" --pattern '*.py,*.txt,*.md' --max-bytes 10000000 \
    --tokenizer train:sentencepiece --vocab-size 4096 --output $runs/data/text
step "2/7 pre-train the small source, 2 ranks, ZeRO-1" "Two free cores and 4 GB of memory are needed; then start again." pretrain source
step "3/7 grow it, with Adam's moments" "See docs/recipe.md for the keys of a recipe." \
    python tools/grow_checkpoint.py --source "$source_checkpoint" --recipe ds_configs/growth/quickstart.yaml --output $runs/grown_checkpoint --workers 1
step "   prove it" "The grown model computes something else than its source. This is a defect: please report it with the message above." verify_growth
step "4/7 continue the grown model, with its source as teacher, in a pipeline of 2" "Look at $runs/grown/metrics.jsonl." pretrain grown
step "5/7 pre-train the same model from scratch, for the FLOPs of source and grown model together" "Look at $runs/scratch/metrics.jsonl." pretrain scratch
step "6/7 export to Hugging Face" "Look at the checkpoint with tools/inspect_checkpoint.py." \
    python tools/export_huggingface.py $runs/grown/checkpoints/step_00000120 $runs/huggingface --dtype float32
step "7/7 report" "The runs are done; repeat this one command." \
    python tools/growth_study.py --source $runs/source --grown $runs/grown --scratch $runs/scratch --growth $runs/grown_checkpoint \
    --proof $runs/proof.json --model $runs/huggingface --prompt 'def ' --output $runs
printf '\ndone in %d s: open %s/report.html\n' "$SECONDS" "$runs"
