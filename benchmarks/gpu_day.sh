#!/usr/bin/env bash
# A quarter of an hour on one H100 or H200 without network: correctness, speed, memory, and where the time goes.
# docs/gpu_day.md says how to prepare it and which files it writes.
#     bash benchmarks/gpu_day.sh [PART...] [OPTION...]
# Parts: install check 0.5b engine 2b 7b profile train, which is the order without a PART; also build and train-0.5b.
# Options are those of benchmarks/gpu_step.py, and override its settings here: --variants te sdpa --pairs 8 4 --repeats 3.
# Every part, and every variant in it, is a process with its own time limit. Raw figures are written to $RESULTS at once;
# what later calls need stays in $STATE. No part runs longer than SECONDS_IN_ALL after the start of the call.
# REHEARSAL=1 runs everything at a small size, with or without a GPU.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
STATE=${STATE:-$HOME/gpu_day}; RESULTS=${RESULTS:-$STATE/results}
SITE=$STATE/site; ENGINE=$STATE/engine; RAW=$RESULTS/raw.jsonl; python=${PYTHON:-python3}
mkdir -p "$SITE" "$RESULTS" "$STATE/embeddings"
[ -e "$STATE/raw.jsonl" ] && cp "$STATE/raw.jsonl" "$RESULTS/"
exec > >(tee -a "$RESULTS/log.txt") 2>&1
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} PYTHONPATH=$SITE:$PWD/tests:$PWD
export CUDA_DEVICE_MAX_CONNECTIONS=1  # as the package sets it, but before transformers asks for a GPU
if [ -z "${CUDA_HOME:-}" ] && command -v nvcc > /dev/null; then
    CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")"); export CUDA_HOME
fi
gigabytes=$(($(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2> /dev/null | head -1 || echo 0) / 1000))
small=() slower=1
if [ -n "${REHEARSAL:-}" ]; then
    gigabytes=140 slower=${SLOWER:-4}
    small=(model.vision.{hidden_size=32,num_heads=4,ffn_hidden_size=64,image_size=56,num_layers=2} train.steps=1000
        model.language.{hidden_size=64,num_heads=4,num_kv_heads=2,ffn_hidden_size=128,num_layers=2,vocab_size=1200})
fi

say() { echo "[$SECONDS s] $*" >&2; }

# part NAME SECONDS COMMAND...: run a command, end it when its time or that of all parts is over, print what it took.
part() {
    local name=$1 limit=$(($2 * slower)) left=$((${SECONDS_IN_ALL:-590} * slower - SECONDS)) began=$SECONDS status=0; shift 2
    if [ "$left" -lt 8 ]; then say "$name: no time left"; return 1; fi
    timeout -k 5 "$((left < limit ? left : limit))" "$@" || status=$?
    say "$name: $((SECONDS - began)) s, status $status"
    [ -e "$RAW" ] && cp "$RAW" "$STATE/"
    return $status
}

# steps PRESET SECONDS SECONDS_OF_A_VARIANT OPTION...: run benchmarks/gpu_step.py; the table is printed at the end.
steps() {
    local preset=$1 limit=$2 of_a_variant=$3; shift 3
    part "steps of $preset" "$limit" "$python" -m benchmarks.gpu_step "${small[@]}" --presets "$preset" --raw "$RAW" \
        --folder "$STATE/embeddings" --engine "$ENGINE" --limit "$((of_a_variant * slower))" "$@" "${options[@]}" > /dev/null
}

install() {
    "$python" - "$SITE" .gpu_day/*.whl <<'PYTHON' || return 1
import sys, zipfile
for wheel in sys.argv[2:]:
    if "transformer_engine_torch" not in wheel:
        zipfile.ZipFile(wheel).extractall(sys.argv[1])
PYTHON
    say "packages unpacked"
    (unpack_engine; make_data) &
    background=$!
}

unpack_engine() {
    mkdir -p "$ENGINE.new"
    "$python" - "$ENGINE.new" .gpu_day/engine.tar.xz .gpu_day/transformer_engine_torch-*.whl <<'PYTHON' && say "Transformer Engine unpacked"
import os, sys, tarfile, zipfile
tarfile.open(sys.argv[2]).extractall(sys.argv[1], filter="data")
for wheel in filter(os.path.exists, sys.argv[3:]):
    zipfile.ZipFile(wheel).extractall(sys.argv[1])
PYTHON
    if PYTHONPATH=$ENGINE.new:$PYTHONPATH timeout $((90 * slower)) "$python" -c \
        "import torch, transformer_engine.pytorch; assert torch.cuda.is_available(), 'no GPU'"; then
        mv "$ENGINE.new" "$ENGINE"; say "Transformer Engine can be imported"
    else
        say "Transformer Engine cannot be imported: its variants are left out"
    fi
    touch "$STATE/engine_tried"
}

make_data() {
    [ -e "$STATE/data" ] && return
    mkdir -p "$STATE/data.new"
    CUDA_VISIBLE_DEVICES='' timeout $((120 * slower)) "$python" -c \
        "from pathlib import Path; from benchmarks.data_pipeline import make_data; make_data(Path('$STATE/data.new'), 160)" \
        && mv "$STATE/data.new" "$STATE/data" && say "the training data are made"
}

wait_for() { local _; for _ in $(seq $((100 * slower))); do [ -e "$1" ] && return; sleep 1; done; say "there is no $1"; return 1; }

# Compile Transformer Engine if the wheel does not fit the installed torch; this takes two minutes on 16 cores.
build() {
    MAX_JOBS=$(nproc) part "build of Transformer Engine" 300 bash benchmarks/gpu_day/build_engine.sh \
        .gpu_day/transformer_engine_torch-2.20.2.tar.gz "$STATE/built" > "$STATE/build.log" 2>&1 || tail -20 "$STATE/build.log"
    rm -rf "$ENGINE" "$ENGINE.new"; cp "$STATE"/built/*.whl .gpu_day/ && unpack_engine
}

check() {
    local golden=("$python" -m benchmarks.gpu_check --raw "$RESULTS/check.jsonl" --against "$STATE/reference.safetensors")
    nvidia-smi -L || echo "no GPU"
    part "attention for packed rows" 60 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/models/blocks/test_layer_specs.py
    CUDA_VISIBLE_DEVICES='' part "golden model on the CPU" 90 "$python" -m benchmarks.gpu_check --save "$STATE/reference.safetensors"
    part "golden model, local kernels" 90 "${golden[@]}" local:fp32 local:bf16
}

check_engine() {
    wait_for "$STATE/engine_tried"; [ -e "$ENGINE" ] || return
    local kind golden=("$python" -m benchmarks.gpu_check --raw "$RESULTS/check.jsonl" --against "$STATE/reference.safetensors")
    local te=transformer_engine path=$ENGINE:$PYTHONPATH
    PYTHONPATH=$path part "golden model, Transformer Engine" 120 "${golden[@]}" $te:bf16 $te:fp32 &
    local pids=($!)
    for kind in tensorwise delayed blockwise; do
        PYTHONPATH=$path part "golden model, FP8 $kind" 120 "${golden[@]}" $te:fp8:$kind &
        pids+=($!)
    done
    wait "${pids[@]}"
}

# train NAME KERNELS OPTION...: train 20 steps with one process through torchrun. The tiny runs are then resumed from the
# checkpoint of step 10 in another folder, and the losses of both from there on are compared.
train() {
    local name=$1 kernels=$2 path=$PYTHONPATH output; shift 2
    wait_for "$STATE/data" || return
    output=$STATE/runs/$name
    [ "$kernels" = local ] || path=$ENGINE:$path
    local run=("$python" -m torch.distributed.run --standalone --nproc-per-node 1 -m megatron_llave.train
        --config benchmarks/gpu_day/train.yaml "data.path=$STATE/data" "model.kernels=$kernels" "$@")
    PYTHONPATH=$path part "training, $name" 120 "${run[@]}" "train.output=$output" || return
    cp "$output/log.jsonl" "$RESULTS/train_$name.jsonl"; du -sh "$output/checkpoints"
    case $name in tiny*) ;; *) return ;; esac
    PYTHONPATH=$path part "resumed, $name" 90 "${run[@]}" "train.output=$output-resumed" \
        --resume "$output/checkpoints/step-0000010" || return
    cp "$output-resumed/log.jsonl" "$RESULTS/train_$name-resumed.jsonl"
    "$python" - "$output" "$output-resumed" <<'PYTHON'
import json, sys
without, resumed = (
    {record["step"]: record["loss"] for record in map(json.loads, open(f"{run}/log.jsonl"))} for run in sys.argv[1:]
)
apart = [abs(without[step] - loss) for step, loss in resumed.items() if step > 10]
print(f"losses of {len(apart)} resumed steps are at most {max(apart):.2g} from those without the interruption")
PYTHON
}

one() {
    local pairs=8 both=(--negatives micro_batch global_batch)
    [ "$gigabytes" -ge 130 ] || pairs=4
    case $1 in
        install) install ;;
        build) build ;;
        check) check ;;
        0.5b) steps 0.5b 150 80 --variants local sdpa --pairs $pairs "${both[@]}" ;;
        engine)
            check_engine
            steps 0.5b 150 85 --variants te tensorwise --pairs $pairs "${both[@]}" ;;
        2b) steps 2b 220 80 --variants local sdpa te tensorwise --pairs $((pairs / 2)) "${both[@]}" --repeats 3 ;;
        7b)
            [ "$gigabytes" -ge 130 ] || { say "7b has no room in $gigabytes GB"; return; }
            steps 7b 220 110 --variants te sdpa tensorwise --pairs 4 "${both[@]}" --repeats 3 ;;
        train) train tiny local; [ -e "$ENGINE" ] && train tiny-engine transformer_engine ;;
        train-0.5b)
            local kernels=transformer_engine; [ -e "$ENGINE" ] || kernels=local
            train 0.5b $kernels model.preset=0.5b model.freeze='[vision]' checkpoint.interval=0 optimizer.learning_rate=1e-5 "${small[@]}" ;;
        profile)
            local variant=te path=$ENGINE:$PYTHONPATH; [ -e "$ENGINE" ] || variant=local path=$PYTHONPATH
            PYTHONPATH=$path part "profile of 0.5b" 100 "$python" -m benchmarks.gpu_profile --out "$RESULTS" --variant $variant --pairs 8 "${small[@]}" ;;
        *) say "no such part: $1" ;;
    esac
}

background=
parts=() options=()
while [ $# -gt 0 ] && [[ $1 != --* ]]; do parts+=("$1"); shift; done
options=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(install check 0.5b engine 2b 7b profile train)
for name in "${parts[@]}"; do one "$name"; done
[ -z "$background" ] || wait "$background"  # a bare wait would wait for tee too
[ -e "$RAW" ] && timeout 60 "$python" -m benchmarks.gpu_step --table "$RAW" | tee "$RESULTS/table.md"
say "done: ${parts[*]}"
sleep 1  # until tee has written it
