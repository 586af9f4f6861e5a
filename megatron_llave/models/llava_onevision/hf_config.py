"""config.json of Hugging Face folders <-> ModelConfig, in three layouts.

transformers reads and writes llava_onevision; llava_qwen is the layout of LLaVA-NeXT and of the released LLaVE
checkpoints. A model without grids has one tile for an image and image_newline after it, which llava_onevision cannot
express; transformers' llava can, with image_newline as the embedding of a token of its own. A missing key has the value
that the code of the layout gives it, and values that we cannot run are refused. hf_weights.py has the names of the
weights, hf_files.py the other files of the folder.

Sources: transformers' configuration_llava_onevision.py, configuration_llava.py, configuration_qwen2.py and
configuration_siglip.py (4.4x to 5.x); llava_arch.py, mm_utils.py, siglip_encoder.py and
multimodal_projector/builder.py of the official LLaVE repository.
"""

import ast
import copy
import re
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from typing import Any

from megatron_llave.config.checks import require_same_model
from megatron_llave.config.data import DataConfig
from megatron_llave.config.model import MOST_TILES, ModelConfig, VisionConfig
from megatron_llave.config.presets import SIGLIP_SO400M
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import one_of, require
from megatron_llave.models.hf.config_json import DTYPE_KEYS, DTYPES, HfConfig, Section
from megatron_llave.models.hf.decoder_config import language_section, read_language
from megatron_llave.models.llava_onevision.hf_keys import (
    DECODER,
    IMAGE_TOKENS,
    LLAVA_FIXED,
    ONEVISION_FIXED,
    QWEN_FIXED,
    QWEN_REFUSED,
    QWEN_UNUSED,
    QWEN_VISION_SECTION,
    TOP_FIXED,
    VISION_FIXED,
    VISION_KEYS,
)

LAYOUTS = ("llava_onevision", "llava", "llava_qwen")
NEWLINE_TOKEN = "image_newline_token_id"
"""The key of a llava file that says which row of the embedding is image_newline."""
MOST_GRIDS = 1024
"""Number of grids that a file may list; the released models have at most 36."""
LONGEST_LIST = 4000
"""Number of characters of a list of grids that is written as a string."""
SIGLIP_NAME = "siglip-so400m-patch14-384"


def layout_of(values: Mapping[str, Any]) -> str | None:
    """The layout of a folder with this config.json; None: it is of another family."""
    kind = values.get("model_type")
    if kind == "llava":  # as lmms-lab's LLaVA-OneVision checkpoints spell it, and transformers LLaVA 1.5
        if "LlavaQwenForCausalLM" in (values.get("architectures") or []):
            return "llava_qwen"
        return "llava" if NEWLINE_TOKEN in values else None
    return kind if kind in LAYOUTS else None


def read_config(top: Section) -> HfConfig:
    """What a config.json says.

    Raises:
        CheckpointError: it describes a model that we cannot run.
    """
    return {"llava_onevision": _read_onevision, "llava": _read_llava}.get(layout_of(top.values), _read_qwen)(top)


def can_hold(model: ModelConfig, layout: str) -> bool:
    """Whether folders of this layout can describe a model with its grids, or with none."""
    return layout == "llava_qwen" or (layout == "llava_onevision") == bool(model.image_grids)


def embedding_rows(values: Mapping[str, Any]) -> dict[str, int]:
    """Return which tensor, by canonical name, is which row of the embedding in a folder with this config.json."""
    return {"image_newline": values[NEWLINE_TOKEN]} if layout_of(values) == "llava" else {}


def _says(
    layout: str, model: ModelConfig, top: Section, tied: bool, vision_layers: int, newline: str = "one_token"
) -> HfConfig:
    run = RunConfig(model=model, data=DataConfig(video_newline=newline))
    return HfConfig(layout, run, tied, top.dtype(), vision_layers, top.values)


def _read_onevision(top: Section) -> HfConfig:
    top.check(ONEVISION_FIXED | TOP_FIXED)
    text = top.inner("text_config") or Section(top.file, "text_config.", {})
    text.check({"model_type": ("qwen2", "qwen2")})
    section = top.inner("vision_config")
    vision = VisionConfig(**SIGLIP_SO400M) if section is None else _read_vision(section)
    layers = vision.num_layers
    selected = top.values.get("vision_feature_layer", -1)
    right = f"one layer of the vision encoder's {layers}: {-layers} to -1, or 1 to {layers}"
    if not isinstance(selected, int) or isinstance(selected, bool):
        raise top.refuse("vision_feature_layer", right)
    # The states to choose from are the embedded patches, and then the output of each layer.
    vision.num_layers = selected if selected >= 0 else layers + 1 + selected
    if not 1 <= vision.num_layers <= layers:
        raise top.refuse("vision_feature_layer", right)
    pinpoints = top.values.get("image_grid_pinpoints")
    tile = vision.image_size
    if pinpoints is None:  # transformers' own list is for tiles of 384 px
        pinpoints = [[384 * rows, 384 * columns] for rows, columns in product(range(1, 7), repeat=2)]
    model = ModelConfig(
        vision=vision,
        language=read_language(text, DECODER),
        image_grids=[[columns, rows] for rows, columns in _grids(top, pinpoints, tile)],
        anyres_max_tiles=_max_tiles(top, "vision_aspect_ratio", "anyres_max_9"),
    )
    # transformers 4.x ties weights by the key of the decoder and writes false above it; 5.x ties if either key is true.
    tied = bool(top.values.get("tie_word_embeddings")) or bool(text.values.get("tie_word_embeddings"))
    return _says("llava_onevision", model, top, tied, layers)


def _read_llava(top: Section) -> HfConfig:
    top.check(LLAVA_FIXED | TOP_FIXED)
    sections = [top.inner(key) or Section(top.file, f"{key}.", {}) for key in ("text_config", "vision_config")]
    for section, missing, right in zip(sections, ("llama", "clip_vision_model"), ("qwen2", "siglip_vision_model")):
        section.check({"model_type": (missing, right)})
    text, vision = sections
    model = ModelConfig(vision=_read_vision(vision), language=read_language(text, DECODER))
    for key in ("image_token_index", NEWLINE_TOKEN):
        token = top.values.get(key)
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < model.language.vocab_size:
            raise top.refuse(key, f"a token id below vocab_size={model.language.vocab_size}")
    tied = bool(top.values.get("tie_word_embeddings")) or bool(text.values.get("tie_word_embeddings"))
    return _says("llava", model, top, tied, model.vision.num_layers)


def _read_qwen(top: Section) -> HfConfig:
    top.check(QWEN_FIXED | TOP_FIXED | {key: (QWEN_UNUSED[key], QWEN_UNUSED[key]) for key in QWEN_REFUSED})
    section = top.inner(QWEN_VISION_SECTION)
    if section is not None:
        vision = _read_vision(section)
    elif SIGLIP_NAME in str(top.values.get("mm_vision_tower")):
        vision = VisionConfig(**SIGLIP_SO400M)
    else:
        raise top.refuse("mm_vision_tower", f"a name with {SIGLIP_NAME}, or vision_config must hold its sizes")
    top.check({"mm_hidden_size": (vision.hidden_size, vision.hidden_size)})
    model = ModelConfig(vision=vision, language=read_language(top, DECODER))
    ratio = top.values.get("image_aspect_ratio", "square")
    if ratio != "square":  # square: one squashed tile
        model.anyres_max_tiles = None if ratio == "anyres" else _max_tiles(top, "image_aspect_ratio", "square")
        pinpoints = _written_pinpoints(top, vision.image_size)
        model.image_grids = [[columns, rows] for columns, rows in _grids(top, pinpoints, vision.image_size)]
    tied = bool(top.values.get("tie_word_embeddings"))
    newline = top.values.get("mm_newline_position", "one_token")
    return _says("llava_qwen", model, top, tied, vision.num_layers, newline)


def _read_vision(section: Section) -> VisionConfig:
    section.check(VISION_FIXED)
    return VisionConfig(**{name: section.number(key, default) for name, (key, default) in VISION_KEYS.items()})


def _max_tiles(top: Section, key: str, default: str) -> int:
    """Return the N of anyres_max_N."""
    match = re.fullmatch(r"anyres_max_([1-9]\d*)", str(top.values.get(key, default)))
    if match is None:
        others = " or ".join(["anyres_max_N"] if key == "vision_aspect_ratio" else ["anyres_max_N", "anyres", "square"])
        raise top.refuse(key, f"{others}, with a number N of at least 1")
    return int(match[1])


def _written_pinpoints(top: Section, tile: int) -> Any:
    """Return the pinpoints of llava_qwen, pixels; a string is a range "(1x1),...,(2x2)" in tiles, or a written list."""
    written = top.values.get("image_grid_pinpoints")
    if not isinstance(written, str):
        return written
    if len(written) > LONGEST_LIST:
        raise top.refuse("image_grid_pinpoints", f"a string of at most {LONGEST_LIST} characters")
    if "x" in written:
        ends = re.findall(r"\((\d+)x(\d+)\)", written)
        if not ends:
            raise top.refuse("image_grid_pinpoints", 'a list of pairs, or a range like "(1x1),...,(2x2)"')
        (left, upper), (right, lower) = ([int(end) for end in pair] for pair in (ends[0], ends[-1]))
        if (right - left + 1) * (lower - upper + 1) > MOST_GRIDS:
            raise top.refuse("image_grid_pinpoints", f"a range of at most {MOST_GRIDS} grids")
        # As in the official repository: every grid of the rectangle, whatever is between its ends, widths outermost.
        return [[i * tile, j * tile] for i in range(left, right + 1) for j in range(upper, lower + 1)]
    try:
        return ast.literal_eval(written)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise top.refuse("image_grid_pinpoints", "a list of pairs") from error


def _grids(top: Section, pinpoints: Any, tile: int) -> list[list[int]]:
    """Convert pixels to tiles. The order of the pairs, and within them, stays, since it decides between equals."""
    is_list = isinstance(pinpoints, list | tuple) and 0 < len(pinpoints) <= MOST_GRIDS
    pairs = [list(pair) if isinstance(pair, list | tuple) else [] for pair in pinpoints] if is_list else [[]]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(side, int) and side >= tile and side % tile == 0 for side in pair):
            right = f"a list of at most {MOST_GRIDS} pairs of multiples of the tile size, {tile} pixels"
            raise top.refuse("image_grid_pinpoints", right)
        if pair[0] * pair[1] > MOST_TILES * tile**2:
            raise top.refuse("image_grid_pinpoints", f"a list of grids of at most {MOST_TILES} tiles")
    return [[side // tile for side in pair] for pair in pairs]


def build_config_json(
    model: ModelConfig, layout: str, tied: bool, dtype: str | None, source: HfConfig | None = None
) -> dict:
    """Return the config.json of a folder with this model's weights.

    With a source of the same layout, all keys stay except those that no longer describe the model; the vision encoder
    keeps all its layers, also those that are not run. rope_theta is added where only transformers 5.x would find it.
    With a source of the other layout, token ids, context length and the like are copied; without a source they are
    those of Qwen2. In both of these cases the vision encoder has only the layers that are run.

    Args:
        model: sizes and grids. llava_onevision needs grids, and anyres_max_tiles=None becomes a number so high that it
            has no effect; llava takes none.
        layout: one of LAYOUTS.
        tied: whether the embedding is the vocabulary projection too, so that the weights hold it once.
        dtype: type of the weights, float32, bfloat16 or float16; None: that of the source, if it has one.
        source: the config.json that the weights were imported with.

    Raises:
        ConfigError: the layout cannot describe the model, or the source is of another model.
    """
    one_of("layout", layout, LAYOUTS)
    require(dtype in (None, *DTYPES), f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    grids = list(map(list, model.image_grids))
    others = " or ".join(other for other in LAYOUTS if can_hold(model, other))
    require(can_hold(model, layout), f"model.image_grids={grids} has no place in format {layout}; give {others}")
    if source is not None:
        require_same_model(model, source.model, "the folder the weights came from")
        if source.layout == layout:
            return _updated(model, tied, dtype, source)
    language = _language_section(model, tied, source)
    raw = {} if source is None else source.raw
    if layout == "llava_qwen":
        made = _qwen_config(model, raw, language)
    else:
        own = _onevision_keys(model, raw) if layout == "llava_onevision" else _llava_keys(model, raw)
        made = own | {
            "text_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **language},
            "tie_word_embeddings": tied,
            "vision_config": _vision_section(model.vision),
            "vision_feature_layer": -1,
        }
    dtype = dtype or (source and source.dtype)
    return made | ({} if dtype is None else dict.fromkeys(DTYPE_KEYS, dtype))


def _updated(model: ModelConfig, tied: bool, dtype: str | None, source: HfConfig) -> dict:
    """Return the source's config.json with only those keys changed that do not describe the model."""
    made, was = copy.deepcopy(source.raw), source.model
    is_onevision = source.layout == "llava_onevision"
    if is_onevision and made.get("text_config") is None:
        made["text_config"] = {"model_type": "qwen2"}
    text = made if source.layout == "llava_qwen" else made["text_config"]
    if "rope_parameters" in text:
        text.setdefault("rope_theta", model.language.rope_theta)
    if model.language.vocab_size != was.language.vocab_size:
        text["vocab_size"] = model.language.vocab_size
    if is_onevision:
        made["image_token_index"], made["video_token_index"] = _image_tokens(made, model)
    if tied != source.tied:
        text["tie_word_embeddings"] = made["tie_word_embeddings"] = tied
    if dtype not in (None, source.dtype):
        for section in (text, made.get("vision_config") or {}):
            section |= {key: dtype for key in DTYPE_KEYS if key in section}
        made |= dict.fromkeys(DTYPE_KEYS, dtype)
    grids = (model.image_grids, model.anyres_max_tiles)
    if source.layout != "llava" and grids != (was.image_grids, was.anyres_max_tiles):
        made |= _image_keys(model, source.layout)
    return made


def _image_tokens(raw: dict, model: ModelConfig) -> tuple[int, int]:
    """Return the ids of <image> and <video>: the source's, else Qwen2's, else the last two that have embedding rows."""
    rows = model.language.vocab_size
    for image, video in (map(raw.get, IMAGE_TOKENS), IMAGE_TOKENS.values()):
        if all(isinstance(token, int) and 0 <= token < rows for token in (image, video)):
            return image, video
    return rows - 1, rows - 2


def _image_keys(model: ModelConfig, layout: str) -> dict:
    """Return the keys that say how an image is cut, in pixels and in the layout's order of width and height."""
    tile, most = model.vision.image_size, model.anyres_max_tiles
    if layout == "llava_onevision":
        pinpoints = [[rows * tile, columns * tile] for columns, rows in model.image_grids]
        never = max(columns * rows for columns, rows in model.image_grids)
        return {"image_grid_pinpoints": pinpoints, "vision_aspect_ratio": f"anyres_max_{most or never}"}
    if not model.image_grids:
        return {"image_grid_pinpoints": None, "image_aspect_ratio": "square"}
    pinpoints = [[columns * tile, rows * tile] for columns, rows in model.image_grids]
    return {"image_grid_pinpoints": pinpoints, "image_aspect_ratio": f"anyres_max_{most}" if most else "anyres"}


def _language_section(model: ModelConfig, tied: bool, source: HfConfig | None) -> dict:
    """Return the keys of Qwen2Config."""
    raw = {} if source is None else source.raw
    given = raw if source is None or source.layout == "llava_qwen" else raw.get("text_config") or {}
    return language_section(model.language, DECODER, given, tied, mrope={})


def _vision_section(vision: VisionConfig) -> dict:
    values = asdict(vision)
    fixed = {key: right for key, (_, right) in VISION_FIXED.items()}
    return {key: values[name] for name, (key, _) in VISION_KEYS.items()} | fixed | {"vision_use_head": False}


def _onevision_keys(model: ModelConfig, raw: dict) -> dict:
    image, video = _image_tokens(raw, model)
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_token_index": image,
        "model_type": "llava_onevision",
        **{key: right for key, (_, right) in ONEVISION_FIXED.items()},
        "use_image_newline_parameter": True,
        "video_token_index": video,
        **_image_keys(model, "llava_onevision"),
    }


def _llava_keys(model: ModelConfig, raw: dict) -> dict:
    image, _ = _image_tokens(raw, model)
    rows = model.language.vocab_size
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": model.vision.patches_per_side**2,
        "image_token_index": image,
        NEWLINE_TOKEN: rows - 2 if image == rows - 1 else rows - 1,
        "model_type": "llava",
        **{key: right for key, (_, right) in LLAVA_FIXED.items()},
    }


def _qwen_config(model: ModelConfig, raw: dict, language: dict) -> dict:
    """Return the keys of the released configurations. Only the official training code reads alpha and logit_scale."""
    is_released_encoder = model.vision == VisionConfig(**SIGLIP_SO400M)
    image, _ = _image_tokens(raw, model)
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        **language,
        **{key: right for key, (_, right) in QWEN_FIXED.items()},
        **QWEN_UNUSED,
        "image_token_index": image,
        "mm_hidden_size": model.vision.hidden_size,
        "mm_vision_tower": f"google/{SIGLIP_NAME}" if is_released_encoder else "siglip",
        "tokenizer_model_max_length": language["max_position_embeddings"],
        **_image_keys(model, "llava_qwen"),
        **({} if is_released_encoder else {QWEN_VISION_SECTION: _vision_section(model.vision)}),
    }
