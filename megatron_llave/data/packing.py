"""Pairs -> one packed row per micro batch: queries, targets, hard negatives, end to end, padded only at the row's end.

Encoder turns one side of a pair into ids, tiles and layouts, encode_pairs all sides of many; pack_sequences lays
encoded sequences into the row and resolves every visual token to its row of the tiles' features.
Shapes as in batch.py: n sequences, t tokens, k tiles, p patches per tile, v visual tokens, u blended rows.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_llave.batch import PackedSequences, Pair, PairBatch, Side
from megatron_llave.config import DataConfig
from megatron_llave.config_model import ModelConfig
from megatron_llave.data import images
from megatron_llave.data.prompts import IMAGE, count_placeholders, encode_prompt, remove_placeholders
from megatron_llave.data.tokenizer import Tokenizer, load_tokenizer
from megatron_llave.errors import ConfigError, DataError


@dataclass(frozen=True)
class TileShape:
    """What a packed row needs to know about tiles."""

    size: int
    """Pixels along one side."""
    patches: int
    """p, feature rows per tile."""


@dataclass
class EncodedSequence:
    """One sequence before packing."""

    tokens: list[int]
    """Ids, with IMAGE once per image."""
    tiles: list[np.ndarray]
    """Per image uint8 [k_i, 3, size, size]."""
    layouts: list[images.VisualLayout]
    """Per image."""
    blank: bool = False
    """Its images are stand-ins, one tile each, which the vision tower sees as zeros."""
    is_cut: bool = False
    """Its text was cut to the encoder's max_length."""

    @property
    def length(self) -> int:
        """Tokens once every IMAGE is expanded."""
        return len(self.tokens) - len(self.layouts) + sum(map(len, self.layouts))


@dataclass
class EncodedPair:
    """One pair before packing."""

    pair: Pair
    """As it came out of the shard."""
    query: EncodedSequence
    target: EncodedSequence
    hard_negatives: list[EncodedSequence]
    """The first of the pair's hard negatives, as many as are used."""

    @property
    def hard_negative_ids(self) -> list[str]:
        """One per hard negative that is used."""
        return self.pair.hard_negative_ids[: len(self.hard_negatives)]

    @property
    def length(self) -> int:
        """Tokens of all its sequences."""
        return sum(sequence.length for sequence in (self.query, self.target, *self.hard_negatives))


@dataclass(frozen=True)
class Encoder:
    """Everything that turns a Side into an EncodedSequence; holds no state."""

    tokenizer: Tokenizer
    template: str
    """qwen or plain."""
    max_length: int
    """Longest sequence in tokens, visual tokens counted."""
    grids: images.Grids
    """Anyres grids (columns, rows); empty: one squashed tile."""
    tile_size: int
    """Side of a tile, pixels."""
    patch_size: int
    """Side of a patch, pixels."""
    anyres_max_tiles: int | None = 9
    """Tiles' worth of patches that a much larger feature map is interpolated to; None: every patch is kept."""
    image_token_without_image: str = "blank"
    """What the qwen template does with placeholders in a text without any image: blank or remove."""
    max_image_pixels: int = images.MAX_PIXELS
    """Larger pictures are refused before they are decoded."""
    too_long: str = "cut"
    """A text beyond max_length: cut, or skip (an error)."""
    video_newline: str = "one_token"
    """One of images.VIDEO_NEWLINES."""

    @property
    def tile_shape(self) -> TileShape:
        """Pixels and patches of the tiles this encoder makes."""
        return TileShape(self.tile_size, (self.tile_size // self.patch_size) ** 2)

    def encode(self, side: Side) -> EncodedSequence:
        """Tokenize, decode, cut tiles.

        A `qwen` placeholder in a text without any image stands for a blank tile, of zeros after normalisation, as in
        the released code; or it is removed (prompts.remove_placeholders).

        Raises:
            BadImageError: an image cannot be read.
            DataError: the images alone exceed max_length, or the text does and `too_long` is skip; or there are more
                placeholders than images.
        """
        if side.frames is not None:
            return self._encode_video(side.text, side.frames)
        text, pictures = side.text, [images.decode_image(data, self.max_image_pixels) for data in side.images]
        layouts = [self._layout(*picture.size, self.grids) for picture in pictures]
        num_blank = 0
        if self.template == "qwen" and not pictures:
            if self.image_token_without_image == "remove":
                text = remove_placeholders(text)
            num_blank = count_placeholders(text)
            layouts = [self._layout(self.tile_size, self.tile_size, ())] * num_blank
        visual_tokens = sum(map(len, layouts))
        tokens, is_cut = self._tokens(text, len(layouts), visual_tokens)
        tiles = [images.cut_tiles(picture, self.grids, self.tile_size) for picture in pictures]
        tiles += [np.zeros((1, 3, self.tile_size, self.tile_size), np.uint8)] * num_blank
        return EncodedSequence(tokens, tiles, layouts, num_blank > 0, is_cut)

    def _encode_video(self, text: str, frames: np.ndarray) -> EncodedSequence:
        """One squashed tile a frame; the video is one image to the prompt."""
        cut = [images.cut_tiles(Image.fromarray(frame), (), self.tile_size) for frame in frames]
        layout = images.video_layout(len(frames), self.tile_size // self.patch_size, self.video_newline)
        tokens, is_cut = self._tokens(text, 1, len(layout))
        return EncodedSequence(tokens, [np.concatenate(cut)], [layout], is_cut=is_cut)

    def _tokens(self, text: str, num_images: int, visual_tokens: int) -> tuple[list[int], bool]:
        """Ids of the prompt, and whether its text was cut."""
        encode = partial(encode_prompt, text, num_images, self.tokenizer, self.template)
        tokens = encode(self.max_length, visual_tokens)
        may_be_cut = len(tokens) - num_images + visual_tokens == self.max_length
        is_cut = may_be_cut and len(encode(sys.maxsize, visual_tokens)) > len(tokens)
        if is_cut and self.too_long == "skip":
            raise DataError(f"text of {len(text)} characters is beyond data.max_length={self.max_length} tokens")
        return tokens, is_cut

    def _layout(self, width: int, height: int, grids: images.Grids) -> images.VisualLayout:
        patches = self.tile_size // self.patch_size
        return images.visual_layout(width, height, grids, self.tile_size, patches, self.anyres_max_tiles)


def build_encoder(cfg_data: DataConfig, cfg_model: ModelConfig) -> Encoder:
    """The encoder of a run, its tokenizer read from `data.tokenizer` or found in `data.path`.

    Raises:
        DataError: the tokenizer is missing or damaged.
        ConfigError: the tokenizer has more ids than the model's embedding.
    """
    path = find_tokenizer(cfg_data)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > cfg_model.language.vocab_size:
        raise ConfigError(
            f"{path} has {tokenizer.vocab_size} token ids, more than "
            f"model.language.vocab_size={cfg_model.language.vocab_size}"
        )
    return Encoder(
        tokenizer=tokenizer,
        template=cfg_data.prompt,
        max_length=cfg_data.max_length,
        grids=tuple((columns, rows) for columns, rows in cfg_model.image_grids),
        tile_size=cfg_model.vision.image_size,
        patch_size=cfg_model.vision.patch_size,
        anyres_max_tiles=cfg_model.anyres_max_tiles,
        image_token_without_image=cfg_data.image_token_without_image,
        max_image_pixels=cfg_data.max_image_pixels,
        too_long=cfg_data.too_long,
        video_newline=cfg_data.video_newline,
    )


def find_tokenizer(cfg_data: DataConfig) -> Path:
    """The file that `data.tokenizer` names, or the tokenizer beside the data.

    Raises:
        DataError: there is none beside the data.
    """
    if cfg_data.tokenizer:
        return Path(cfg_data.tokenizer)
    directory = Path(cfg_data.path)
    for name in ("tokenizer.model", "tokenizer.json"):
        if (directory / name).is_file():
            return directory / name
    raise DataError(f"{directory} has neither tokenizer.model nor tokenizer.json; set data.tokenizer")


def pack_sequences(encoded: Sequence[EncodedSequence], pad_to_multiple: int, tile_shape: TileShape) -> PackedSequences:
    """Lay the sequences end to end; padding up to a multiple of `pad_to_multiple` tokens is one more sequence.

    No sequences make one padding sequence of `pad_to_multiple` tokens, so that a rank left without data can take part.
    """
    ids = np.array([token for sequence in encoded for token in sequence.tokens], np.int64)
    layouts = [layout for sequence in encoded for layout in sequence.layouts]
    tiles = [tile for sequence in encoded for tile in sequence.tiles]
    is_image = ids == IMAGE
    sizes = np.ones(len(ids), np.int64)  # packed tokens per id
    visual_lengths = np.array([len(layout) for layout in layouts], np.int64)
    sizes[is_image] = visual_lengths
    start = np.cumsum(sizes) - sizes

    lengths = [sequence.length for sequence in encoded]
    total = sum(lengths)
    padding = -total % pad_to_multiple if encoded else pad_to_multiple
    bounds = np.cumsum([0, *lengths] + [padding] * (padding > 0))
    tokens = np.zeros(total + padding, np.int64)  # [t]
    tokens[start[~is_image]] = ids[~is_image]

    num_tiles = np.array([len(tile) for tile in tiles], np.int64)
    is_blank = np.array([sequence.blank for sequence in encoded for _ in sequence.tiles], bool)
    blank = np.repeat(is_blank, num_tiles)  # [k]
    image_start = start[is_image] - (np.cumsum(visual_lengths) - visual_lengths)
    position = np.repeat(image_start, visual_lengths) + np.arange(visual_lengths.sum())  # [v]

    no_tile = np.zeros((0, 3, tile_shape.size, tile_shape.size), np.uint8)
    return PackedSequences(
        tokens=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=max([*lengths, padding]),
        num_sequences=len(encoded),
        num_tokens=total,
        tiles=torch.from_numpy(np.concatenate([no_tile, *tiles])),
        visual_position=torch.from_numpy(position),
        blank=torch.from_numpy(blank) if blank.any() else None,
        **_merge_layouts(layouts, num_tiles * tile_shape.patches),
    )


def _merge_layouts(layouts: Sequence[images.VisualLayout], num_rows: np.ndarray) -> dict[str, Tensor]:
    """The images' layouts as fields of PackedSequences; image i has num_rows[i] rows of features."""
    num_blended = np.array([len(layout.blend_source) for layout in layouts], np.int64)
    rows_before = np.cumsum(num_rows) - num_rows  # rows of the images before each image
    blended_before = np.cumsum(num_blended) - num_blended
    newline = num_rows.sum()
    # Three ranges follow each other in the row: all images' features, the newline, all images' blended rows.
    own_row = np.concatenate([*(layout.source for layout in layouts), np.zeros(0, np.int64)])  # [v]
    of_image = np.repeat(np.arange(len(layouts)), np.array([len(layout) for layout in layouts], np.int64))  # [v]
    blended_row = newline + 1 + (blended_before - num_rows)[of_image] + own_row
    source = np.where(own_row < num_rows[of_image], rows_before[of_image] + own_row, blended_row)
    source[own_row == images.NEWLINE] = newline
    if not num_blended.any():
        return {"visual_source": torch.from_numpy(source)}
    blend_source = np.concatenate([layout.blend_source + rows for layout, rows in zip(layouts, rows_before)])
    blend_weights = np.concatenate([layout.blend_weights for layout in layouts])
    return {
        "visual_source": torch.from_numpy(source),
        "blend_source": torch.from_numpy(blend_source),
        "blend_weights": torch.from_numpy(blend_weights),
    }


def encode_pairs(
    pairs: Sequence[Pair | DataError], encoder: Encoder, hard_negatives: int, report: Callable[[str], None]
) -> list[EncodedPair]:
    """Encode pairs with the first `hard_negatives` of each.

    A pair of which a part cannot be used is left out, and `report` is told which and why; so is one in whose place a
    DataError says why it could not be read.
    """
    encoded = []
    for pair in pairs:
        if isinstance(pair, DataError):
            report(str(pair))
            continue
        sides = [pair.query, pair.target, *pair.hard_negatives[:hard_negatives]]
        try:
            query, target, *negatives = [_encode_side(side, encoder) for side in sides]
        except DataError as error:
            report(f"pair {pair.key} of subset {pair.subset}: {error}")
            continue
        encoded.append(EncodedPair(pair, query, target, negatives))
    return encoded


def _encode_side(side: Side, encoder: Encoder) -> EncodedSequence:
    if not side.images and not side.text.strip():
        raise DataError("a side has neither text nor picture")
    return encoder.encode(side)


def pack_pairs(
    pairs: Sequence[EncodedPair], num_skipped: int, subset: str, pad_to_multiple: int, tile_shape: TileShape
) -> PairBatch:
    """Pack a micro batch: the pairs' queries, their targets, then the hard negatives pair by pair."""
    sequences = [pair.query for pair in pairs] + [pair.target for pair in pairs]
    sequences += [negative for pair in pairs for negative in pair.hard_negatives]
    return PairBatch(
        sequences=pack_sequences(sequences, pad_to_multiple, tile_shape),
        query_ids=_hashes(pair.pair.query_id for pair in pairs),
        target_ids=_hashes(pair.pair.target_id for pair in pairs),
        hard_negative_ids=_hashes(name for pair in pairs for name in pair.hard_negative_ids),
        subset=subset,
        keys=[pair.pair.key for pair in pairs],
        num_skipped=num_skipped,
        num_cut=sum(sequence.is_cut for sequence in sequences),
    )


def _hashes(names: Iterable[str]) -> Tensor:
    return torch.tensor([stable_hash(name) for name in names], dtype=torch.int64)


def stable_hash(text: str) -> int:
    """Signed 64-bit hash, the same in every process and run (Python's own hash is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
