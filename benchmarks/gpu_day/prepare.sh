#!/usr/bin/env bash
# Makes .gpu_day/ in the repository, about 30 MB: what benchmarks/gpu_day.sh needs besides the packages of a CUDA image
# (docs/gpu_day.md lists them). It needs the network and Python 3.12 with pip.
#     bash benchmarks/gpu_day/prepare.sh [transformer_engine_torch-2.20.2-cp312-*.whl]
# The wheel comes from build_engine.sh. Without one, `gpu_day.sh build` compiles it on the machine with the GPU.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")"); out=$PWD/.gpu_day; engine=2.20.2
python=${PYTHON:-python3}; work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; rm -rf "$out"; mkdir -p "$out"
get() {
    local platforms=(); for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do platforms+=(--platform "${tag}_x86_64"); done
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" -d "$@"
}
get "$out" megatron-core==0.19.2 webdataset==1.0.2 braceexpand==0.1.7 omegaconf==2.4.0
get "$out" pytest==9.2.0 pluggy iniconfig packaging pygments
# Requirements of Transformer Engine; pydantic and pydantic-core have to be of one release.
get "$out" nvdlfw-inspect==0.2.2 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types typing-inspection 'importlib-metadata<9' zipp
get "$work" transformer_engine==$engine transformer_engine_cu13==$engine
for wheel in "$work"/*.whl; do unzip -q -o "$wheel" -d "$work/engine"; done
library=$work/engine/transformer_engine/wheel_lib/libtransformer_engine.so
"$python" "$here/strip_fatbin.py" "$library" "$work/stripped.so"  # 343 MB, of which an H100 or H200 uses a tenth
rm -rf "$work"/engine/transformer_engine/{jax,wheel_lib/*}
mv "$work/stripped.so" "$library"
tar -C "$work/engine" -c . | xz -2 -T0 > "$out/engine.tar.xz"
"$python" "$here/get_sdist.py" transformer_engine_torch $engine "$out"
if [ $# -gt 0 ]; then cp "$1" "$out/"; fi
cd "$here/../.." && size=$( (git ls-files -z; find "$out" -type f -print0) | du -cb --files0-from=- | tail -1 | cut -f1)
echo "$((size / 1048576)) MiB with the repository's files"
