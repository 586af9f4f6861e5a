"""The token budget of a run: what a micro batch may hold, where images count by the memory that they need."""

from megatron_llave.config.schema import RunConfig
from megatron_llave.data.balance import TokenBudget
from megatron_llave.planning.memory import MicroBatch, bytes_in_flight, stage_chunks, temporary_bytes
from megatron_llave.planning.pair_lengths import SideShape

MANY_TOKENS, MANY_TILES = 2**24, 2**16
"""So many that the memory that does not depend on them is small beside theirs."""


def token_budget(cfg: RunConfig, on_gpu: bool = True) -> TokenBudget | None:
    """Return what a micro batch may hold; None without train.tokens_per_micro_batch. Arguments as `tile_tokens`."""
    tokens = cfg.train.tokens_per_micro_batch
    return None if tokens is None else TokenBudget(tokens, tile_tokens(cfg, on_gpu))


def tile_tokens(cfg: RunConfig, on_gpu: bool = True) -> float:
    """Return the number of tokens that need as much memory as a tile, beside its visual tokens: its share of a budget.

    Bytes are those of the first pipeline stage: what it keeps for the backward, and the largest temporary tensors.

    Args:
        cfg: configuration of the run, with the sizes of its model.
        on_gpu: see `stage_memory`.
    """
    layout, stages = cfg.parallel, cfg.parallel.pipeline
    chunks = stage_chunks(cfg.model, layout, 0)
    cost = chunks[0].cost

    def needed(tokens: int, tiles: int) -> int:
        visual, _ = cost.of_tiles(cfg.model, tiles)
        side = SideShape(tokens, visual, tiles)
        batch = MicroBatch.of([side], layout.context, cost.splits_tiles)
        kept = [chunk.activations(batch, on_gpu) for chunk in chunks]
        if "vision" in cfg.model.freeze and "projector" not in cfg.model.freeze:
            kept[0] += cost.feature_bytes(cfg.model, batch.tiles)
        in_flight = bytes_in_flight(kept, 0, stages, 4 * stages)
        return in_flight + max(temporary_bytes(chunk, batch, on_gpu) for chunk in chunks)

    return (needed(0, MANY_TILES) / MANY_TILES) / (needed(MANY_TOKENS, 0) / MANY_TOKENS)
