"""The same inputs through a checkpoint and through transformers: `tools/convert_hf.py verify`.

Both get the same token ids and pixels. How visual tokens are unpadded, where newlines go, and everything after is each
side's own, so a difference is one of the models. The only file that needs transformers.
"""

import io
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from megatron_llave.batch import Side
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.data.image_files import decode_image
from megatron_llave.data.packing import IMAGE, EncodedSequence
from megatron_llave.distributed import process_groups
from megatron_llave.embedding.embedder import embed, load_model
from megatron_llave.errors import CheckpointError
from megatron_llave.models.blocks.siglip import normalise
from megatron_llave.models.llava_onevision.hf_config import HfConfig, build_config_json, read_config
from megatron_llave.models.llava_onevision.hf_weights import HF_EMBEDDING, LM_HEAD, POST_NORM, open_weights

try:
    import transformers
except ImportError:
    transformers = None

TOLERANCE = 3e-5
"""Largest difference between entries of a unit vector in float32; a wrong kind of GELU already makes 1.6e-4."""
INSTRUCTION = "<image>\nRepresent the given image."


def verify(hf: str | Path, checkpoint: str | Path, text: str, image: str | Path | None = None) -> int:
    """Embed a text and a picture through both sides in float32 and print how far apart they are.

    Args:
        hf: HF folder of either layout; transformers runs it, whatever its layout.
        checkpoint: a checkpoint or a run's folder (or another HF folder, read by us).
        text: embedded with the released prompt.
        image: picture file; None: a generated one that needs a grid of tiles and padding.

    Returns:
        0 when all entries are within TOLERANCE, else 1.

    Raises:
        UserError: transformers is missing, or one of the folders or the picture cannot be read.
    """
    if transformers is None:
        raise CheckpointError("verify compares with transformers, which is not installed: pip install transformers")
    config = read_config(hf)
    picture = _generated_picture(config.model.vision.image_size) if image is None else _read(image)
    sides = {"text": Side(text, []), "image": Side(INSTRUCTION, [picture])}
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["data.prompt=qwen", "model.precision=fp32"]
        found = find_pretrained(checkpoint).find_tokenizer() or find_pretrained(hf).find_tokenizer()
        if found is None:
            print("no tokenizer in either folder: the bytes of the text stand in for token ids")
        tokenizer = found or _byte_tokenizer(Path(folder) / "tokenizer.json")
        model = load_model(checkpoint, overrides=[*overrides, f"data.tokenizer={tokenizer}"])
    ours = embed(model, sides).cpu()
    encoded = [model.encoder.encode(side) for side in sides.values()]
    process_groups.destroy_model_parallel()
    model.chunks.clear()  # the two models are not in memory together
    theirs = _embed_with_transformers(_transformers_model(Path(hf), config), config, encoded, picture)
    return _print_differences(list(sides), ours, theirs)


def _print_differences(names: list[str], ours: Tensor, theirs: Tensor) -> int:
    differences = (ours - theirs).abs().amax(dim=1)
    cosines = F.cosine_similarity(ours.double(), theirs.double())
    for name, difference, cosine in zip(names, differences.tolist(), cosines.tolist()):
        print(f"{name}: largest difference {difference:.2e}, cosine {cosine:.8f}")
    same = bool((differences <= TOLERANCE).all())  # nan is not the same
    print(f"{'the same model' if same else 'NOT the same model'} (tolerance {TOLERANCE:.0e}, float32)")
    return 0 if same else 1


def _generated_picture(tile: int) -> bytes:
    """A wide PNG: it needs several tiles where there are grids, and padding that is cut off again."""
    height, width = tile * 3 // 4, tile * 7 // 4
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 255 // width, rows * 255 // height, (columns * rows) % 256], axis=-1)
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"picture {path} cannot be read: {error.strerror}") from error


def _byte_tokenizer(path: Path) -> Path:
    """A tokenizer.json with one id per byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.add_special_tokens(["<|im_end|>"])
    model.save(str(path))
    return path


def _transformers_model(folder: Path, config: HfConfig) -> torch.nn.Module:
    """LlavaOnevisionForConditionalGeneration in float32; it also takes llava_qwen's tensors under their other names."""
    model_class = transformers.LlavaOnevisionForConditionalGeneration
    if config.layout == "llava_onevision":
        return model_class.from_pretrained(folder, use_safetensors=True).float().eval()
    weights = open_weights(folder, config)
    wanted = [n for n in weights.names if not weights.is_unused(n) or n == LM_HEAD or n.startswith(POST_NORM)]
    tensors = {name: weights.read(name).float() for name in wanted}
    tied = config.tied or LM_HEAD not in tensors
    if tied:
        tensors[LM_HEAD] = tensors[HF_EMBEDDING]
    values = build_config_json(config.model, "llava_onevision", tied, "float32", config)
    theirs = transformers.LlavaOnevisionConfig.from_dict(values)
    return model_class.from_pretrained(None, config=theirs, state_dict=tensors).eval()


def _embed_with_transformers(
    model: torch.nn.Module, config: HfConfig, encoded: list[EncodedSequence], picture: bytes
) -> Tensor:
    """Unit vectors [n, h] float32: the last token of the last hidden state, which is after the final norm."""
    image_token = getattr(model.config, "image_token_id", None)
    image_token = model.config.image_token_index if image_token is None else image_token
    rows = []
    for sequence in encoded:
        layouts = iter(sequence.layouts)
        ids = [[image_token] * len(next(layouts)) if token == IMAGE else [token] for token in sequence.tokens]
        tokens = torch.tensor([[token for part in ids for token in part]])
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if sequence.tiles:
            width, height = decode_image(picture).size
            inputs["pixel_values"] = normalise(torch.from_numpy(sequence.tiles[0]))[None]  # [1, k, 3, size, size]
            inputs["image_sizes"] = torch.tensor([[height, width]])
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True)
        rows.append(output.hidden_states[-1][0, -1].float())
    return F.normalize(torch.stack(rows), dim=-1)
