"""The files that make an exported folder a model of sentence-transformers, which vLLM and mteb take as well.

modules.json says what follows the transformer: the last token is pooled, and divided by its length. Without the
modalities in sentence_bert_config.json, sentence-transformers would take the folder for a model of texts alone.

sentence-transformers writes each input as one user's message, with what it calls a prompt as a system message before
it, and images in the order of the caller's keys. So it gets a chat template of its own, in which instruction, images
and text have the places that they had in training. It cuts no input: of an input with an image it would cut the end of
the template, and pool another token without an error.

Sources: sentence_transformers/base/modules/transformer.py and sentence_transformer/modules/pooling.py (6.2.0);
vllm/transformers_utils/config.py (0.33.0), get_pooling_config.
"""

from collections.abc import Mapping
from pathlib import Path

from megatron_llave.files import write_json

MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
"""Class in sentence_transformers.models -> its folder. All versions know these names, and so does vLLM."""
PARTS = (
    "{% set ns = namespace(instruction='', text='', images=[]) %}"
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% for part in ([{'type': 'text', 'text': content}] if content is string else content) %}"
    "{% if part['type'] == 'text' and message['role'] == 'system' %}"
    "{% set ns.instruction = ns.instruction + part['text'] %}"
    "{% elif part['type'] == 'text' and message['role'] == 'user' %}"
    "{% set ns.text = ns.text + part['text'] %}"
    "{% elif part['type'] in ('image', 'video') %}"
    "{% set ns.images = ns.images + [part['type']] %}"
    "{% endif %}"
    "{% endfor %}"
    "{% endfor %}"
)
"""The beginning of a template: ns.instruction, ns.text and ns.images, a list of kinds, are those of the input."""


def refuse_images(most: int, why: str) -> str:
    """Return what a template has after PARTS if inputs may have at most so many images."""
    return f"{{% if ns.images | length > {most} %}}{{{{ raise_exception({why!r}) }}}}{{% endif %}}"


def write_sentence_transformers(
    out: Path, width: int, template: str, prompts: Mapping[str, str], kinds: tuple[str, ...] = ("text", "image")
) -> None:
    """Write modules.json and the configurations that it needs into a folder with a model and a processor.

    Args:
        out: an existing folder.
        width: number of channels of an embedding.
        template: of an input in Jinja; PARTS and what it makes of them.
        prompts: instruction by name; `query` and `document` are those of encode_query and encode_document.
        kinds: what inputs consist of.
    """
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(MODULES.items())
    ]
    write_json(out / "modules.json", modules)
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {kind: forward for kind in kinds} | {"message": {**forward, "format": "structured"}},
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"text": {"truncation": False}, "chat_template": {"chat_template": template}},
    }
    write_json(out / "sentence_bert_config.json", transformer)
    (out / MODULES["Pooling"]).mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": width, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    write_json(out / MODULES["Pooling"] / "config.json", pooling)
    model = {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": "", **prompts},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_json(out / "config_sentence_transformers.json", model)
