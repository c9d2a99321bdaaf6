#!/usr/bin/env bash
# Checks and measures on one GPU without a network, in two commands of at most 4 and 5 minutes:
#   tools/gpu.sh 1    is it right; generation and a PPO step        (read the results, then)
#   tools/gpu.sh 2    ragged answers, a profile, other models, kernel tests
# All results are in one archive, $OUT/gpu.tgz (OUT=out by default). wheels/ may hold wheels of what
# the machine lacks. TINY=1 rehearses it with tiny shapes, on a CPU if there is no GPU.
set -u
PART=${1:?usage: tools/gpu.sh 1 or 2}
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-out} RUN=${RUN:-out/gpu}  # RUN: a folder that git ignores
mkdir -p "$OUT" "$RUN/$PART" && RUN=$(realpath "$RUN")
export PYTHONPATH=$RUN/site TRITON_CACHE_DIR=$RUN/triton PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 TRITON_INTERPRET=0
TESTS="gpu and (packed_prefill_is or decode_is_the_last or rope_rotates or add_norm_adds or draws)"
gpu() { timeout -k 5 "$1" $PYTHON -m tools.gpu "$RUN/$PART" "${@:2}"; }
{
    nvidia-smi
    if [ ! -d "$RUN/site" ] && ls wheels/*.whl; then
        $PYTHON -m pip install -q --no-index --no-deps --target "$RUN/site" wheels/*.whl
    fi
    if [ "$PART" = 1 ]; then
        gpu 215 machine parity bandwidth decode:opt-1.3b ppo_step
    else
        gpu 190 ragged profile decode:llama-3.2-1b gpt2 generate_batch nano_vllm equal_rows
        timeout -k 5 100 $PYTHON -m pytest -q -p no:cacheprovider test_all.py -k "$TESTS" \
            ${TINY:+--collect-only}
    fi
} 2>&1 | tee "$RUN/$PART/log.txt"
tar czf "$OUT/gpu.tgz" -C "$RUN" "$PART"
