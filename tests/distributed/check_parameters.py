"""As a script: the formulas of parameters against the built models, on ranks of a layout that exist only by number.

check_parameters.py TENSOR PIPELINE VIRTUAL PRESET...
"""

import sys

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_llave.config.load import config_from_dict
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.models import family_of
from megatron_llave.planning.memory import Chunk, stage_chunks


def built(chunk: Chunk, groups: ProcessGroupCollection, index: int | None) -> dict[str, list[int]]:
    """Elements of each parameter of a chunk that is built without memory, by group, rising."""
    with torch.device("meta"):
        module = family_of(chunk.model).embedder(
            chunk.model, chunk.layout, groups, chunk.is_first, chunk.is_last, index
        )
    parts = {"vision": "vision", "projector": "projector", "image_newline": "projector"}
    sizes: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        first, second, *_ = [*name.split("."), ""]
        sizes.setdefault(parts.get(first, second), []).append(parameter.numel())
    return {group: sorted(numbers) for group, numbers in sizes.items()}


def planned(chunk: Chunk) -> dict[str, list[int]]:
    """The same by formula."""
    return {group: sorted(numbers) for group, numbers in chunk.sizes().items()}


def main() -> None:
    """Compare every chunk of every stage; the first tensor-parallel rank of each has as many elements as the others."""
    tensor, pipeline, virtual = map(int, sys.argv[1:4])
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)
    cpu_emulation.enable()
    for stage in range(pipeline):
        dist.init_process_group("fake", store=FakeStore(), rank=stage * tensor, world_size=tensor * pipeline)
        groups = process_groups.initialize_model_parallel(layout)
        for preset in sys.argv[4:]:
            model = config_from_dict({"model": {"preset": preset}}).model
            for number, chunk in enumerate(stage_chunks(model, layout, stage)):
                found = built(chunk, groups, number if virtual > 1 else None)
                assert found == planned(chunk), f"{preset}, chunk {number} of stage {stage}: {found}, {planned(chunk)}"
                print(preset, stage, number, sum(map(sum, found.values())))
        del groups
        process_groups.destroy_distributed()


if __name__ == "__main__":
    main()
