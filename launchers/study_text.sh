#!/usr/bin/env bash
# The text of the growth study, tokenized: the code and the docstrings of the installed packages, as one mix for training and
# apart as held-out domains. It is written once.
set -euo pipefail
cd "$(dirname "$0")/.."

text=runs/growth_study/text
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
test -f $text/prose_facts.json && exit 0
python tools/study_text.py --output $text --max-bytes 60000000
python tools/prepare_data.py --input $text/code.jsonl --input $text/prose.jsonl --tokenizer train:sentencepiece --vocab-size 1024 \
    --held-out 0.02 --output $text/mix --overwrite
for domain in code prose; do
    python tools/prepare_data.py --input $text/$domain.jsonl --tokenizer $text/mix_tokenizer --held-out 0.02 \
        --output $text/$domain --overwrite
done
