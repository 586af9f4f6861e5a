"""LLaVA-OneVision, the family that LLaVE is made of: SigLIP, a two-layer projector and a Qwen2 decoder."""

from megatron_llave.models.family import Family
from megatron_llave.models.hf import side_files
from megatron_llave.models.hf.weights import HfFormat
from megatron_llave.models.llava_onevision import hf_checks, hf_config, hf_files, hf_reference, hf_weights, processor
from megatron_llave.models.llava_onevision.cost import LlaveCost
from megatron_llave.models.llava_onevision.embedder import LlaveEmbedder

FAMILY = Family(
    name="llava_onevision",
    embedder=LlaveEmbedder,
    build_processor=processor.build_processor,
    image_lengths=processor.image_lengths,
    video_lengths=processor.video_lengths,
    count_tokens=processor.count_tokens,
    input_settings=processor.input_settings,
    describe=processor.describe,
    check=processor.check_model,
    cost=LlaveCost(),
    hf=HfFormat(
        layouts=hf_config.LAYOUTS,
        presets=("0.5b", "2b", "7b"),
        layout_of=hf_config.layout_of,
        read_config=hf_config.read_config,
        build_config=hf_config.build_config_json,
        rules=hf_weights.rules,
        canonical_name=hf_weights.canonical_name,
        layout_name=hf_weights.layout_name,
        module_name=hf_weights.module_name,
        embedding=hf_weights.HF_EMBEDDING,
        lm_head=hf_weights.LM_HEAD,
        is_unused=hf_weights.is_unused,
        unused_shapes=hf_weights.unused_shapes,
        can_hold=hf_config.can_hold,
        embedding_rows=hf_config.embedding_rows,
        room_for_tokens=hf_files.room_for_image_tokens,
        keep_files=side_files.keep_side_files,
        write_files=hf_files.write_side_files,
        reference_model=hf_reference.reference_model,
        reference_inputs=hf_reference.reference_inputs,
        check_files=hf_checks.check_files,
    ),
)
