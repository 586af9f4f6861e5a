#!/usr/bin/env bash
# Trains an embedding model from Qwen2-VL-2B as configured in qwen2vl_2b.yaml. Start it in one of these ways (docs/getting_started.md tells more):
#     bash examples/pretrain_qwen2vl_2b.sh [--resume auto] [section.key=value ...]
#     torchrun --nproc-per-node 8 examples/pretrain_qwen2vl_2b.sh [--resume auto] [section.key=value ...]
#     torchrun --no-python --nproc-per-node 8 examples/pretrain_qwen2vl_2b.sh [--resume auto] [section.key=value ...]
# To bash the next line is a command and a here-document that is never read; to Python it is a string.
''''exec python3 "$(dirname "$0")/launch.py" "$0" "$@"; : <<'#' #'''
if __name__ == "__main__":
    from launch import train

    train(__file__)
#
