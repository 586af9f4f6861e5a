"""README.md of an exported folder: its header for the hub, what the model is, and how it embeds.

convert/training_record.py appends how it was trained.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_llave.config.data import DataConfig
from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json
from megatron_llave.hub import is_pinned

CARD_TRANSFORMERS = """### transformers

Needs torch, torchvision, pillow, and transformers, {version}.

```python
import torch
from PIL import Image
from transformers import AutoProcessor, {architecture}

folder = "."  # this folder, or its name on the hub
processor = AutoProcessor.from_pretrained(folder)
model = {architecture}.from_pretrained(folder).eval()

HEAD = {head!r}
IMAGE = {image!r}
TAIL = {tail!r}


@torch.no_grad()
def embed(text, image=None{argument}):
    # 1. The prompt: an image comes before the text; the last token is the one that is pooled.
    prompt = {start} + ("" if image is None else IMAGE) + {text} + TAIL
    images = None if image is None else [image]
    inputs = processor(text=[prompt], images=images, return_tensors="pt").to(model.device, model.dtype)
{positions}    # 2. The last token of the last hidden state, which is after the final norm.
    state = model.model(**inputs).last_hidden_state[0, -1]
    # 3. Length 1.
    return torch.nn.functional.normalize(state.float(), dim=0)


query = embed("Find an image that matches the caption: a red square on white.")
target = embed("Represent the given image.", Image.new("RGB", (64, 48), "red"))
print(float(query @ target))
```
"""
CARD_TOOLS = """### sentence-transformers

Needs torchvision and sentence-transformers, 5.4 or newer (tested with 5.4, 6.0 and 6.2). {prompts}
Inputs of any length are taken as they are: `max_seq_length` has no effect, because
sentence-transformers would cut the end of the prompt, which is pooled, from an input with an image.

```python
{import_image}from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")  # this folder, or its name on the hub
query = model.encode("Find an image that matches the caption: a red square on white.")
{target}
print(float(model.similarity(query, target)))
```
{matryoshka}
### mteb

Needs sentence-transformers, and mteb, 2.0 or newer (tested with 2.26). It is told what the model takes.

```python
import mteb

model = mteb.SentenceTransformerEncoderWrapper(".")  # this folder, or its name on the hub
meta = model.mteb_model_meta
model.mteb_model_meta = meta.model_copy(update={{"name": "local/model", "modalities": {modalities}}})
results = mteb.evaluate(model, mteb.get_benchmark("{benchmark}"))
print([(result.task_name, result.get_score()) for result in results])
```

### vLLM

vLLM finds from modules.json that this is an embedding model, which pools the last token. What its
version 0.33 reads of this folder was checked; it has not been run on a GPU.

```python
{import_image}from vllm import LLM

HEAD = {head!r}
IMAGE = {image!r}
TAIL = {tail!r}

model = LLM(".", runner="pooling", max_model_len={max_length})
query = {start} + "Find an image that matches the caption: a red square on white." + TAIL
{vllm_target}
outputs = model.embed([query, target])
first, second = (output.outputs.embedding for output in outputs)
print(sum(a * b for a, b in zip(first, second)))
```
{serve}"""
CARD_SERVE = """
A server (`vllm serve FOLDER --runner pooling`) takes the same as `messages` of its `/v1/embeddings`: one message of the
user, whose content is an image and a text.
"""
CARD_MATRYOSHKA = """
The run trained the first {dims} numbers of an embedding as embeddings too:
`SentenceTransformer(".", truncate_dim={dim})`, or `dimensions` in a request to vLLM. Divide them by their length before
you compare dot products.
"""
MATRYOSHKA = "matryoshka_dimensions"
"""vLLM's key of config.json."""
POSITIONS = """    if "mm_token_type_ids" in inputs:  # visual tokens have the positions of texts
        inputs["mm_token_type_ids"].zero_()
"""
TEXTS_ALONE = """An input with an image is refused: in training visual tokens had
the positions of texts, and here they would get those of rows and columns."""
ST_IMAGE = """image = Image.new("RGB", (64, 48), "red")
target = model.encode({"text": "Represent the given image.", "image": image})"""
ST_TEXT = """target = model.encode("A red square on white.")"""
VLLM_IMAGE = """image = {{"image": Image.new("RGB", (64, 48), "red")}}
target = {{"prompt": {start} + IMAGE + "Represent the given image." + TAIL, "multi_modal_data": image}}"""
VLLM_TEXT = """target = {start} + "A red square on white." + TAIL"""
CARD_STEPS = """1. The prompt is {head!r}, the text, {tail!r}.
   An image comes before the text, as {image!r}.
2. The embedding is the last token's hidden state after the decoder's final norm,
3. divided by its L2 norm."""


@dataclass(frozen=True)
class PromptText:
    """A prompt as text, for the code of a card."""

    head: str
    """What comes first; with an instruction, a format for it."""
    image: str
    """What stands for an image, before the text."""
    tail: str
    """What closes the prompt."""
    instruction: str | None = None
    """The instruction of inputs that have none of their own; None: the prompt has no place for one."""
    has_image_positions: bool = True
    """Whether visual tokens have the positions that transformers gives them."""
    is_stripped: bool = False
    """Whether a text loses the white space around it."""


def how_to_embed(
    prompt: PromptText, architecture: str, version: str, has_own_template: bool, training_config: str | None
) -> list[str]:
    """Return the parts of a card with code for each tool, of a folder with a processor.

    Args:
        prompt: of the model.
        architecture: transformers' class of the model.
        version: of transformers that is needed.
        has_own_template: whether transformers and vLLM take the chat template of the prompt.
        training_config: the run's configuration in YAML; None: there was no run.
    """
    run = OmegaConf.create(training_config or "")
    dims = OmegaConf.select(run, "loss.matryoshka_dims") or []
    takes = prompt.instruction is not None
    given = f"the system message that is otherwise {prompt.instruction!r}" if takes else "put before the text"
    texts = {
        "text": "text.strip()" if prompt.is_stripped else "text",
        "head": prompt.head,
        "image": prompt.image,
        "tail": prompt.tail,
        "argument": f", instruction={prompt.instruction!r}" if takes else "",
        "start": "HEAD.format(instruction)" if takes else "HEAD",
    }
    has_images = prompt.has_image_positions
    positions = "" if has_images else POSITIONS
    code = CARD_TRANSFORMERS.format(architecture=architecture, version=version, positions=positions, **texts)
    start = f"HEAD.format({prompt.instruction!r})" if takes else "HEAD"
    tools = CARD_TOOLS.format(
        prompts=f"A `prompt` of `encode` is {given}." + ("" if has_images else f"\n{TEXTS_ALONE}"),
        matryoshka=CARD_MATRYOSHKA.format(dims=", ".join(map(str, dims)), dim=min(dims)) if dims else "",
        max_length=OmegaConf.select(run, "data.max_length") or DataConfig.max_length,
        serve=CARD_SERVE if has_own_template and has_images else "",
        import_image="from PIL import Image\n" if has_images else "",
        target=ST_IMAGE if has_images else ST_TEXT,
        modalities='["text", "image"]' if has_images else '["text"]',
        benchmark="MIEB(lite)" if has_images else "MTEB(eng, v2)",
        vllm_target=(VLLM_IMAGE if has_images else VLLM_TEXT).format(start=start),
        **texts | {"start": start},
    )
    return [*code.splitlines(), "", *tools.splitlines()]


def config_of_run(config: Mapping[str, Any], training_config: str | None) -> dict[str, Any]:
    """Return a config.json that lists the prefixes of embeddings that the run trained; vLLM gives out no others.

    Args:
        config: content of config.json.
        training_config: the run's configuration in YAML; None: there was no run, and nothing changes.
    """
    if training_config is None:
        return dict(config)
    dims = OmegaConf.select(OmegaConf.create(training_config), "loss.matryoshka_dims") or []
    others = {key: value for key, value in config.items() if key != MATRYOSHKA}
    return others | ({MATRYOSHKA: [int(dim) for dim in dims]} if dims else {})


def steps_to_embed(prompt: PromptText) -> list[str]:
    """Return the part of a card that says how a model embeds, for a folder without a processor."""
    head = prompt.head if prompt.instruction is None else prompt.head.format(prompt.instruction)
    return [CARD_STEPS.format(head=head, image=prompt.image, tail=prompt.tail)]


def model_card(
    header: Sequence[str],
    base: str | None,
    tags: Sequence[str],
    what: Sequence[str],
    embed: Sequence[str],
) -> str:
    """Return the card, but for its last sections about the training.

    Args:
        header: lines of the header before its tags.
        base: the hub name of the model that this one was made of, if it is known.
        tags: further tags of the hub.
        what: lines about the model.
        embed: lines about how to embed with it.
    """
    top = [
        *header,
        *([f"base_model: {base}"] if base else []),
        "tags:",
        *(f"- {tag}" for tag in ("embedding", "multimodal", *tags)),
    ]
    lines = ["---", *top, "---", "", "# Multimodal embedding model", "", *what, "", "## How to embed", "", *embed]
    return "\n".join(lines) + "\n"


def base_model(source: str | Path | None, owners: str, training_config: str | None = None) -> str | None:
    """Return the hub name of the model that a run began from, or else the one that config.json of the source gives.

    `owners` is a pattern of names of the hub: an `_name_or_path` of another shape may be a local folder.
    """
    init = OmegaConf.select(OmegaConf.create(training_config or ""), "checkpoint.init")
    if init is not None and is_pinned(init):
        return init.split("@")[0]
    file = None if source is None else Path(source) / "config.json"
    name = read_json(file, error=CheckpointError).get("_name_or_path") if file is not None and file.is_file() else None
    return name if re.fullmatch(rf"({owners})/[\w.-]+", str(name)) else None


def prompt_of(training_config: str | None) -> str | None:
    """Return data.prompt of a run's configuration in YAML; None: there was no run."""
    return None if training_config is None else OmegaConf.select(OmegaConf.create(training_config), "data.prompt")
