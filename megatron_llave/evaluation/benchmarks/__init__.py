"""The benchmarks of llave evaluate, one file each; importing this package registers them."""

from megatron_llave.evaluation.benchmark import register_benchmark
from megatron_llave.evaluation.benchmarks import corpus, mmeb, mteb, prepared, video

for _module in (prepared, mmeb, corpus, video, mteb):
    register_benchmark(_module.BENCHMARK)
