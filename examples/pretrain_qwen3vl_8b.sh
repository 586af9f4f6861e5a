#!/usr/bin/env bash
# Trains an embedding model from Qwen3-VL-8B as configured in qwen3vl_8b.yaml. Start it in one of these ways (docs/getting_started.md tells more):
#     bash examples/pretrain_qwen3vl_8b.sh [--resume auto] [section.key=value ...]
#     torchrun --nproc-per-node 8 examples/pretrain_qwen3vl_8b.sh [--resume auto] [section.key=value ...]
#     torchrun --no-python --nproc-per-node 8 examples/pretrain_qwen3vl_8b.sh [--resume auto] [section.key=value ...]
# To bash the next line is a command and a here-document that is never read; to Python it is a string.
''''exec python3 "$(dirname "$0")/launch.py" "$0" "$@"; : <<'#' #'''
if __name__ == "__main__":
    from launch import train

    train(__file__)
#
