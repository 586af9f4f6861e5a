"""Embedding models: building blocks, Hugging Face formats, one folder per model family, and the registry of families.

The rest of the package asks this file for what it needs and knows no family: model.family of the configuration, or the
config.json of a Hugging Face folder, says which one is meant. A new family is a folder here and a line in the loop
below; one that is kept outside of the package calls `register_family` before the configuration is read.
"""

from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn import Module

from megatron_llave.config.data import DataConfig
from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.presets import PRESETS
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.data.packing import Processor
from megatron_llave.errors import CheckpointError, one_of, require
from megatron_llave.models import llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl
from megatron_llave.models.blocks.initialization import initialize_parameters
from megatron_llave.models.blocks.layer_specs import transformer_engine
from megatron_llave.models.family import Family
from megatron_llave.models.hf.config_json import HfConfig, read_config_json
from megatron_llave.models.hf.peft_files import ADAPTER_CONFIG
from megatron_llave.models.hf.weights import HfWeights, open_weights
from megatron_llave.models.lora import add_adapters, initialize_adapters

FAMILIES: dict[str, Family] = {}
"""Families by name, the value of model.family."""


def register_family(family: Family) -> None:
    """Make a family known under its name, and its presets under theirs.

    Raises:
        ConfigError: the name of the family, of a preset or of a layout of its folders is taken.
    """
    layouts = {layout for known in FAMILIES.values() for layout in known.hf.layouts}
    taken = [*({family.name} & FAMILIES.keys()), *(family.presets.keys() & PRESETS), *(layouts & {*family.hf.layouts})]
    require(not taken, f"model family {family.name}: the name {''.join(taken[:1])} is taken")
    FAMILIES[family.name] = family
    PRESETS.update({name: {"family": family.name, **sizes} for name, sizes in family.presets.items()})


for built_in in (llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl):
    register_family(built_in.FAMILY)


def family_of(model: ModelConfig) -> Family:
    """Return the family of a model.

    Raises:
        ConfigError: no family of that name is registered, or it has no models of these sizes.
    """
    one_of("model.family", model.family, tuple(FAMILIES))
    family = FAMILIES[model.family]
    family.check(model)
    return family


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    groups: ProcessGroupCollection,
    device: torch.device,
    seed: int | None,
    lora: LoraConfig = LoraConfig(),
) -> list[Module]:
    """Return this rank's chunks (`virtual_pipeline` many), randomly initialised: the same model at every layout.

    With seed None the parameters are left unfilled, for weights that are loaded. With a rank, `lora` adds adapters and
    freezes everything else.

    Raises:
        ConfigError: the family is unknown, model.kernels needs a package that is not installed, or lora.targets names a
            linear layer that the model does not have.
    """
    family = family_of(model)
    if model.kernels == "transformer_engine":
        transformer_engine()  # first, since megatron-core's own error would not name the key
    stage, last_stage, num_chunks = groups.pp.rank(), groups.pp.size() - 1, parallel.virtual_pipeline
    chunks = []
    for chunk in range(num_chunks):
        is_first = stage == 0 and chunk == 0
        is_last = stage == last_stage and chunk == num_chunks - 1
        chunk_index = chunk if num_chunks > 1 else None
        built = family.embedder(model, parallel, groups, is_first, is_last, chunk_index)
        if lora.rank:
            add_adapters(built, lora, family.hf.rules(model), groups.tp)
        # megatron-core makes some of the vision encoder in float32 whatever the configuration says.
        chunks.append(built.to(device=device, dtype=built.config.params_dtype))
    if seed is not None:
        initialize_parameters(chunks, groups.tp, seed)
        initialize_adapters(chunks, groups.tp, seed)
    return chunks


def model_without_memory(model: ModelConfig, groups: ProcessGroupCollection, lora: LoraConfig = LoraConfig()) -> Module:
    """Return the complete model as one chunk whose parameters have names, shapes and dtypes but no values.

    With a rank, `lora` adds adapters and freezes everything else. `groups` are those of a single process. Kernels are
    local, which need no GPU: checkpoints of all kernels have the same keys.
    """
    model = replace(model, kernels="local")
    with torch.device("meta"):
        embedder = family_of(model).embedder(model, ParallelConfig(), groups, True, True, None)
        if lora.rank:
            add_adapters(embedder, lora, family_of(model).hf.rules(model), groups.tp)
    return embedder.to(dtype=embedder.config.params_dtype)


def build_processor(data: DataConfig, model: ModelConfig) -> Processor:
    """Return the processor of a run, its tokenizer read from `data.tokenizer` or found in `data.path`.

    Raises:
        DataError: the tokenizer is missing or damaged.
        ConfigError: the family is unknown or has no such prompt, or the tokenizer does not fit the model.
    """
    family = family_of(model)
    require_prompt(family, data.prompt)
    return family.build_processor(data, model)


def require_prompt(family: Family, prompt: str) -> None:
    """Raise a ConfigError unless models of the family can have this value of data.prompt."""
    known = f"those of model.family={family.name}: {', '.join(family.prompts)}"
    require(prompt in family.prompts, f"data.prompt={prompt} is not one of {known}")


def read_hf_config(folder: str | Path, with_other_files: bool = True, with_adapter: bool = False) -> HfConfig:
    """Read config.json of a Hugging Face folder of any family, and check that its other files agree with it.

    Args:
        folder: an HF folder, or the assets of a checkpoint.
        with_other_files: whether files of the processor and the tokenizer are compared with config.json.
        with_adapter: whether the folder may have an adapter, which is added to the weights.

    Raises:
        CheckpointError: a file is missing or damaged, describes a model that we cannot run, or contradicts another.
    """
    top, adapter = read_config_json(folder), Path(folder) / ADAPTER_CONFIG
    if adapter.is_file() and not with_adapter:
        hint = "llave convert import merges it into the weights"
        raise CheckpointError(f"{adapter}: the folder has an adapter, which is not read here; {hint}")
    for family in FAMILIES.values():
        if family.hf.layout_of(top.values) is not None:
            config = family.hf.read_config(top)
            if with_other_files:
                config.notes.extend(family.hf.check_files(config, top.file.parent))
            return config
    layouts = [layout for family in FAMILIES.values() for layout in family.hf.layouts]
    others = [layout for layout in layouts if layout != top.values.get("model_type")]  # of llava only what we export
    raise top.refuse("model_type", " or ".join(others))


def open_hf(folder: str | Path, config: HfConfig | None = None, adapter: str | Path | None = None) -> HfWeights:
    """Read config.json, unless it is given, and the headers of the weights of a Hugging Face folder of any family.

    Args:
        folder: an HF folder.
        config: its config.json.
        adapter: folder with an adapter for the weights, which it is added to.

    Raises:
        CheckpointError: a file is missing, damaged or pickled, describes a model that we cannot run, or two tensors
            mean the same one; or the adapter is of another kind or for other weights.
    """
    config = config or read_hf_config(folder)
    return open_weights(folder, config, family_of(config.model).hf, adapter)
