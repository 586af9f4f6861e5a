"""The processor of LLaVA-OneVision: turns the text and the images of an input into token ids and tiles."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from megatron_llave.batch import Side
from megatron_llave.config.data import DataConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.data.image_files import (
    BadImageError,
    ImageSettings,
    decode_frames,
    decode_image,
    frames_size,
    image_settings,
    image_size,
    settings_of_embeddings,
)
from megatron_llave.data.packing import EncodedSequence, InputSize, TileShape, VisualLayout
from megatron_llave.data.placeholders import count_placeholders, remove_placeholders
from megatron_llave.data.prompt import encode_within
from megatron_llave.data.tokenizer import Tokenizer, tokenizer_of_run
from megatron_llave.errors import require
from megatron_llave.models.llava_onevision import anyres
from megatron_llave.models.llava_onevision.prompt import encode_prompt


@dataclass(frozen=True)
class LlavaOnevisionProcessor:
    """Turns a Side into an EncodedSequence; it keeps no state between inputs."""

    tokenizer: Tokenizer
    template: str
    """Prompt template: qwen or plain."""
    max_length: int
    """Longest sequence in tokens, visual tokens included."""
    grids: anyres.Grids
    """Anyres grids (columns, rows); empty: one squashed tile."""
    tile_size: int
    """Side of a tile, pixels."""
    patch_size: int
    """Side of a patch, pixels."""
    anyres_max_tiles: int | None = 9
    """Number of tiles to whose patches a much larger feature map is interpolated; None: every patch is kept."""
    image_token_without_image: str = "blank"
    """What the qwen template does with placeholders in a text without any image: blank or remove."""
    images: ImageSettings = ImageSettings()
    """How image files become pixels, and the limits on their size."""
    too_long: str = "cut"
    """What happens to a text that exceeds max_length: cut, or skip (which raises a DataError)."""
    video_newline: str = "one_token"
    """Where image_newline stands among a video's tokens: one of config.data.VIDEO_NEWLINES."""

    @property
    def tile_shape(self) -> TileShape:
        """Return pixels and patches of the tiles that `encode` makes."""
        return TileShape(self.tile_size, (self.tile_size // self.patch_size) ** 2)

    def encode(self, side: Side) -> EncodedSequence:
        """Tokenize the text, decode the images and cut them into tiles.

        With template `qwen`, a placeholder in a text without any image becomes a blank tile, which is zero after
        normalisation, as in the official repository; or it is removed (data.placeholders.remove_placeholders).

        Raises:
            BadImageError: an image cannot be read.
            DataError: the images alone exceed max_length, the text does and `too_long` is skip, or there are more
                placeholders than images.
        """
        text, notes = side.text, []
        if side.frames is not None or side.is_video:
            frames = decode_frames(side.images, self.images, notes) if side.frames is None else side.frames
            return self._encode_video(text, frames, notes)
        images = [decode_image(data, self.images, notes) for data in side.images]
        text, layouts = self._layouts(text, [image.size for image in images])
        num_blank = len(layouts) - len(images)
        tokens, is_cut = self._tokens(text, layouts)
        try:
            tiles = [anyres.cut_tiles(image, self.grids, self.tile_size) for image in images]
        except MemoryError as error:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            raise BadImageError(f"the memory is too small for the tiles of images of {sizes} pixels") from error
        tiles += [np.zeros((1, 3, self.tile_size, self.tile_size), np.uint8)] * num_blank
        return EncodedSequence(tokens, tiles, layouts, num_blank > 0, is_cut, tuple(notes))

    def measure(self, side: Side) -> InputSize:
        """Return the sizes of what `encode` makes, without decoding an image; raises as it does."""
        if side.frames is not None or side.is_video:
            if side.frames is None:
                frames_size(side.images, self.images)  # which refuses frames of several sizes, as `encode` does
            tiles = len(side.images if side.frames is None else side.frames)
            text, layouts = side.text, [self._video_layout(tiles)]
        else:
            sizes = [image_size(data, self.images) for data in side.images]
            text, layouts = self._layouts(side.text, sizes)
            tiles = sum(num_tiles(*size, self.grids, self.tile_size) for size in sizes) + len(layouts) - len(sizes)
        tokens, _ = self._tokens(text, layouts)
        return InputSize(len(tokens) - len(layouts) + sum(map(len, layouts)), tiles)

    def _encode_video(self, text: str, frames: np.ndarray, notes: list[str]) -> EncodedSequence:
        """Encode a video: each frame is one squashed tile, and the prompt has one image for all of them."""
        cut = [anyres.cut_tiles(Image.fromarray(frame), (), self.tile_size) for frame in frames]
        layout = self._video_layout(len(frames))
        tokens, is_cut = self._tokens(text, [layout])
        return EncodedSequence(tokens, [np.concatenate(cut)], [layout], False, is_cut, tuple(notes))

    def _layouts(self, text: str, sizes: Sequence[tuple[int, int]]) -> tuple[str, list[VisualLayout]]:
        """Return the text as it is encoded, and the layouts of images of these sizes or else of blank tiles."""
        if sizes or self.template != "qwen":
            return text, [self._layout(*size, self.grids) for size in sizes]
        if self.image_token_without_image == "remove":
            text = remove_placeholders(text)
        return text, [self._layout(self.tile_size, self.tile_size, ())] * count_placeholders(text)

    def _tokens(self, text: str, layouts: Sequence[VisualLayout]) -> tuple[list[int], bool]:
        """Return the ids of the prompt, and whether its text was cut."""
        num_images, visual_tokens = len(layouts), sum(map(len, layouts))

        def encode(max_length: int) -> list[int]:
            return encode_prompt(text, num_images, self.tokenizer, self.template, max_length, visual_tokens)

        return encode_within(encode, text, visual_tokens - num_images, self.max_length, self.too_long)

    def _layout(self, width: int, height: int, grids: anyres.Grids) -> VisualLayout:
        patches = self.tile_size // self.patch_size
        return anyres.visual_layout(width, height, grids, self.tile_size, patches, self.anyres_max_tiles)

    def _video_layout(self, num_frames: int) -> VisualLayout:
        return anyres.video_layout(num_frames, self.tile_size // self.patch_size, self.video_newline)


def build_processor(cfg_data: DataConfig, cfg_model: ModelConfig) -> LlavaOnevisionProcessor:
    """Return the processor of a run, its tokenizer read from `data.tokenizer` or found in `data.path`.

    Raises:
        DataError: the tokenizer is missing or damaged.
        ConfigError: the tokenizer has more ids than the model's embedding.
    """
    return LlavaOnevisionProcessor(
        tokenizer=tokenizer_of_run(cfg_data, cfg_model.language.vocab_size),
        template=cfg_data.prompt,
        max_length=cfg_data.max_length,
        grids=_grids(cfg_model),
        tile_size=cfg_model.vision.image_size,
        patch_size=cfg_model.vision.patch_size,
        anyres_max_tiles=cfg_model.anyres_max_tiles,
        image_token_without_image=cfg_data.image_token_without_image,
        images=image_settings(cfg_data),
        too_long=cfg_data.too_long,
        video_newline=cfg_data.video_newline,
    )


def image_lengths(width: int, height: int, data: DataConfig, model: ModelConfig) -> tuple[int, int]:
    """Visual tokens and tiles of an image, from its size in pixels."""
    grids, vision = _grids(model), model.vision
    visual = anyres.num_visual_tokens(
        width, height, grids, vision.image_size, vision.patches_per_side, model.anyres_max_tiles
    )
    return visual, num_tiles(width, height, grids, vision.image_size)


def num_tiles(width: int, height: int, grids: anyres.Grids, tile_size: int) -> int:
    """Tiles of an image, from its size in pixels."""
    columns, rows = anyres.select_grid(width, height, grids, tile_size) if grids else (0, 0)
    return 1 + columns * rows


def video_lengths(num_frames: int, width: int, height: int, data: DataConfig, model: ModelConfig) -> tuple[int, int]:
    """Visual tokens and tiles of a video, each of whose frames is one tile, whatever its size."""
    layout = anyres.video_layout(num_frames, model.vision.patches_per_side, data.video_newline)
    return len(layout), num_frames


def count_tokens(
    text: str,
    sizes: list[list[int]],
    is_video: bool,
    tokenizer: Tokenizer,
    data: DataConfig,
    model: ModelConfig,
    seconds: Sequence[float] = (),
) -> int:
    """Tokens of an input, visual ones counted, however long it is.

    Args:
        text: as in a pair, with or without placeholders.
        sizes: [width, height] of each image, pixels.
        is_video: whether the images are the frames of a video.
        tokenizer: of the run.
        data: of the run.
        model: of the run.
        seconds: when the frames were taken, on which nothing depends here.

    Raises:
        DataError: more placeholders than images.
    """
    visual = [image_lengths(width, height, data, model)[0] for width, height in sizes]
    if is_video:
        visual = [video_lengths(len(sizes), *sizes[0], data, model)[0]]
    if data.prompt == "qwen" and not sizes:
        visual = [model.vision.patches_per_side**2 + 1] * count_placeholders(text)  # a blank tile and its newline
    tokens = encode_prompt(text, len(visual), tokenizer, data.prompt, sys.maxsize, sum(visual))
    return len(tokens) - len(visual) + sum(visual)


def input_settings(data: DataConfig, model: ModelConfig) -> dict[str, Any]:
    """The settings that embeddings depend on beside weights, tokenizer and precision."""
    return {
        "image_grids": [list(grid) for grid in model.image_grids],
        "anyres_max_tiles": model.anyres_max_tiles,
        "prompt": data.prompt,
        "max_length": data.max_length,
        "image_token_without_image": data.image_token_without_image,
        "video_newline": data.video_newline,
        **settings_of_embeddings(data),
    }


def check_model(model: ModelConfig) -> None:
    """Raise a ConfigError for a model without tiles."""
    require(model.vision.image_size > 0, "model.vision.image_size=0 must be positive; set it or choose model.preset")


def describe(model: ModelConfig) -> list[str]:
    """A line about the vision encoder and one about the grids of tiles."""
    vision = model.vision
    grids = " ".join(f"{columns}x{rows}" for columns, rows in model.image_grids) or "none: one tile"
    return [
        f"vision: {vision.num_layers} layers of {vision.hidden_size}, {vision.num_heads} heads, MLP "
        f"{vision.ffn_hidden_size}, tiles of {vision.image_size} px in {vision.patches_per_side**2} patches",
        f"grids (columns x rows): {grids}",
    ]


def _grids(model: ModelConfig) -> anyres.Grids:
    return tuple((columns, rows) for columns, rows in model.image_grids)
