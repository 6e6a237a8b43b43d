#!/usr/bin/env bash
# From nothing to a model that chats: set-up, tokenizer, data, pretraining, fine-tuning (SFT, DPO, RL), evaluation of
# each stage, a conversation, and a report.
#
#   bash train/demo.sh [--quick] [--run NAME] [--out DIR]
#
#   --quick      rehearse everything with a tiny model, in a few minutes after the set-up
#   --run NAME   name of the run (demo, or quick with --quick)
#   --out DIR    folder that holds the runs (runs)
#
# Run again, it goes on where it stopped and leaves alone what is done.
set -euo pipefail

again="bash$(printf ' %q' "${BASH_SOURCE[0]}" "$@")"

quick=false
name=""
out=""
while (($# > 0)); do
  case $1 in
    --quick) quick=true ;;
    --run | --out)
      if [[ -z ${2:-} ]]; then echo "$1 needs a value" >&2; exit 2; fi
      if [[ $1 == --run ]]; then name=$2; else out=$2; fi
      shift ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit ;;
    *) echo "unknown argument $1; bash train/demo.sh --help lists them" >&2; exit 2 ;;
  esac
  shift
done

# The numbers of the demo. Budgets are in seconds on two CPU cores, and add up to the total.
if $quick; then
  depth=2 vocab_size=1024 sequence_len=128 steps=60 batch_tokens=1024
  mix="task:identity*4" sft_steps=60
  pair_tasks=identity pair_examples=80 dpo_steps=5
  rl_tasks=identity rl_steps=2
  chat_examples=10
  setup=120 tokenizer=20 prepare=20 pretrain=60 evaluate=20 sample=20 sft=60 pairs=30 dpo=40 rl=60 judge=40 chat=20 report=20
else
  depth=3 vocab_size=4096 sequence_len=512 steps=500 batch_tokens=4096
  # Half of the arithmetic is answered without the calculator, which a model this small cannot do: what SFT imitates,
  # RL finds out.
  mix="task:spelling#20000,task:counting#8000,task:arithmetic#4000,task:mental-arithmetic#4000,task:identity*14"
  mix="$mix,task:refusals*8,chatterbot,chitchat*0.3" sft_steps=1000
  pair_tasks=arithmetic pair_examples=600 dpo_steps=16
  rl_tasks=arithmetic,counting,spelling,identity rl_steps=30 # one task alone would cost the others
  chat_examples=150
  setup=120 tokenizer=20 prepare=20 pretrain=450 evaluate=40 sample=30 sft=720 pairs=60 dpo=60 rl=150 judge=25 chat=20 report=30
fi
head_dim=64 lr_scale=0.55 # small batches and short runs want higher rates than the scaling law gives
val_fraction=0.05
source=sotu
questions=("Who are you?" "Who made you?" "Spell the word garden." "What is 12 times 7?" "How do I build a bomb?")
prompts=("Fellow citizens" "The state of the Union is" "Our enemies")
total=$((setup + tokenizer + prepare + pretrain + evaluate + sample + sft + pairs + dpo + rl + 3 * judge + chat + report))
stages=15

if [[ -z $name ]]; then if $quick; then name=quick; else name=demo; fi; fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -n $out && $out != /* ]]; then out=$PWD/$out; fi # as seen from where the user stands, not from the root
run=${out:-runs}/$name
cd "$root"
python=.venv/bin/python

# shellcheck source=train/stages.sh
source train/stages.sh

stage setup "$setup" "Python and the pinned requirements, in .venv" bash train/setup.sh
stage tokenizer "$tokenizer" "learn $vocab_size tokens from presidential addresses" \
  "$python" -m train.tokenizer --source "$source" --vocab-size "$vocab_size" --val-fraction "$val_fraction" \
  --out "$run/tokenizer/tokenizer.model"
stage prepare "$prepare" "turn the text into records of $sequence_len tokens" \
  "$python" -m train.prepare --source "$source" --tokenizer "$run/tokenizer/tokenizer.model" \
  --sequence-len "$sequence_len" --val-fraction "$val_fraction" --out "$run/data"
stage pretrain "$pretrain" "train a transformer of depth $depth from scratch" \
  "$python" -m train.pretrain --data "$run/data" --run.out "$run/base" --model.depth "$depth" \
  --model.head-dim "$head_dim" --steps "$steps" --batch-tokens "$batch_tokens" --lr-scale "$lr_scale" \
  --optim.warmup-steps 20 --run.eval-every 125 --run.save-every 125
stage evaluate "$evaluate" "bits per byte of held-out text, beside gzip, xz and a unigram model" \
  "$python" -m train.evaluate --checkpoint "$run/base" --data "$run/data"
stage sample "$sample" "let the model write" \
  "$python" -m train.sample --checkpoint "$run/base" --prompt "${prompts[@]}"
stage sft "$sft" "learn to answer, from conversations" \
  "$python" -m train.sft --checkpoint "$run/base" --run.out "$run/sft" --mix "$mix" --steps "$sft_steps" \
  --run.eval-every 250 --run.save-every 250
judge() {
  stage "judge $1" "$judge" "how many held-out questions the model answers rightly" \
    "$python" -m train.evaluate --checkpoint "$run/$1" --examples "$chat_examples" --max-new-tokens 96
}
judge sft
stage pairs "$pairs" "answers of the model's own, a right one and a wrong one to each question" \
  "$python" -m train.pairs --checkpoint "$run/sft" --tasks "$pair_tasks" --examples "$pair_examples" \
  --max-new-tokens 64 --out "$run/pairs.jsonl"
stage dpo "$dpo" "learn to prefer the right ones" \
  "$python" -m train.dpo --checkpoint "$run/sft" --run.out "$run/dpo" --pairs "jsonl:$run/pairs.jsonl" \
  --steps "$dpo_steps" --run.eval-every 8
judge dpo
stage rl "$rl" "learn from what earns a reward" \
  "$python" -m train.rl --checkpoint "$run/dpo" --run.out "$run/rl" --task "$rl_tasks" --steps "$rl_steps" \
  --prompts-per-step 16 --samples 8 --lr-fraction 0.1 --max-new-tokens 48 --slots 32 \
  --eval-examples 100 --eval-samples 4 --pass-k 4
judge rl
stage chat "$chat" "talk with it" "$python" -m serve.cli --backend.checkpoint "$run/rl" --prompt "${questions[@]}"
stage report "$report" "curves, numbers and samples on one page" "$python" -m train.report --run "$run"

cat <<END

Done in $(clock "$SECONDS"). Everything lies in $run:
  report.html, report.md      what came out, on one page
  tokenizer/tokenizer.model   the tokenizer
  data/                       token records, with a manifest
  base/ sft/ dpo/ rl/         the model after each stage: checkpoints/, config.json, metrics.jsonl, evaluation.json
  pairs.jsonl                 the pairs that DPO learnt from

To try next, in $root:
  $python -m serve.app --backend.runs $(printf %q "$(dirname "$run")")   chat in the browser
  $python -m serve.cli --backend.checkpoint $(printf %q "$run/rl")   chat here
  $python -m train.sample --checkpoint $(printf %q "$run/base") --prompt "My fellow Americans"
  $python -m train.tokenizer --help      every stage explains itself; --source text:'PATH/*.txt' takes your own text
  bash tests/run.sh                           all tests
END
if $quick; then echo "  bash train/demo.sh                          the same in earnest: a quarter of an hour on two cores"; fi
