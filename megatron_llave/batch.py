"""The records that data, model and loss hand to each other.

Shapes: n sequences, t tokens of the packed row, k tiles, p patches per tile, v visual tokens, u blended rows,
b pairs, a targets, m hard negatives, c context ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_llave.errors import DataError
from megatron_llave.files import NO_CHARACTER, read_bytes

MAX_IMAGE_BYTES = 2**30
"""The largest image file that is read."""

MOST_SECONDS = 10**7
"""The latest time of a frame in a video; some four months."""


def check_text(text: str) -> None:
    """Raise a DataError if a text holds a NUL or half a surrogate pair, which are no characters."""
    wrong = NO_CHARACTER.search(text)
    if wrong:
        kind = "a NUL" if wrong[0] == "\0" else "half a surrogate pair, as of a cut emoji"
        raise DataError(f"the text holds {kind} ({wrong[0]!a} at character {wrong.start() + 1}); remove it")


@dataclass
class Side:
    """One input of the model: a query, a target or a hard negative, with text, images, or both."""

    text: str
    """Placeholders and special tokens in it count as such unless a backslash escapes them (data/placeholders.py)."""
    images: list[bytes | Image.Image]
    """The bytes of encoded image files (PNG, JPEG, ...), as stored in the shard, or Pillow images."""
    frames: np.ndarray | None = None
    """[frames, height, width, 3] uint8 RGB, the frames of a video; an input with a video has no images."""
    is_video: bool = False
    """Whether the images are the frames of one video, in their order and of equal size, as shards store videos."""
    seconds: tuple[float, ...] = ()
    """When each frame of the video was taken, seconds; empty: unknown, and models take two frames per second."""

    def __post_init__(self) -> None:
        """Raise a DataError unless the text is Unicode text, and images and seconds are what they may be."""
        if not isinstance(self.text, str):
            raise DataError(f"the text of a Side must be a string, not {self.text!r:.60}")
        if not isinstance(self.images, list) or not all(isinstance(x, (bytes, Image.Image)) for x in self.images):
            right = "a list of the bytes of image files or of PIL images; Side.read(text, FILE) reads files"
            raise DataError(f"the images of a Side must be {right}, not {self.images!r:.60}")
        check_text(self.text)
        self._check_frames()
        self.seconds = tuple(self.seconds)
        num_frames = len(self.images) * self.is_video if self.frames is None else len(self.frames)
        known = [x for x in self.seconds if isinstance(x, Real) and 0 <= x <= MOST_SECONDS]
        is_right = len(known) == len(self.seconds) == num_frames and known == sorted(known)
        if self.seconds and not is_right:
            right = f"rising numbers from 0 to {MOST_SECONDS}, one for each of its {num_frames} frames"
            raise DataError(f"the seconds of a Side must be {right}, not {self.seconds!r:.60}")

    def _check_frames(self) -> None:
        """Raise a DataError for frames that are no video, or that have images beside them."""
        if self.frames is None:
            return
        shape = getattr(self.frames, "shape", ())
        if getattr(self.frames, "dtype", None) != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            right = "a uint8 array [frames, height, width, 3] of at least one frame"
            raise DataError(f"the frames of a Side must be {right}, not {self.frames!r:.60}")
        if self.images:
            raise DataError("a Side has images or the frames of a video, and not both")

    @property
    def num_placeholders(self) -> int:
        """The number of placeholders that the text can have: one per image, or one for a video."""
        return 1 if self.is_video or self.frames is not None else len(self.images)

    @staticmethod
    def read(text: str, *images: str | Path, is_video: bool = False, seconds: tuple[float, ...] = ()) -> "Side":
        """Return the input of a text and the image files that go with it, which may be the frames of a video.

        Raises:
            DataError: an image file cannot be read; the message names it.
        """
        try:
            contents = [read_bytes(image, MAX_IMAGE_BYTES, "name another file") for image in images]
        except DataError as error:
            raise DataError(f"image {error}") from error
        return Side(text, contents, is_video=is_video, seconds=seconds)


@dataclass
class Pair:
    """A query, its targets and its hard negatives as they are read from a shard, not decoded yet."""

    key: str
    """The key in the shard, which is unique in the subset and named in error messages."""
    subset: str
    query: Side
    target: Side
    query_id: str
    """Two queries with equal ids are the same query."""
    target_id: str
    """Two targets with equal ids are the same target, so no negatives of each other with `loss.mask_same_target`."""
    hard_negatives: list[Side] = field(default_factory=list)
    """Further targets that are wrong for this query. They are not the positive of any query."""
    hard_negative_ids: list[str] = field(default_factory=list)
    """One id per hard negative; it equals a target_id when both are the same target."""
    further_targets: list[Side] = field(default_factory=list)
    """The targets after the first one, of a query with several right answers."""
    further_target_ids: list[str] = field(default_factory=list)
    """One id per further target, of the same kind as target_id."""
    scores: list[float] = field(default_factory=list)
    """How well each target and then each hard negative answers the query, as a reranker, a judge or a person says; the
    scale is theirs. Empty: not known."""

    @property
    def targets(self) -> list[Side]:
        """Return all targets."""
        return [self.target, *self.further_targets]

    @property
    def target_ids(self) -> list[str]:
        """Return the ids of all targets."""
        return [self.target_id, *self.further_target_ids]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on `device`. The host does not wait for a GPU, to which page-locked memory is copied."""
    is_upload = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if is_upload else tensor).to(device, non_blocking=is_upload)


def padded_length(length: int, context: int) -> int:
    """Return the length of a sequence in a row that `context` ranks share, each of which has two chunks of it."""
    multiple = 2 * context if context > 1 else 1
    return -(-length // multiple) * multiple


@dataclass
class PackedSequences:
    """n sequences in one row of t tokens, with padding only at the end of the row.

    They lie end to end. If c context ranks share the row, each sequence is padded at its end (`padded_length`), and the
    row has the tokens of one rank after those of the other (data/context.py); a place is an index into it. The
    model takes the `part` of a rank: t / c tokens, v visual tokens among them, and k tiles, as many on every rank.
    """

    tokens: Tensor
    """[t] int64 token ids; 0 at visual tokens and at padding."""
    cu_seqlens: Tensor
    """[n + 1] int32 boundaries of the sequences, padded and end to end; with padding of the row there is one entry
    more."""
    lengths: list[int]
    """Number of tokens of each sequence, and of the padding of the row where there is one, which the host knows without
    waiting for the device. The differences of cu_seqlens are `padded_lengths`."""
    num_sequences: int
    """n, not counting the padding."""
    tiles: Tensor
    """[k, 3, height, width] uint8 pixels of all tiles, in the order of the sequences; k may be 0. The last tile may be
    repeated, so that context ranks have equally many. With `grids`, a tile is one visual token's pixels,
    [k, 4, 3, 2, patch, patch]: four patches of two frames, or [k, 4, 3, 1, patch, patch] if all are images, which have
    both frames equal; every context rank has all tiles."""
    num_tiles: int
    """Number of tiles of the row without repeated ones, also in the part of a rank."""
    visual_source: Tensor
    """[v] int64: visual token i is row visual_source[i] of the features [num_tiles * p] of the row's tiles; row
    num_tiles * p is image_newline, row num_tiles * p + 1 + j is blended row j."""
    visual_position: Tensor
    """[v] int64: the place of visual token i in the row or part; rising if context ranks share the row."""
    last_token: Tensor
    """[n] int64: the place in the row of each sequence's last token, which is the pooled one."""
    positions: Tensor | None = None
    """[3, t] int64: temporal, vertical and horizontal position of each token of the row or part; None: tokens are
    counted from the beginning of their sequence."""
    grids: list[list[int]] = field(default_factory=list)
    """Frames, rows and columns of patches of each image or video, which the host knows; empty: tiles are squares."""
    blank: Tensor | None = None
    """[k] bool: the tiles whose normalised pixels are zeros, which no uint8 value gives; None: no tile is."""
    blend_source: Tensor | None = None
    """[u, 4] int64: the rows of the tiles' features that each blended row is the weighted sum of; an interpolated
    feature map consists of blended rows. None: there are no blended rows."""
    blend_weights: Tensor | None = None
    """[u, 4] float32 weights of the rows in blend_source."""
    context: int = 1
    """c, the number of context ranks that share the row."""
    visual_bounds: list[int] | None = None
    """c + 1 boundaries of the context ranks' visual tokens; None: this is a part, or one rank has the row."""
    features: Tensor | None = None
    """Output of a frozen vision encoder in the first forward pass, kept for the second: [k, p, vision hidden], or with
    grids [1 + d, 4k, vision hidden], of the last layer and of d layers before it."""

    @property
    def num_tokens(self) -> int:
        """Return t, not counting the padding."""
        return sum(self.lengths[: self.num_sequences])

    @property
    def padded_lengths(self) -> list[int]:
        """Return the lengths with the padding of each sequence."""
        return [padded_length(length, self.context) for length in self.lengths]

    def part(self, rank: int) -> "PackedSequences":
        """Return the part of a context rank, as views of the row's tensors; the row itself if one rank has it."""
        if self.visual_bounds is None:
            return self
        start, end = self.visual_bounds[rank : rank + 2]
        t, k = len(self.tokens) // self.context, len(self.tiles) // self.context
        return replace(
            self,
            tokens=self.tokens[rank * t : (rank + 1) * t],
            positions=None if self.positions is None else self.positions[:, rank * t : (rank + 1) * t],
            tiles=self.tiles if self.grids else self.tiles[rank * k : (rank + 1) * k],
            visual_source=self.visual_source[start:end],
            visual_position=self.visual_position[start:end] - rank * t,
            blank=None if self.blank is None else self.blank[rank * k : (rank + 1) * k],
            visual_bounds=None,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedSequences":
        """Apply a function to all tensors."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str) -> "PackedSequences":
        """Return the batch with all its tensors on `device`."""
        return self.map(lambda tensor: to_device(tensor, device))


class RowsOfRanks(NamedTuple):
    """How many rows each data-parallel rank has."""

    pairs: list[int]
    targets: list[int]
    hard_negatives: list[int]


@dataclass
class PairBatch:
    """A micro batch: b queries, their a targets and m hard negatives, packed into one row in this order.

    Targets and hard negatives are in the order of their pairs. A pair has one target or more.
    """

    sequences: PackedSequences
    """b + a + m sequences; b is 0 when no pair of the micro batch could be read."""
    query_ids: Tensor
    """[b] int64 hash of each query_id."""
    target_ids: Tensor
    """[a] int64 hash of each target_id."""
    hard_negative_ids: Tensor
    """[m] int64 hash of each hard negative's id; the number of hard negatives differs from pair to pair."""
    subset: str
    keys: list[str]
    """The keys of the b pairs in their shards."""
    num_skipped: int = 0
    """Number of pairs that were dropped as unreadable. Only the sum over the micro batches of a step has a meaning,
    because pairs are distributed over the micro batches after they are read."""
    num_cut: int = 0
    """Number of sequences whose text was cut to data.max_length."""
    of_ranks: RowsOfRanks | None = None
    """Numbers of rows in this micro batch of each data-parallel rank; None: not exchanged."""
    target_rows: Tensor | None = None
    """[a] int64: the pair, from 0 to b - 1, that each target belongs to, not falling; None: each has one target."""
    hard_rows: Tensor | None = None
    """[m] int64: the pair that each hard negative belongs to, not falling; None: not known."""
    most_targets: int | None = None
    """Largest number of targets of a pair, which the host knows without waiting for the device; None: not known."""
    most_hard_negatives: int | None = None
    """Largest number of hard negatives of a pair, as above."""
    scores: Tensor | None = None
    """[a + m] float32 scores of the targets and hard negatives (Pair.scores), NaN where there is none; None: no pair
    of the micro batch has scores."""
    stored: Tensor | None = None
    """[b + a + m, width of the other model] float32, stored embeddings of unit length of the sequences by another model
    (data/stored_vectors.py); None: the loss takes no hardness from it."""

    @property
    def num_pairs(self) -> int:
        """Return b, the number of pairs."""
        return len(self.keys)

    @property
    def num_targets(self) -> int:
        """Return a, the number of targets."""
        return len(self.target_ids)

    @property
    def num_hard_negatives(self) -> int:
        """Return m, the number of hard negatives."""
        return len(self.hard_negative_ids)

    @property
    def rows_of_targets(self) -> Tensor:
        """Return target_rows, also where each pair has one target."""
        return rows_of_targets(self.target_rows, self.num_pairs, self.target_ids.device)

    def map(self, function: Callable[[Tensor], Tensor]) -> "PairBatch":
        """Apply a function to all tensors."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped = {name: function(value) for name, value in tensors.items() if isinstance(value, Tensor)}
        return replace(self, sequences=self.sequences.map(function), **mapped)

    def to(self, device: torch.device | str) -> "PairBatch":
        """Return the batch with all its tensors on `device`."""
        return self.map(lambda tensor: to_device(tensor, device))

    def part(self, rank: int) -> "PairBatch":
        """Return the batch with the part of a context rank of its row (`PackedSequences.part`)."""
        return replace(self, sequences=self.sequences.part(rank))


def rows_of_targets(target_rows: Tensor | None, num_pairs: int, device: torch.device) -> Tensor:
    """Return target_rows [a] int64; where they are None, target i is that of pair i, of which there are num_pairs."""
    return torch.arange(num_pairs, device=device) if target_rows is None else target_rows


def rows_of_ranks(batches: list[PairBatch]) -> RowsOfRanks | None:
    """Return the rows of each data-parallel rank over several micro batches; None: they were not exchanged."""
    known = [batch.of_ranks for batch in batches if batch.of_ranks is not None]
    if not known or len(known) < len(batches):
        return None
    return RowsOfRanks(*([sum(rank) for rank in zip(*numbers)] for numbers in zip(*known)))


@dataclass
class StepBatches:
    """The data of an optimizer step on one data-parallel rank."""

    batches: list[PairBatch]
    """The micro batches in the order in which they are run."""
    position: dict[str, Any]
    """The position in the data after the step (data/pipeline.py), which is saved with the model."""
    count: int | None = None
    """Number of micro batches of the step, if `batches` is one of them and the others come later; None: it has all."""
    longest: int = 0
    """Tokens of the longest row of all `count` micro batches."""
