"""The token budget of a run: what a micro batch may hold, where images count by the memory that they need."""

from megatron_llave.batch import padded_length
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.balance import TokenBudget
from megatron_llave.errors import require
from megatron_llave.planning.adapters import as_frozen
from megatron_llave.planning.memory import MicroBatch, bytes_in_flight, stage_chunks, temporary_bytes
from megatron_llave.planning.pair_lengths import Kind, SideShape, sides_of

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
    cfg = as_frozen(cfg)
    layout, stages = cfg.parallel, cfg.parallel.pipeline
    chunks = stage_chunks(cfg.model, layout, 0, cfg.lora)
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


def full_micro_batches(cfg: RunConfig, kinds: list[Kind], on_gpu: bool = True) -> tuple[list[list[SideShape]], float]:
    """Return for each kind the sides of a micro batch of its largest pairs, and the part of one that a pair takes.

    Pairs beyond the budget are left out, as training does; hard negatives count like targets.

    Raises:
        ConfigError: all pairs of all kinds are beyond it.
    """
    budget, batches, parts = token_budget(cfg, on_gpu), [], []
    for kind in kinds:
        pairs = [sides_of(pair, cfg.data.hard_negatives) for pair in kind.pairs]
        costs = [
            budget.cost(sum(padded_length(side.tokens, cfg.parallel.context) for side in sides), _tiles(sides))
            for sides in pairs
        ]
        usable = sorted((x for x in zip(costs, pairs) if x[0] <= budget.tokens), key=lambda x: -x[0])
        if not usable:
            continue
        chosen, room = [], float(budget.tokens)
        for cost, sides in usable:  # a kind may have fewer pairs than fit
            number = int(room // cost)
            chosen += sides * number
            room -= number * cost
        batches.append(chosen)
        parts.append((kind.share, sum(cost for cost, _ in usable) / len(usable) / budget.tokens))
    key = f"train.tokens_per_micro_batch={budget.tokens}"
    require(batches, f"{key} is less than any pair takes of it; raise it")
    return batches, sum(share * part for share, part in parts) / sum(share for share, _ in parts)


def _tiles(sides: list[SideShape]) -> int:
    return sum(side.tiles for side in sides)
