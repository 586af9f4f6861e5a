"""Describe a folder of weights and check that it is complete: `llave convert inspect`."""

import math
from collections.abc import Iterable
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.pretrained import Pretrained, find_pretrained, read_base
from megatron_llave.checkpoint.safe_reads import check_all, safe_reads
from megatron_llave.checkpoint.state import sharded_parameters, state_metadata
from megatron_llave.config.model import ModelConfig
from megatron_llave.models import family_of, model_without_memory, open_hf
from megatron_llave.models.hf.mapping import hf_shapes
from megatron_llave.models.lora import is_adapter

OTHER_KEYS = ("optimizer.", folders.AVERAGE)
"""Prefixes of tensors in a checkpoint that are not weights."""


def inspect(folder: str | Path, groups: ProcessGroupCollection) -> int:
    """Print what the folder holds, then a line for every tensor that is missing, extra or of a wrong shape.

    Args:
        folder: an HF folder, a checkpoint, or an output directory.
        groups: process groups of this single process.

    Returns:
        0 if the folder is complete, else 1.

    Raises:
        UserError: the folder has no known format, or its files cannot be read.
    """
    pretrained = find_pretrained(folder)
    embedder = model_without_memory(pretrained.cfg.model, groups, pretrained.cfg.lora)
    shapes = {name: tuple(parameter.shape) for name, parameter in embedder.named_parameters()}
    if pretrained.is_hf:
        problems = _inspect_hf(pretrained, shapes)
    else:
        problems = _inspect_checkpoint(pretrained, embedder, groups)
    _print_model(pretrained.cfg.model, _millions(shape for name, shape in shapes.items() if not is_adapter(name)))
    _print_adapters(pretrained, _millions(shape for name, shape in shapes.items() if is_adapter(name)))
    tokenizer = pretrained.find_tokenizer()
    print(f"tokenizer: {Path(tokenizer).name if tokenizer else 'none in the folder'}")
    print("\n".join(problems) if problems else "complete: every tensor is there, none is extra, all shapes fit")
    return 1 if problems else 0


def _millions(shapes: Iterable[tuple[int, ...]]) -> str:
    return f"{sum(map(math.prod, shapes)) / 1_000_000:.1f} M parameters"


def _print_adapters(pretrained: Pretrained, num_parameters: str) -> None:
    lora = pretrained.cfg.lora
    if not lora.rank:
        return
    base = "saved with them"
    if lora.leaves_out_base:
        record = read_base(pretrained.folder)
        base = f"not in it, but was in {record.source} (SHA-256 {record.sha256})"
    print(f"adapters: {num_parameters}, rank {lora.rank}, alpha {lora.alpha:g}, of {', '.join(lora.targets)}")
    print(f"base: {base}")


def _print_model(model: ModelConfig, num_parameters: str) -> None:
    language = model.language
    print(
        f"language: {language.num_layers} layers of {language.hidden_size}, {language.num_heads} heads over "
        f"{language.num_kv_heads} key/value heads, MLP {language.ffn_hidden_size}, vocabulary {language.vocab_size}"
    )
    print("\n".join(family_of(model).describe(model)))
    print(f"embedder: {num_parameters}, vocabulary padded as on one process")


def _inspect_hf(pretrained: Pretrained, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    weights = open_hf(pretrained.folder)
    files = sorted({info.file.name for info in weights.files.tensors.values()})
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in weights.dtypes.values()})
    num_bytes = sum(info.num_bytes for info in weights.files.tensors.values())
    print(f"{pretrained.folder}: Hugging Face folder, layout {weights.config.layout}, {', '.join(dtypes)}")
    print(f"weights: {len(weights.names)} tensors, {num_bytes / 1e9:.3f} GB in {', '.join(files)}")
    if weights.unused:
        print(f"kept for export, not used by the embedder: {', '.join(weights.names[name] for name in weights.unused)}")
    print("".join(f"{note}\n" for note in weights.config.notes), end="")
    return weights.problems(hf_shapes(shapes, weights.format.rules(weights.config.model)))


def _inspect_checkpoint(pretrained: Pretrained, embedder: object, groups: ProcessGroupCollection) -> list[str]:
    check_all(pretrained.folder)
    with folders.reading(pretrained.folder), safe_reads():
        held = dist_checkpointing.load_tensors_metadata(str(pretrained.folder))
    state = sharded_parameters(embedder, state_metadata(groups))
    apply_factories(state)
    is_held = is_adapter if pretrained.cfg.lora.leaves_out_base else lambda name: True
    values = [value for name, value in state.items() if is_held(name)]
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    expected = {part.key: tuple(part.global_shape) for part in parts if isinstance(part, ShardedTensor)}
    others = {prefix: [key for key in held if key.startswith(prefix)] for prefix in OTHER_KEYS}
    kinds = [f", {len(keys)} of {prefix.rstrip('.')}" for prefix, keys in others.items() if keys]
    print(f"{pretrained.folder}: checkpoint, {pretrained.cfg.model.precision}, {len(held)} tensors{''.join(kinds)}")
    weights = {key: tuple(held[key].global_shape) for key in held if not key.startswith(OTHER_KEYS)}
    problems = [f"missing: {key} {list(expected[key])}" for key in sorted(expected.keys() - weights)]
    for key, shape in sorted(weights.items()):
        if key not in expected:
            problems.append(f"extra: {key} {list(shape)}")
        elif shape != expected[key] and "word_embeddings" not in key:  # padded for the parallel layout it was saved at
            problems.append(f"wrong shape: {key} {list(shape)}, config.yaml makes it {list(expected[key])}")
    return problems
