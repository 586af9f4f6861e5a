"""The processor of the Qwen-VL families: turns the text, images and video of an input into ids, tiles and positions."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
from megatron_llave.data.packing import IMAGE, EncodedSequence, InputSize, TileShape, VisualLayout
from megatron_llave.data.placeholders import remove_placeholders
from megatron_llave.data.prompt import encode_within
from megatron_llave.data.tokenizer import Tokenizer, find_tokenizer, tokenizer_of_run
from megatron_llave.models.qwen_vl.positions import (
    counted_positions,
    frame_times,
    seconds_per_pair,
    time_stamps,
    token_positions,
)
from megatron_llave.models.qwen_vl.prompt import (
    IMAGE_TEXT,
    Template,
    encode_prompt,
    require_special_tokens,
    templates,
)
from megatron_llave.models.qwen_vl.resize import (
    FRAMES,
    MERGED,
    Grid,
    PixelBudget,
    image_tiles,
    num_visual_tokens,
    pixel_budget,
    video_tiles,
)


@dataclass(frozen=True)
class QwenVlProcessor:
    """Turns a Side into an EncodedSequence; it keeps no state between inputs."""

    tokenizer: Tokenizer
    template: Template
    max_length: int
    """Longest sequence in tokens, visual tokens included."""
    budget: PixelBudget
    has_time_stamps: bool = False
    """Whether each pair of frames of a video is an image of its own, after the text of its time."""
    tokens_per_second: int = 0
    """Temporal positions per second of a video; 0: each pair of frames is one position."""
    images: ImageSettings = ImageSettings()
    """How image files become pixels, and the limits on their size."""
    too_long: str = "cut"
    """What happens to a text that exceeds max_length: cut, or skip (which raises a DataError)."""

    @property
    def tile_shape(self) -> TileShape:
        """Return the sizes of the tiles that `encode` makes, one per visual token; those of images have one frame."""
        size = self.budget.patch_size
        return TileShape(size, 1, (MERGED**2, 3, FRAMES, size, size))

    def encode(self, side: Side) -> EncodedSequence:
        """Tokenize the text, decode and resize the images, or resize the frames, and cut them into tiles.

        A placeholder in a text without any image is removed (data.placeholders.remove_placeholders).

        Raises:
            BadImageError: an image cannot be read, or one side is more than 200 times as long as the other.
            DataError: the images alone exceed max_length, the text does and `too_long` is skip, or there are more
                placeholders than images.
        """
        notes: list[str] = []
        if side.frames is not None or side.is_video:
            frames = decode_frames(side.images, self.images, notes) if side.frames is None else side.frames
            return self._encode_video(side.text, frames, frame_times(len(frames), side.seconds), notes)
        images = [decode_image(data, self.images, notes) for data in side.images]
        # Before any pixel is resized, so that an input that does not fit costs little.
        grids = [self.budget.image_grid(*image.size) for image in images]
        tokens, is_cut = self._tokens(side.text, [IMAGE_TEXT] * len(images), grids)
        try:
            tiles = [image_tiles(image, self.budget)[0] for image in images]
        except MemoryError as error:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            raise BadImageError(f"the memory is too small for the tiles of images of {sizes} pixels") from error
        return self._encoded(tokens, tiles, grids, is_cut, notes)

    def measure(self, side: Side) -> InputSize:
        """Return the sizes of what `encode` makes, without decoding an image; raises as it does."""
        if side.frames is not None or side.is_video:
            number = len(side.images if side.frames is None else side.frames)
            size = frames_size(side.images, self.images) if side.frames is None else side.frames.shape[2:0:-1]
            grids = self._video_grids(number, *size)
            media = [video_text(frame_times(number, side.seconds), self.has_time_stamps)]
        else:
            grids = [self.budget.image_grid(*image_size(data, self.images)) for data in side.images]
            media = [IMAGE_TEXT] * len(grids)
        tokens, _ = self._tokens(side.text, media, grids)
        visual = sum(map(num_visual_tokens, grids))
        return InputSize(len(tokens) - len(grids) + visual, visual)

    def _encode_video(self, text: str, frames: np.ndarray, times: Sequence[float], notes: list[str]) -> EncodedSequence:
        """Encode a video: one IMAGE, or one for each pair of frames if these have time stamps."""
        grids = self._video_grids(len(frames), frames.shape[2], frames.shape[1])
        tokens, is_cut = self._tokens(text, [video_text(times, self.has_time_stamps)], grids)
        tiles, _ = video_tiles(frames, self.budget)
        interval = self.tokens_per_second * seconds_per_pair(times) if self.tokens_per_second else 1
        return self._encoded(tokens, np.split(tiles, len(grids)), grids, is_cut, notes, interval)

    def _video_grids(self, num_frames: int, width: int, height: int) -> list[Grid]:
        """Return the grid of a video, or of each pair of its frames."""
        pairs, *patches = self.budget.video_grid(num_frames, width, height)
        return [(1, *patches)] * pairs if self.has_time_stamps else [(pairs, *patches)]

    def _tokens(self, text: str, media: list[str], grids: list[Grid]) -> tuple[list[int], bool]:
        """Return the ids of the prompt, and whether its text was cut."""
        text = text if media else remove_placeholders(text)
        visual = sum(map(num_visual_tokens, grids))

        def encode(max_length: int) -> list[int]:
            return encode_prompt(text, media, self.tokenizer, self.template, max_length, visual)

        return encode_within(encode, text, visual - len(grids), self.max_length, self.too_long)

    def _encoded(
        self,
        tokens: list[int],
        tiles: list[np.ndarray],
        grids: list[Grid],
        is_cut: bool,
        notes: list[str],
        interval: float = 1,
    ) -> EncodedSequence:
        layouts = [VisualLayout(np.arange(num_visual_tokens(grid))) for grid in grids]
        encoded = EncodedSequence(tokens, tiles, layouts, is_cut=is_cut, image_notes=tuple(notes), grids=grids)
        if self.template.has_image_positions:
            encoded.positions = token_positions(tokens, grids, interval)
        else:
            encoded.positions = counted_positions(encoded.length)
        return encoded


def video_text(times: Sequence[float], has_time_stamps: bool) -> str:
    """Return what stands for a video in a text: <image>, or one for each pair of frames, after its time stamp."""
    stamps = time_stamps(times) if has_time_stamps else [""]
    return "".join(stamp + IMAGE_TEXT for stamp in stamps)


@dataclass(frozen=True)
class QwenVlInputs:
    """What differs between the families in their inputs; its methods are entries of a family's record."""

    system: str | None
    """System message of the chat template for inputs that have none; None: there is no such turn."""
    has_time_stamps: bool = False
    """Whether each pair of frames of a video has a time stamp, and the pixel budget is for all frames together."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Values of data.prompt."""
        return tuple(templates(self.system))

    def build_processor(self, data: DataConfig, model: ModelConfig) -> QwenVlProcessor:
        """Return the processor of a run, its tokenizer read from `data.tokenizer` or found in `data.path`.

        Raises:
            DataError: the tokenizer is missing or damaged.
            ConfigError: the tokenizer has more ids than the model's embedding, or lacks a token of the prompt; or
                data.min_pixels is above data.max_pixels.
        """
        tokenizer = tokenizer_of_run(data, model.language.vocab_size)
        template = templates(self.system)[data.prompt]
        require_special_tokens(template, tokenizer, find_tokenizer(data))
        return QwenVlProcessor(
            tokenizer=tokenizer,
            template=template,
            max_length=data.max_length,
            budget=self._budget(data, model),
            has_time_stamps=self.has_time_stamps,
            tokens_per_second=model.vision.tokens_per_second,
            images=image_settings(data),
            too_long=data.too_long,
        )

    def image_lengths(self, width: int, height: int, data: DataConfig, model: ModelConfig) -> tuple[int, int]:
        """Visual tokens and tiles of an image, which are equally many, from its size in pixels.

        Raises:
            BadImageError: one side is more than 200 times as long as the other.
        """
        number = num_visual_tokens(self._budget(data, model).image_grid(width, height))
        return number, number

    def video_lengths(
        self, num_frames: int, width: int, height: int, data: DataConfig, model: ModelConfig
    ) -> tuple[int, int]:
        """Visual tokens and tiles of a video, which are equally many; raises as `image_lengths` does."""
        number = num_visual_tokens(self._budget(data, model).video_grid(num_frames, width, height))
        return number, number

    def count_tokens(
        self,
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
            seconds: when the frames were taken, or none.

        Raises:
            DataError: more placeholders than images, or an image of a shape that the model cannot take.
        """
        if is_video:
            media = [video_text(frame_times(len(sizes), seconds), self.has_time_stamps)]
            visual = self.video_lengths(len(sizes), *sizes[0], data, model)[0]
        else:
            media = [IMAGE_TEXT] * len(sizes)
            visual = sum(self.image_lengths(width, height, data, model)[0] for width, height in sizes)
        text, template = text if media else remove_placeholders(text), templates(self.system)[data.prompt]
        tokens = encode_prompt(text, media, tokenizer, template, sys.maxsize, visual)
        return len(tokens) - tokens.count(IMAGE) + visual

    def input_settings(self, data: DataConfig, model: ModelConfig) -> dict[str, Any]:
        """The settings that embeddings depend on beside weights, tokenizer and precision."""
        budget = self._budget(data, model)
        return {
            "prompt": data.prompt,
            "max_length": data.max_length,
            "min_pixels": budget.min_pixels,
            "max_pixels": budget.max_pixels,
            **settings_of_embeddings(data),
        }

    def describe(self, model: ModelConfig) -> list[str]:
        """A line about the vision encoder and one about the size of images."""
        vision, unit = model.vision, MERGED * model.vision.patch_size
        return [
            f"vision: {vision.num_layers} layers of {vision.hidden_size}, {vision.num_heads} heads, MLP "
            f"{vision.ffn_hidden_size}, patches of {vision.patch_size} px",
            f"images: {unit}x{unit} px are a visual token; data.min_pixels and data.max_pixels bound their size",
        ]

    def _budget(self, data: DataConfig, model: ModelConfig) -> PixelBudget:
        return pixel_budget(data, model.vision.patch_size, self.has_time_stamps)
