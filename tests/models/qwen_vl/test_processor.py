"""Token ids, pixels and lengths of inputs of the Qwen-VL families, against transformers' own processors."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_inputs import GOLDEN, VISION_TOKENS, small_model
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import VideosKwargs
from transformers.video_utils import VideoMetadata

from megatron_llave import models
from megatron_llave.batch import Side
from megatron_llave.config.data import DataConfig
from megatron_llave.config.load import config_from_dict
from megatron_llave.data.image_files import BadImageError
from megatron_llave.data.packing import IMAGE, EncodedSequence, pack_sequences
from megatron_llave.data.tokenizer import Tokenizer
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.models.qwen2_5_vl.inputs import INPUTS as QWEN2_5_VL
from megatron_llave.models.qwen2_vl.inputs import INPUTS as QWEN2_VL
from megatron_llave.models.qwen3_vl.inputs import INPUTS as QWEN3_VL
from megatron_llave.models.qwen_vl.positions import token_positions
from megatron_llave.models.qwen_vl.processor import QwenVlProcessor
from megatron_llave.models.qwen_vl.resize import PixelBudget, normalise

FAMILIES = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_5_VL, "qwen3_vl": QWEN3_VL}
SEEN, FRAMES = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
HEAD = {family: "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" for family in FAMILIES} | {
    "qwen3_vl": ""
}
TAIL = "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"
PIXELS = dict(min_pixels=4096, max_pixels=50176)


def picture(name: str) -> Image.Image:
    return Image.open(GOLDEN / f"qwen_vl/picture_{name}.png").convert("RGB")


def processor_of(family: str, tokenizer_file: Path, **data) -> QwenVlProcessor:
    data = DataConfig(tokenizer=str(tokenizer_file), **(PIXELS | data))
    return FAMILIES[family].build_processor(data, small_model(family))


def transformers_processor(
    family: str, tokenizer_file: Path, grid: tuple[int, int, int] | None, num_frames: int = 0, fps: float = 2
):
    """transformers' processor, with a stand-in for the one of videos, which needs torchvision: it returns `grid`."""

    class Videos:
        merge_size = temporal_patch_size = 2
        model_input_names = ["video_grid_thw"]
        valid_kwargs = VideosKwargs

        def __call__(self, videos: list, **more) -> dict:
            metadata = VideoMetadata(total_num_frames=num_frames, fps=fps, frames_indices=list(range(num_frames)))
            return {"video_grid_thw": np.array([grid]), "video_metadata": [metadata]}

    images = Qwen2VLImageProcessorPil(patch_size=small_model(family).vision.patch_size, **PIXELS)
    kind = Qwen3VLProcessor if family == "qwen3_vl" else Qwen2VLProcessor
    unchecked = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
    return unchecked(images, PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file)), Videos())


def expanded(encoded: EncodedSequence, pad: int) -> list[int]:
    """Ids with a pad for each visual token."""
    lengths = iter(map(len, encoded.layouts))
    return [token for t in encoded.tokens for token in ([pad] * next(lengths) if t == IMAGE else [t])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "user", "names"),
    [
        ("Represent it: a cat", "Represent it: a cat", []),
        ("<image>\nWhat is it?", f"{SEEN}\nWhat is it?", ["wide"]),
        ("Is <image> in <image>?", f"Is {SEEN} in {SEEN}?", ["small", "tall"]),
        ("no placeholder", f"{SEEN}{SEEN}no placeholder", ["tall", "small"]),
    ],
    ids=["text", "image", "two_images", "without_placeholders"],
)
def test_ids_and_pixels_are_those_of_transformers(
    family: str, text: str, user: str, names: list[str], tokenizer_file: Path
) -> None:
    theirs = transformers_processor(family, tokenizer_file, None)
    whole = f"{HEAD[family]}<|im_start|>user\n{user}{TAIL}"
    images = [picture(name) for name in names]
    expected = theirs(text=[whole], images=images or None, return_tensors="pt")
    encoded = processor_of(family, tokenizer_file).encode(Side(text, list(images)))
    assert expanded(encoded, VISION_TOKENS["<|image_pad|>"]) == expected["input_ids"][0].tolist()
    assert encoded.length == expected["input_ids"].shape[1] == encoded.positions.shape[1]
    assert np.array_equal(encoded.positions, token_positions(encoded.tokens, encoded.grids))
    if names:
        assert list(map(list, encoded.grids)) == expected["image_grid_thw"].tolist()
        mean, std = (torch.tensor(getattr(theirs.image_processor, f"image_{name}")) for name in ("mean", "std"))
        values = normalise(torch.from_numpy(np.concatenate(encoded.tiles)), mean, std)
        assert torch.equal(values.reshape(len(expected["pixel_values"]), -1), expected["pixel_values"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_frames", "fps"), [(1, None), (4, None), (5, None), (5, 0.125), (6, 3)])
def test_ids_of_a_video_are_those_of_transformers(
    family: str, num_frames: int, fps: float | None, tokenizer_file: Path
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, 96, 128, 3), np.uint8)
    ours = processor_of(family, tokenizer_file)
    seconds = tuple(number / fps for number in range(num_frames)) if fps else ()
    encoded = ours.encode(Side("<image>\nWhat happens: x", [], frames, seconds=seconds))
    grid = ours.budget.video_grid(num_frames, 128, 96)
    theirs = transformers_processor(family, tokenizer_file, grid, num_frames, fps or 2)
    # transformers 4.57 puts the pairs of frames in the place of start, pad and end; 5.23 leaves two of them outside.
    seen = "<|video_pad|>" if family == "qwen3_vl" else FRAMES
    whole = f"{HEAD[family]}<|im_start|>user\n{seen}\nWhat happens: x{TAIL}"
    expected = theirs(text=[whole], videos=[frames])["input_ids"][0]
    assert expanded(encoded, VISION_TOKENS["<|video_pad|>"]) == expected
    pairs, *patches = grid
    assert pairs == (num_frames + 1) // 2
    assert encoded.grids == ([(1, *patches)] * pairs if family == "qwen3_vl" else [grid])
    assert sum(map(len, encoded.tiles)) == pairs * patches[0] * patches[1] // 4
    interval = 2 * 2 / (fps or 2) if family == "qwen2_5_vl" else 1
    assert np.array_equal(encoded.positions, token_positions(encoded.tokens, encoded.grids, interval))


def png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", QWEN2_VL.prompts)
@pytest.mark.parametrize("num_frames", [1, 4, 5])
def test_a_video_of_image_files_is_the_video_of_its_frames(
    family: str, prompt: str, num_frames: int, tokenizer_file: Path, tokenizer: Tokenizer
) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (num_frames, 90, 120, 3), np.uint8)
    inputs, model = FAMILIES[family], small_model(family)
    data = DataConfig(tokenizer=str(tokenizer_file), prompt=prompt, **PIXELS)
    ours, text = inputs.build_processor(data, model), "<image>\nWhat happens?"
    expected = ours.encode(Side(text, [], frames))
    files = Side(text, [png(frame) for frame in frames], is_video=True)
    encoded = ours.encode(files)
    assert encoded.tokens == expected.tokens and encoded.grids == expected.grids
    assert all(np.array_equal(*both) for both in zip(encoded.tiles, expected.tiles, strict=True))
    assert encoded.positions.shape == (3, encoded.length) and np.array_equal(encoded.positions, expected.positions)
    sizes = [[120, 90]] * num_frames
    assert inputs.count_tokens(text, sizes, True, tokenizer, data, model) == encoded.length
    seconds = tuple(100.0 * number for number in range(num_frames))
    slow = ours.encode(replace(files, seconds=seconds))
    assert inputs.count_tokens(text, sizes, True, tokenizer, data, model, seconds) == slow.length
    assert num_frames == 1 or (slow.length > encoded.length) == (family == "qwen3_vl")
    number = sum(map(len, encoded.tiles))
    assert inputs.video_lengths(num_frames, 120, 90, data, model) == (number, number)


def test_frames_of_two_sizes_are_no_video(tokenizer_file: Path) -> None:
    images = [Image.new("RGB", size) for size in [(8, 6), (6, 8)]]
    with pytest.raises(BadImageError, match="frames of a video must have one size, not 6x8 and 8x6"):
        processor_of("qwen2_vl", tokenizer_file).encode(Side("", images, is_video=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", QWEN2_VL.prompts)
def test_lengths_from_sizes_are_those_of_encoded_inputs(
    family: str, prompt: str, tokenizer_file: Path, tokenizer: Tokenizer
) -> None:
    inputs, model = FAMILIES[family], small_model(family)
    data = DataConfig(tokenizer=str(tokenizer_file), prompt=prompt, **PIXELS)
    ours = inputs.build_processor(data, model)
    for text, names in [("a cat", []), ("see <|image_1|>", []), ("see <image>", ["wide"]), ("both", ["tall", "small"])]:
        images = [picture(name) for name in names]
        encoded = ours.encode(Side(text, list(images)))
        lengths = [inputs.image_lengths(*image.size, data, model) for image in images]
        assert lengths == [(len(layout), len(tiles)) for layout, tiles in zip(encoded.layouts, encoded.tiles)]
        sizes = [list(image.size) for image in images]
        assert inputs.count_tokens(text, sizes, False, tokenizer, data, model) == encoded.length
        assert not encoded.is_cut and encoded.tokens.count(IMAGE) == len(names)


def test_positions_of_vlm2vec_v2_count_visual_tokens_like_text(tokenizer_file: Path) -> None:
    ours = processor_of("qwen2_vl", tokenizer_file, prompt="vlm2vec_v2")
    encoded = ours.encode(Side("find it\n", [picture("small")]))
    assert encoded.positions.tolist() == [list(range(encoded.length))] * 3


def test_packed_inputs(tokenizer_file: Path) -> None:
    ours = processor_of("qwen2_vl", tokenizer_file)
    sides = [Side("<image> a", [picture("wide")]), Side("b", []), Side("c", [picture("small"), picture("tall")])]
    encoded = [ours.encode(side) for side in sides]
    row = pack_sequences(encoded, 8, ours.tile_shape)
    assert row.tiles.shape[1:] == (4, 3, 1, 14, 14) and row.num_tiles == len(row.visual_source)
    assert torch.equal(row.visual_source, torch.arange(row.num_tiles))
    assert row.grids == [list(grid) for sequence in encoded for grid in sequence.grids]
    assert row.positions.shape == (3, len(row.tokens)) and len(row.tokens) % 8 == 0
    video = ours.encode(Side("d", [picture("small")] * 3, is_video=True))
    mixed = pack_sequences([*encoded, video], 8, ours.tile_shape)
    assert torch.equal(mixed.tiles[: row.num_tiles], row.tiles.repeat(1, 1, 1, 2, 1, 1)), "each image is in both frames"
    assert torch.equal(mixed.tiles[row.num_tiles :], torch.from_numpy(video.tiles[0]))
    assert pack_sequences([], 8, ours.tile_shape).tiles.shape == (0, 4, 3, 2, 14, 14)


def test_a_long_text_is_cut_or_skipped(tokenizer_file: Path) -> None:
    side = Side("a cat " * 40, [picture("small")])
    whole = processor_of("qwen2_vl", tokenizer_file).encode(side)
    cut = processor_of("qwen2_vl", tokenizer_file, max_length=80).encode(side)
    assert cut.is_cut and cut.length == 80 and not whole.is_cut and cut.tokens[-7:] == whole.tokens[-7:]
    with pytest.raises(DataError, match="text of 240 characters is beyond data.max_length=80 tokens"):
        processor_of("qwen2_vl", tokenizer_file, max_length=80, too_long="skip").encode(side)
    with pytest.raises(DataError, match=r"56 visual tokens and 23 .* at least 79 or lower data.max_pixels"):
        processor_of("qwen2_vl", tokenizer_file, max_length=40).encode(Side("a", [picture("large")]))


def test_images_that_cannot_be_used_are_bad_ones(tokenizer_file: Path) -> None:
    with pytest.raises(BadImageError, match="image of 201x1 pixels has a side more than 200 times the other one"):
        processor_of("qwen3_vl", tokenizer_file).encode(Side("", [Image.new("RGB", (201, 1))]))
    data, model = DataConfig(), small_model("qwen3_vl")
    with pytest.raises(BadImageError, match="image of 1x300 pixels"):
        QWEN3_VL.image_lengths(1, 300, data, model)


def test_settings_of_embeddings_name_the_budget_in_pixels() -> None:
    settings = QWEN3_VL.input_settings(DataConfig(prompt="plain"), small_model("qwen3_vl"))
    assert settings["min_pixels"] == 4096 and settings["max_pixels"] == 1310720 and settings["prompt"] == "plain"
    assert "32x32 px are a visual token" in QWEN3_VL.describe(small_model("qwen3_vl"))[1]


def test_a_prompt_of_another_family_is_refused() -> None:
    cfg = config_from_dict({"model": {"preset": "tiny"}, "data": {"prompt": "gme"}})
    right = "data.prompt=gme is not one of those of model.family=llava_onevision: qwen, plain"
    with pytest.raises(ConfigError, match=right):
        models.build_processor(cfg.data, cfg.model)
    with pytest.raises(ConfigError, match="data.prompt='llama' is not one of qwen, plain, vlm2vec_v2, gme, qwen3_vl"):
        config_from_dict({"data": {"prompt": "llama"}})


def test_the_budget_is_that_of_the_configuration(tokenizer_file: Path) -> None:
    assert processor_of("qwen3_vl", tokenizer_file).budget == PixelBudget(16, 4096, 50176, True)
    assert processor_of("qwen2_5_vl", tokenizer_file).tokens_per_second == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_from_headers_are_those_of_the_encoded_input(family, tokenizer_file):
    turned, image = io.BytesIO(), picture("large")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.crop((0, 0, 120, 50)).save(turned, "JPEG", exif=exif)
    frames = [np.asarray(image.resize((60, 90)))] * 5
    sides = [
        Side("a text alone", []),
        Side("before <image> and after", [turned.getvalue()]),
        Side("two", [turned.getvalue(), image]),
        Side("a video", [], frames=np.stack(frames)),
        Side("a video", [Image.fromarray(frame) for frame in frames], is_video=True, seconds=(0, 1, 2, 4, 5)),
        Side("cut " * 400, [turned.getvalue()]),
    ]
    processor = processor_of(family, tokenizer_file, max_length=300)
    for side in sides:
        encoded, size = processor.encode(side), processor.measure(side)
        assert (size.tokens, size.tiles) == (encoded.length, sum(map(len, encoded.tiles))), side.text[:20]
    assert encoded.is_cut
