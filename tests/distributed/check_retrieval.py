"""Run under torchrun: candidates spread over the ranks are ranked bit for bit as in one process, ties included."""

import torch
import torch.distributed as dist

from megatron_llave.evaluation.ranking import Ranking, rank_candidates

QUERIES, CANDIDATES, WIDTH = 37, 203, 48


def unit_rows(rows: int, generator: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1)


def ordinary_case(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return unit_rows(QUERIES, generator), unit_rows(CANDIDATES, generator)


def tied_case(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Eleven different candidates only, each repeated all over the shards; some queries are zero and tie with all."""
    candidates = unit_rows(11, generator)[torch.randint(11, (CANDIDATES,), generator=generator)]
    queries = unit_rows(QUERIES, generator)
    queries[::5] = 0
    return queries, candidates


def boundaries(world: int) -> list[list[int]]:
    """Where the shards of ranks 0, 1, ... begin and end: even, unequal, and with empty ones."""
    even = [CANDIDATES * r // world for r in range(world + 1)]
    unequal = [0, *sorted([1, 150, 160][: world - 1]), CANDIDATES]
    last_has_all = [0] * world + [CANDIDATES]
    first_has_all = [0] + [CANDIDATES] * world
    return [even, unequal, last_has_all, first_has_all]


def assert_equal(ranking: Ranking, expected: Ranking, case: str) -> None:
    for name in ("top", "positive", "hardest_negative"):
        same = torch.equal(getattr(ranking, name), getattr(expected, name))
        assert same, f"{name} differs from one process: {case}"


def main() -> None:
    """Compare every case, sharding, k and chunk with the ranking of all candidates in this process."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for make in (ordinary_case, tied_case):
        generator = torch.Generator().manual_seed(1)
        queries, candidates = make(generator)
        positives = torch.randint(CANDIDATES, (QUERIES, 3), generator=generator)
        for edges in boundaries(world):
            for k, chunk, right in ((1, 1024, 0), (5, 7, 0), (100, 16, 0), (300, 1, 0), (5, 7, slice(None))):
                mine = candidates[edges[rank] : edges[rank + 1]]
                offset = edges[rank]
                ranking = rank_candidates(queries, mine, positives[:, right], k, offset, dist.group.WORLD, chunk)
                expected = rank_candidates(queries, candidates, positives[:, right], k)
                assert_equal(ranking, expected, f"{make.__name__}, shards {edges}, k {k}, chunk {chunk}")
    no_queries = rank_candidates(queries[:0], candidates[:rank], positives[:0, 0], 3, 0, dist.group.WORLD)
    assert no_queries.top.shape == (0, 3)
    dist.destroy_process_group()
    print(f"rank {rank} of {world}: all rankings equal", flush=True)


if __name__ == "__main__":
    main()
