"""The HfFormat of a Qwen-VL family, made of what it has of its own."""

from functools import partial

from megatron_llave.models.hf.side_files import room_for_tokens
from megatron_llave.models.hf.weights import HfFormat
from megatron_llave.models.qwen_vl import hf_checks, hf_config, hf_files, hf_reference, hf_weights
from megatron_llave.models.qwen_vl.hf_files import HfProcessor
from megatron_llave.models.qwen_vl.hf_keys import SPECIAL_TOKENS, HfKeys
from megatron_llave.models.qwen_vl.hf_weights import HfNames

TOKENS = tuple(token for token, _ in SPECIAL_TOKENS.values())


def hf_format(keys: HfKeys, names: HfNames, files: HfProcessor, presets: tuple[str, ...]) -> HfFormat:
    """Return how models of a family are stored in Hugging Face folders.

    Args:
        keys: of config.json.
        names: of the weights.
        files: of the processor.
        presets: values of model.preset that such folders may be expected to have.
    """
    return HfFormat(
        layouts=(keys.layout,),
        presets=presets,
        layout_of=partial(hf_config.layout_of, keys=keys),
        read_config=partial(hf_config.read_config, keys=keys),
        build_config=partial(hf_config.build_config_json, keys=keys),
        rules=partial(hf_weights.rules, names=names),
        canonical_name=hf_weights.canonical_name,
        layout_name=partial(hf_weights.layout_name, names=names),
        embedding=hf_weights.HF_EMBEDDING,
        lm_head=hf_weights.LM_HEAD,
        is_unused=hf_weights.is_unused,
        unused_shapes=lambda model: {},
        room_for_tokens=lambda model, layout, folder: room_for_tokens(model, folder, TOKENS),
        keep_files=hf_files.keep_files,
        write_files=partial(hf_files.write_files, keys=keys, files=files),
        reference_model=partial(hf_reference.reference_model, keys=keys),
        reference_inputs=partial(hf_reference.reference_inputs, files=files),
        check_files=partial(hf_checks.check_files, files=files),
    )
