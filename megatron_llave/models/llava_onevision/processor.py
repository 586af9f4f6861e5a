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
    image_settings,
    settings_of_embeddings,
)
from megatron_llave.data.packing import EncodedSequence, TileShape, VisualLayout
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
        layouts = [self._layout(*image.size, self.grids) for image in images]
        num_blank = 0
        if self.template == "qwen" and not images:
            if self.image_token_without_image == "remove":
                text = remove_placeholders(text)
            num_blank = count_placeholders(text)
            layouts = [self._layout(self.tile_size, self.tile_size, ())] * num_blank
        visual_tokens = sum(map(len, layouts))
        tokens, is_cut = self._tokens(text, len(layouts), visual_tokens)
        try:
            tiles = [anyres.cut_tiles(image, self.grids, self.tile_size) for image in images]
        except MemoryError as error:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            raise BadImageError(f"the memory is too small for the tiles of images of {sizes} pixels") from error
        tiles += [np.zeros((1, 3, self.tile_size, self.tile_size), np.uint8)] * num_blank
        return EncodedSequence(tokens, tiles, layouts, num_blank > 0, is_cut, tuple(notes))

    def _encode_video(self, text: str, frames: np.ndarray, notes: list[str]) -> EncodedSequence:
        """Encode a video: each frame is one squashed tile, and the prompt has one image for all of them."""
        cut = [anyres.cut_tiles(Image.fromarray(frame), (), self.tile_size) for frame in frames]
        layout = anyres.video_layout(len(frames), self.tile_size // self.patch_size, self.video_newline)
        tokens, is_cut = self._tokens(text, 1, len(layout))
        return EncodedSequence(tokens, [np.concatenate(cut)], [layout], False, is_cut, tuple(notes))

    def _tokens(self, text: str, num_images: int, visual_tokens: int) -> tuple[list[int], bool]:
        """Return the ids of the prompt, and whether its text was cut."""

        def encode(max_length: int) -> list[int]:
            return encode_prompt(text, num_images, self.tokenizer, self.template, max_length, visual_tokens)

        return encode_within(encode, text, visual_tokens - num_images, self.max_length, self.too_long)

    def _layout(self, width: int, height: int, grids: anyres.Grids) -> VisualLayout:
        patches = self.tile_size // self.patch_size
        return anyres.visual_layout(width, height, grids, self.tile_size, patches, self.anyres_max_tiles)


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
    if not grids:
        return visual, 1
    columns, rows = anyres.select_grid(width, height, grids, vision.image_size)
    return visual, 1 + columns * rows


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
