"""Under torchrun: one rank of each replica reads and decodes; all ranks of it get the same step, each replica its own.

check_replica.py DATA OUT tensor,pipeline,context...
"""

import itertools
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_llave.config.load import config_from_dict
from megatron_llave.data.image_files import decode_image
from megatron_llave.data.step_buffer import pack_step
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.models.llava_onevision import processor
from megatron_llave.train import open_data
from megatron_llave.training.broadcast import broadcast_steps, is_reader

STEPS, BATCH = 3, 8


def main() -> None:
    data, out, *layouts = sys.argv[1:]
    cpu_emulation.enable()
    process_groups.initialize_distributed(60)
    for layout in layouts:
        check(data, *map(int, layout.split(",")), Path(out) / layout)
        process_groups.destroy_model_parallel()
    process_groups.destroy_distributed()


def check(data: str, tensor: int, pipeline: int, context: int, out: Path) -> None:
    """Three steps at this layout; leaves the number of pictures that this rank decoded in `out`."""
    cfg = config_from_dict(
        {
            "model": {"preset": "tiny"},
            "data": {"path": data, "prompt": "plain", "workers": 0, "subsets": {"image_to_name": {}}},
            "train": {"global_batch_size": BATCH},
            "parallel": {"tensor": tensor, "pipeline": pipeline, "context": context},
        }
    )
    groups = process_groups.initialize_model_parallel(cfg.parallel)
    decoded, decode = [], decode_image
    with patch.object(processor, "decode_image", lambda *args: decoded.append(1) or decode(*args)):
        stream = broadcast_steps(open_data(cfg, groups, None), groups, process_groups.device())
        steps = list(itertools.islice(stream, STEPS))
    share = BATCH // groups.dp.size()
    assert len(decoded) == (STEPS * share if is_reader(groups) else 0), len(decoded)
    assert [step.position["step"] for step in steps] == [1, 2, 3]

    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, [[key for batch in step.batches for key in batch.keys] for step in steps])
    of_replica = {rank for group in (groups.mp, groups.cp) for rank in dist.get_process_group_ranks(group)}
    assert all(seen[rank] == seen[dist.get_rank()] for rank in of_replica)
    pairs = sorted(key for rank in dist.get_process_group_ranks(groups.dp) for step in seen[rank] for key in step)
    assert len(set(pairs)) == len(pairs) == STEPS * BATCH

    payload = pack_step(steps[-1]).payload.long()
    sums = torch.stack([payload.sum(), (payload * torch.arange(len(payload))).sum()])
    gathered = [torch.empty_like(sums) for _ in range(groups.mp.size())]
    dist.all_gather(gathered, sums, group=groups.mp)
    assert all(other.equal(sums) for other in gathered)
    # Context ranks have different parts of the same rows.
    rows = [batch.sequences for step in steps for batch in step.batches]
    assert all(row.context == context and row.part(0) is row for row in rows)
    assert all(len(row.tokens) * context == sum(row.padded_lengths) for row in rows)
    out.mkdir(exist_ok=True)
    (out / str(dist.get_rank())).write_text(str(len(decoded)))


if __name__ == "__main__":
    main()
