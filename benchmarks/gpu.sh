#!/usr/bin/env bash
# Everything that is measured on one NVIDIA GPU, in about 10 minutes, and a table of it at the end:
#
#     bash benchmarks/gpu.sh            # writes logs to benchmarks/gpu-logs
#     bash benchmarks/gpu.sh --smoke    # tiny sizes, on any machine: does each step run?
#
# The tests that need a GPU; training steps of GPT-2 124M and of a Llama of 8 layers x 1024 with one
# key/value head, beside torch.compile in turn; packed documents with cuDNN's attention beside plain
# attention; decoding at batch 1 and 64, beside transformers and as a fraction of the bandwidth of
# copying memory. Needs jaxgpt[test], torch with CUDA and transformers; PYTHON names the interpreter.
# Exits with 1 if a step fails or takes longer than its limit; the other steps still run.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
LOGS=${LOGS:-benchmarks/gpu-logs}
mkdir -p "$LOGS"
# Its own, because a compilation that is stopped leaves a broken file in torch's usual cache.
TORCHINDUCTOR_CACHE_DIR=$(mktemp -d)
export TORCHINDUCTOR_CACHE_DIR
trap 'rm -rf "$TORCHINDUCTOR_CACHE_DIR"' EXIT

gpt2=(--layers 12 --width 768 --heads 12 --context 1024 --batch 16)
llama=(--layers 8 --width 1024 --heads 8 --kv-heads 1 --context 2048 --batch 8)
measured=(--dtype bfloat16 --rounds 4 --steps 8)
documents=256
platform=cuda,cpu  # the tests run on the CPU unless they are told
patience=1
decoding=(--batches 1 64 --ours bfloat16 --theirs bfloat16 --rounds 3)
if [ "${1:-}" = --smoke ]; then
    gpt2=(--layers 1 --width 64 --heads 2 --context 64 --batch 2 --vocabulary 512)
    llama=(--layers 1 --width 64 --heads 2 --kv-heads 1 --context 64 --batch 2 --vocabulary 512)
    measured=(--dtype float32 --rounds 1 --steps 1)
    documents=16
    platform=cpu
    patience=4
    decoding=(--layers 1 --width 64 --heads 2 --context 64 --vocabulary 512 --batches 1 2
        --prompt 8 --new 8 --ours float32 --rounds 1)
fi

failed=0
table=$(printf '%-34s %12s %14s %12s %14s' "" "ours" "MFU (causal)" "other" "ours/other")

# Runs a step within a limit: NAME SECONDS COMMAND...; its output goes to a log.
step() {
    local name=$1 limit=$2
    shift 2
    echo "$name: $*"
    if ! timeout "$((limit * patience))" "$@" >"$LOGS/$name.log" 2>&1; then
        failed=1
        tail -n 5 "$LOGS/$name.log"
        return 1
    fi
}

# Adds a line to the table: LABEL OURS MFU OTHER RATIO.
row() {
    table+=$'\n'$(printf '%-34s %12s %14s %12s %14s' "$@")
}

# Measures training steps: NAME LABEL OPTIONS...
train() {
    local name=$1 label=$2
    shift 2
    if step "$name" 150 "$PYTHON" benchmarks/train_step.py "$@" "${measured[@]}"; then
        # The lines of the two sides follow the line of the column titles.
        row "$label" $(awk '/tokens\/s .*MFU/ {title = NR}
            title && NR == title + 1 {ours = $2; mfu = $3 ($4 ~ /^\(/ ? $4 : "")}
            title && NR == title + 2 {other = $2}
            /^jaxgpt \/ / {ratio = $4}
            END {print ours, mfu, other, ratio}' "$LOGS/$name.log")
    else
        row "$label" failed - - -
    fi
}

if step tests 120 env JAX_PLATFORMS="$platform" "$PYTHON" -m pytest -n 0 -m gpu tests/model; then
    row "GPU tests: $(tail -n 1 "$LOGS/tests.log")" "" "" "" ""
    if [ "$platform" != cpu ] && ! grep -q " passed" "$LOGS/tests.log"; then
        failed=1 # all were skipped: jax found no GPU
    fi
else
    row "GPU tests" failed - - -
fi
train gpt2 "GPT-2 124M, tokens/s" "${gpt2[@]}"
train llama "Llama 8 x 1024, tokens/s" "${llama[@]}"
train packed "GPT-2, documents, against plain" "${gpt2[@]}" --documents "$documents"
if step decoding 150 "$PYTHON" benchmarks/generate.py "${decoding[@]}"; then
    while read -r batch ours share other ratio; do
        row "decoding, batch $batch, tokens/s" "$ours" "-" "$other" "$ratio"
        row "    fraction of copying memory" "$share" "" "" ""
    done < <(awk '/^batch / {batch = $2; sub(",", "", batch)}
        /^  jaxgpt/ {ours = $3; ratio = $5; share = $10}
        /^  transformers/ {print batch, ours, share, $3, ratio}' "$LOGS/decoding.log")
else
    row "decoding" failed - - -
fi

echo
"$PYTHON" -c 'import jax; print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")'
echo "$table"
exit "$failed"
