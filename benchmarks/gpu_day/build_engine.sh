#!/usr/bin/env bash
# Compiles transformer_engine_torch against the torch of $PYTHON. It needs no GPU and takes 20 minutes on two cores.
#     PYTHON=venv/bin/python bash benchmarks/gpu_day/build_engine.sh transformer_engine_torch-2.20.2.tar.gz FOLDER
# It needs CUDA's headers in $CUDA_HOME/include, since those in torch's CUDA wheels lack crt/ and nv/target. -O1 is
# enough for host code. But without inlining the linker merges two definitions of pybind11::arg_v that differ by
# PYBIND11_DETAILED_ERROR_MESSAGES, and the import ends in a double free; therefore it is defined everywhere.
set -euo pipefail
source=$(readlink -f "$1"); mkdir -p "$2"; out=$(readlink -f "$2"); python=${PYTHON:-python3}
cuda=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
tar -xzf "$source" -C "$work"; cd "$work"/*/
sed -i 's/"-O3"/"-O1", "-DPYBIND11_DETAILED_ERROR_MESSAGES="/' build_tools/pytorch.py
CPATH=$cuda/include NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 \
    MAX_JOBS=${MAX_JOBS:-2} NVTE_BUILD_MAX_JOBS=${MAX_JOBS:-2} "$python" setup.py -q bdist_wheel
cp dist/*.whl "$out/"
