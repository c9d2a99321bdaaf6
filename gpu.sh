#!/usr/bin/env bash
# Measures everything on one GPU, in about half an hour:  make gpu OUT=folder
#
#   ./gpu.sh OUT [PART]      PART: all, 1 (checks, kernels, generation), 2 (training), 3 (large models)
#   WHEELS=folder            installs the wheels in it first, for a machine without a network
#   TINY=1                   tiny shapes: a rehearsal, which also runs on a CPU
#
# It needs an installed torch, no virtual environment and no network. Every step has a time limit of
# its own and writes to OUT at once, so whatever ends early loses only what comes after it.
set -u
OUT=${1:?usage: ./gpu.sh OUT [PART]}
PART=${2:-all}
PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")"
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
export PYTORCH_ALLOC_CONF=expandable_segments:True  # transformers' cache grows in small steps
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} NCCL_IB_DISABLE=1
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 FLATRLHF_CACHE="$OUT/cache"

step() {  # step SECONDS NAME COMMAND...
    local limit=$1 name=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    echo "$name: exit code $?, $((SECONDS - start)) s" | tee -a "$OUT/steps.txt"
    tail -n 12 "$OUT/$name.log"
}

bench() {  # bench SECONDS NAME TASK...
    local limit=$1 name=$2
    shift 2
    step "$limit" "$name" "$PYTHON" bench.py "$@" --out "$OUT" "${small[@]}"
}

# An NCCL all-reduce and one DeepSpeed step: what fails here would fail in everything below.
preflight='
import torch, models, ppo, training, utils
device = utils.init_distributed(1)
print(utils.sum_over_ranks(2.0, device), torch.__version__, device)
policy = models.Policy(models.load_lm("tiny", utils.dtype_of("auto")))
engine = training.train_engine(policy, 1e-3, 2, 1, ppo.Config())
tokens, lens = torch.ones(2, 9, dtype=torch.long, device=device), torch.full((2,), 4, device=device)
engine.backward(-engine(tokens, lens, lens)[0].mean())
print("gradient norm", training.step(engine))
'
small=() workers=8
opt_256=(--prompt-len 256 --new-tokens 256)
if [ -n "${TINY:-}" ]; then
    small=(--model opt-4x256 --batch 4 --micro-batch 2 --prompt-len 16 --new-tokens 8 --repeats 1)
    workers=2
fi
if [ -n "${WHEELS:-}" ]; then
    step 120 wheels "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl
fi

if [ "$PART" = all ] || [ "$PART" = 1 ]; then
    step 90 preflight "$PYTHON" -c "$preflight"
    step 240 tests "$PYTHON" -m pytest -n "$workers" -q -k gpu \
        test_kernels.py test_engine.py test_bench.py
    step 120 sanitizer compute-sanitizer --tool memcheck "$PYTHON" -m pytest -q \
        test_kernels.py -k "gpu and packed_prefill_is_attention"
    bench 90 kernels kernels --model opt-1.3b,llama-8b --batch 32 "${opt_256[@]}"
    bench 180 decode job decode-opt-1.3b
    bench 120 ragged generate --model opt-1.3b --batch 32 "${opt_256[@]}" --repeats 2
    bench 60 profile profile --model opt-1.3b --batch 1,32,128 "${opt_256[@]}"
fi
if [ "$PART" = all ] || [ "$PART" = 2 ]; then
    bench 120 train train --model opt-1.3b --batch 32 --micro-batch 8 "${opt_256[@]}" --repeats 3
    bench 180 ppo-1.3b job deepspeed-chat-1.3b
    bench 120 verl job verl
    bench 90 sft job sft-0.6b
    for model in qwen3-0.6b llama-3.2-1b qwen2.5-0.5b; do
        bench 60 "nano-vllm-$model" job nano-vllm --model "$model"
    done
fi
if [ "$PART" = all ] || [ "$PART" = 3 ]; then
    bench 120 decode-6.7b job decode-opt-6.7b
    bench 240 ppo-6.7b job deepspeed-chat-6.7b
    bench 240 fit fit --batch 2 --micro-batch 1 "${opt_256[@]}"
fi
