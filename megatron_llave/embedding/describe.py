"""What a loaded model is, in three lines, for a notebook or a log."""

from collections.abc import Sequence

from torch.nn import Module

from megatron_llave.config.schema import RunConfig
from megatron_llave.planning.plan import count_parameters


def describe(cfg: RunConfig, chunks: Sequence[Module], place: str | None, average: bool, num_ranks: int) -> str:
    """Return three lines: what model it is, what it takes and gives, and where it lies.

    Args:
        cfg: of the model.
        chunks: the parts of the model that this rank has.
        place: where its weights come from; None: they are in training.
        average: whether they are the averaged weights of their run.
        num_ranks: number of processes that hold the model and its copies.
    """
    model, dims, layout = cfg.model, cfg.loss.matryoshka_dims, cfg.parallel
    vision, language = model.vision, model.language
    sizes = (
        f"{language.num_layers} layers of {language.hidden_size}, vision {vision.num_layers} of {vision.hidden_size}"
    )
    name = " ".join(filter(None, [model.family, model.preset]))
    adapters = f", adapters of rank {cfg.lora.rank}" if cfg.lora.rank else ""
    origin = "in training" if place is None else f"{'averaged weights' if average else 'weights'} of {place}"
    prefixes = f" (also trained: the first {', '.join(map(str, dims))})" if dims else ""
    weights = [weight for chunk in chunks for weight in chunk.parameters()]
    here, total = sum(weight.numel() for weight in weights), sum(count_parameters(model).values())
    parameters = f"{total / 1e6:,.4g} M parameters" + (f", {here / 1e6:,.4g} M of them here" if num_ranks > 1 else "")
    degrees = {"tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context}
    copies = num_ranks // (layout.tensor * layout.pipeline * layout.context)
    split = ", ".join([*(f"{key} {size}" for key, size in degrees.items() if size > 1), f"data {copies}"])
    return "\n".join(
        [
            f"LoadedModel {name}: {sizes}{adapters}; {origin}",
            f"takes texts, images and videos, up to {cfg.data.max_length} tokens, prompt {cfg.data.prompt}; gives "
            f"{language.hidden_size} numbers of unit length{prefixes}",
            f"on {weights[0].device} in {model.precision}, {parameters}" + (f"; {split}" if num_ranks > 1 else ""),
        ]
    )
