"""Under torchrun: one rank of each replica reads and decodes; all ranks of it get the same step, each replica its own.

    check_replica.py DATA tensor,pipeline OUT
"""

import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llave import config_file, cpu_emulation, parallel
from megatron_llave.data import images
from megatron_llave.flat_step import flatten
from megatron_llave.replica import is_reader, share_steps
from megatron_llave.train import open_data

STEPS, BATCH = 3, 8


def main() -> None:
    data, layout, out = sys.argv[1:]
    tensor, pipeline = map(int, layout.split(","))
    cpu_emulation.enable()
    cfg = config_file.build(
        {
            "model": {"preset": "tiny"},
            "data": {"path": data, "prompt": "plain", "workers": 0, "subsets": {"image_to_name": {}}},
            "train": {"global_batch_size": BATCH},
            "parallel": {"tensor": tensor, "pipeline": pipeline},
        }
    )
    parallel.start_processes(60)
    groups = parallel.init(cfg.parallel)
    decoded = []
    decode = images.decode_image
    images.decode_image = lambda *args: decoded.append(1) or decode(*args)
    steps = list(itertools.islice(share_steps(open_data(cfg, groups, None), groups.mp, parallel.device()), STEPS))
    share = BATCH // groups.dp.size()
    assert len(decoded) == (STEPS * share if is_reader(groups.mp) else 0), len(decoded)
    assert [step.position["step"] for step in steps] == [1, 2, 3]

    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, [[key for batch in step.batches for key in batch.keys] for step in steps])
    of_replica = dist.get_process_group_ranks(groups.mp)
    assert all(seen[rank] == seen[dist.get_rank()] for rank in of_replica)
    pairs = sorted(key for rank in dist.get_process_group_ranks(groups.dp) for step in seen[rank] for key in step)
    assert len(set(pairs)) == len(pairs) == STEPS * BATCH

    payload = flatten(steps[-1]).payload.long()
    sums = torch.stack([payload.sum(), (payload * torch.arange(len(payload))).sum()])
    gathered = [torch.empty_like(sums) for _ in of_replica]
    dist.all_gather(gathered, sums, group=groups.mp)
    assert all(other.equal(sums) for other in gathered)
    (Path(out) / str(dist.get_rank())).write_text(str(len(decoded)))
    parallel.shut_down()


if __name__ == "__main__":
    main()
