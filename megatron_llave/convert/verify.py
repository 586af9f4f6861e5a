"""Compare a checkpoint with transformers on the same inputs: `llave convert verify`.

Both models get the same token ids and pixels. Each removes padding, places newlines and computes everything after that
by itself, so that a difference is a difference of the models. No other file of the package imports transformers.
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

from megatron_llave.batch import MAX_IMAGE_BYTES, Side
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.config.checks import require_same_model
from megatron_llave.data.image_files import decode_image, image_settings
from megatron_llave.data.packing import EncodedSequence
from megatron_llave.distributed import process_groups
from megatron_llave.embedding.embedder import embed, load_model
from megatron_llave.errors import CheckpointError, import_optional
from megatron_llave.files import read_bytes
from megatron_llave.hub import local_folder
from megatron_llave.models import open_hf
from megatron_llave.models.hf.weights import HfFormat

TOLERANCE = 3e-5
"""Largest allowed difference between entries of a unit vector in float32; even a wrong kind of GELU makes 1.6e-4."""
INSTRUCTION = "<image>\nRepresent the given image."


def verify(hf: str | Path, checkpoint: str | Path, text: str, image: str | Path | None = None) -> int:
    """Embed a text and an image with both models in float32 and print the differences.

    Args:
        hf: an HF folder of any layout, which transformers runs.
        checkpoint: a checkpoint or output directory (or another HF folder, which this package runs).
        text: a text, which is embedded with the prompt `qwen`, or `plain` if the checkpoint was trained with it.
        image: an image file; None: a generated image that needs a grid of tiles and padding.

    Returns:
        0 if all entries are within TOLERANCE, else 1.

    Raises:
        UserError: transformers is missing, or a folder or the image cannot be read.
    """
    transformers = import_optional("transformers", "verify needs", "pip install transformers", error=CheckpointError)
    hf = local_folder(hf)
    weights = open_hf(hf)
    vision = weights.config.model.vision
    image_file = _generated_image(vision.image_size or 8 * vision.patch_size) if image is None else _read(image)
    sides = {"text": Side(text, []), "image": Side(INSTRUCTION, [image_file])}
    with tempfile.TemporaryDirectory() as folder:
        pretrained = find_pretrained(checkpoint)
        require_same_model(pretrained.cfg.model, weights.config.model, str(hf))
        prompt = "plain" if pretrained.cfg.data.prompt == "plain" else "qwen"  # its tokenizer may know no chat turns
        overrides = [f"data.prompt={prompt}", "model.precision=fp32"]
        tokenizer = pretrained.find_tokenizer() or find_pretrained(hf).find_tokenizer()
        if tokenizer is None:
            print("no tokenizer in either folder: the bytes of the text stand in for token ids")
            tokenizer = _byte_tokenizer(Path(folder) / "tokenizer.json")
        model = load_model(checkpoint, overrides=[*overrides, f"data.tokenizer={tokenizer}"])
    ours = embed(model, sides).cpu()
    encoded = [model.encoder.encode(side) for side in sides.values()]
    process_groups.destroy_model_parallel()
    model.chunks.clear()  # the two models are not in memory together
    reference = weights.format.reference_model(transformers, weights)
    size = decode_image(image_file, image_settings(model.cfg.data)).size
    theirs = _embed_with_transformers(reference, weights.format, encoded, size)
    return _print_differences(list(sides), ours, theirs)


def _print_differences(names: list[str], ours: Tensor, theirs: Tensor) -> int:
    differences = (ours - theirs).abs().amax(dim=1)
    cosines = F.cosine_similarity(ours.double(), theirs.double())
    for name, difference, cosine in zip(names, differences.tolist(), cosines.tolist()):
        print(f"{name}: largest difference {difference:.2e}, cosine {cosine:.8f}")
    same = bool((differences <= TOLERANCE).all())  # nan is not the same
    print(f"{'the same model' if same else 'NOT the same model'} (tolerance {TOLERANCE:.0e}, float32)")
    return 0 if same else 1


def _generated_image(tile: int) -> bytes:
    """Return a wide PNG, which needs several tiles if there are grids, and padding or a change of its shape."""
    height, width = tile * 3 // 4, tile * 7 // 4
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 255 // width, rows * 255 // height, (columns * rows) % 256], axis=-1)
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def _read(path: str | Path) -> bytes:
    return read_bytes(path, MAX_IMAGE_BYTES, "name another image", CheckpointError)


def _byte_tokenizer(path: Path) -> Path:
    """Write a tokenizer.json with one id per byte, and the special tokens of Qwen's prompts."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.add_special_tokens(["<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"])
    model.save(str(path))
    return path


def _embed_with_transformers(
    model: torch.nn.Module, format: HfFormat, encoded: list[EncodedSequence], size: tuple[int, int]
) -> Tensor:
    """Return unit vectors [n, h] float32: the last token of the last hidden state, which is after the final norm."""
    rows = []
    for sequence in encoded:
        with torch.no_grad():
            output = model(**format.reference_inputs(model, sequence, size), output_hidden_states=True)
        rows.append(output.hidden_states[-1][0, -1].float())
    return F.normalize(torch.stack(rows), dim=-1)
