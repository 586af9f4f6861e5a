"""Host memory of a rank in bytes: what a save takes until it is written, and what is offloaded of the optimizer.

plan.py makes a plan of it; memory.py has the memory of the device.
"""

from megatron_llave.config.schema import RunConfig
from megatron_llave.models.vision_cost import FLOAT, element
from megatron_llave.planning.adapters import as_frozen
from megatron_llave.planning.memory import StepShape, is_trained, stage_chunks


def save_bytes(cfg: RunConfig, stage: int, step: StepShape) -> int:
    """Return the host bytes that a save takes on a rank of a pipeline stage until it is written; on the device, none.

    They are a copy of what the rank writes (checkpoint/async_writer.py): its own share of the optimizer's float32
    weights and moments, and as many of the weights, and of their averages, as every other data-parallel rank. A tensor
    is not divided. The first tensor-parallel rank needs most, since it writes what all of them have.

    Args:
        cfg: configuration of the run, with the sizes of its model.
        stage: number of the pipeline stage, from 0.
        step: how a step is divided.
    """
    cfg = as_frozen(cfg)
    model, ranks = cfg.model, step.data_parallel * cfg.parallel.context
    groups = [item for chunk in stage_chunks(model, cfg.parallel, stage, cfg.lora) for item in chunk.sizes().items()]
    trained = [size for group, sizes in groups if is_trained(model, group) for size in sizes]
    frozen = [size for group, sizes in groups if not is_trained(model, group) for size in sizes]
    frozen = [] if cfg.lora.leaves_out_base else frozen
    tensors = [size * element(model) for size in trained + frozen]
    tensors += [size * FLOAT for size in trained] if cfg.loss.reward == "ema" else []
    own = 3 * FLOAT * sum(trained) // ranks
    return max(own + max(tensors), (own * ranks + sum(tensors)) // ranks)


def offloaded_bytes(cfg: RunConfig, stage: int, sharing: int) -> int:
    """Return the host bytes of what a rank of a pipeline stage offloads: moments, weights and gradients in float32.

    Args:
        cfg: configuration of the run, with the sizes of its model.
        stage: number of the pipeline stage, from 0.
        sharing: number of ranks that share the optimizer.
    """
    cfg = as_frozen(cfg)
    trained = sum(chunk.buffer(sharing) for chunk in stage_chunks(cfg.model, cfg.parallel, stage, cfg.lora))
    return round(cfg.optimizer.offload_fraction * (trained // sharing)) * 4 * FLOAT
