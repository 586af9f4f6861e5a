"""A training step as in the official LLaVE repository, on transformers' modules.

training_step.py and gpu_step.py compare this package with it; qwen_vl_step.py has what Qwen-VL models have instead.
Queries and targets have a forward pass each, and both are padded at their end to the longest of the micro batch. An
input without an image sends a blank tile through vision encoder and projector, whose features are discarded. The
negatives are those of the micro batch. This module also makes the micro batches for both ways: random pixels and
tokens, in the lengths of MMEB.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn import Module

from megatron_llave.batch import PairBatch
from megatron_llave.config.data import DataConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.data.packing import IMAGE, EncodedSequence, TileShape, pack_sequences
from megatron_llave.models import family_of
from megatron_llave.models.blocks.initialization import named_global_parameters
from megatron_llave.models.blocks.siglip import normalise
from megatron_llave.models.hf.mapping import local_kernel_name
from megatron_llave.models.llava_onevision.anyres import visual_layout
from megatron_llave.models.llava_onevision.hf_config import build_config_json
from megatron_llave.models.llava_onevision.processor import image_lengths
from megatron_llave.planning.flops import Work

SIZES = ((640, 480), (640, 427), (480, 640), (500, 375), (375, 500), (500, 333), (1024, 768), (512, 512))
"""Sizes of images, the same as in benchmarks/data_pipeline.py."""
TEXT_AND_IMAGE, TEXT = (30, 55), (15, 60)
"""Minimum and maximum number of tokens of text and template, beside an image and without one."""
HEAD = 14
"""Number of tokens of the template before the image."""


@dataclass(frozen=True)
class Side:
    """A query or a target."""

    sequence: EncodedSequence
    size: tuple[int, int] | None
    """Width and height of its image."""

    @property
    def num_tiles(self) -> int:
        """Number of tiles of its image."""
        return sum(map(len, self.sequence.tiles))


Pair = tuple[Side, Side]


def make_side(model: ModelConfig, has_image: bool, rng: np.random.Generator) -> Side:
    """Make random text, and an image of random pixels in one of SIZES."""
    fewest, most = TEXT_AND_IMAGE if has_image else TEXT
    words = rng.integers(1, model.language.vocab_size, rng.integers(fewest, most + 1)).tolist()
    if not has_image:
        return Side(EncodedSequence(words, [], []), None)
    size, vision = SIZES[rng.integers(len(SIZES))], model.vision
    grids = tuple((columns, rows) for columns, rows in model.image_grids)
    layout = visual_layout(*size, grids, vision.image_size, vision.patches_per_side, model.anyres_max_tiles)
    num_tiles = image_lengths(*size, DataConfig(), model)[1]
    pixels = rng.integers(0, 256, (num_tiles, 3, vision.image_size, vision.image_size), np.uint8)
    return Side(EncodedSequence([*words[:HEAD], IMAGE, *words[HEAD:]], [pixels], [layout]), size)


MakeSide = Callable[[ModelConfig, bool, np.random.Generator], Side]


def make_pair(model: ModelConfig, kind: str, rng: np.random.Generator, make: MakeSide = make_side) -> Pair:
    """Make a pair of a kind such as "image_text"."""
    query, target = (make(model, part == "image", rng) for part in kind.split("_"))
    return query, target


def sequences_of(pairs: Sequence[Pair]) -> tuple[list[Side], list[Side]]:
    """The queries, and the targets."""
    return [query for query, _ in pairs], [target for _, target in pairs]


def tile_shape(model: ModelConfig) -> TileShape:
    """The sizes of the tiles that `make_side` makes."""
    return TileShape(model.vision.image_size, model.vision.patches_per_side**2)


def packed(pairs: Sequence[Pair], shape: TileShape, multiple: int = 1) -> PairBatch:
    """Our micro batch of these pairs."""
    queries, targets = sequences_of(pairs)
    row = pack_sequences([side.sequence for side in (*queries, *targets)], multiple, shape)
    ids = torch.arange(len(pairs))
    return PairBatch(row, ids, ids, ids[:0], "random", [str(i) for i in range(len(pairs))])


def packed_work(pairs: Sequence[Pair]) -> Work:
    """The work for the model when the pairs are packed."""
    sides = [side for pair in pairs for side in pair]
    lengths = [side.sequence.length for side in sides]
    return Work(sum(lengths), sum(n * n for n in lengths), sum(side.num_tiles for side in sides))


def padded_work(pairs: Sequence[Pair]) -> Work:
    """The work for the model when the pairs are padded the official way."""
    tokens = squared = tiles = 0
    for sides in sequences_of(pairs):
        longest = max(side.sequence.length for side in sides)
        tokens, squared = tokens + len(sides) * longest, squared + len(sides) * longest**2
        tiles += sum(side.num_tiles or 1 for side in sides)
    return Work(tokens, squared, tiles)


def total(works: Sequence[Work]) -> Work:
    """The sum of the work."""
    return Work(*(sum(getattr(w, name) for w in works) for name in ("tokens", "squared_lengths", "tiles")))


def build_released(
    model: ModelConfig, dtype: torch.dtype = torch.float32, attention: str = "sdpa", device: str = "cpu"
) -> Module:
    """transformers' LlavaOnevision with random weights and a frozen vision encoder."""
    config = transformers.LlavaOnevisionConfig.from_dict(build_config_json(model, "llava_onevision", True, "float32"))
    with torch.device(device):
        released = transformers.LlavaOnevisionForConditionalGeneration._from_config(
            config, attn_implementation=attention, dtype=dtype
        )
    released.model.vision_tower.requires_grad_(False)
    return released.train()  # the model has no dropout


def copy_weights(chunk: Module, released: Module, model: ModelConfig) -> None:
    """Copy the weights of our only model chunk into the transformers model."""
    hf = family_of(model).hf
    table, values = hf.rules(model), {}
    for name, parameter in named_global_parameters(chunk):
        rule = table[local_kernel_name(name)]
        values |= dict(zip(rule.names, rule.split(parameter.detach())))
    with torch.no_grad():
        for name, parameter in released.named_parameters():
            value = values.pop(hf.canonical_name(name, hf.layouts[0]), None)
            if value is not None:
                parameter.copy_(value)
    assert not values, f"no such tensors there: {sorted(values)}"


@dataclass
class PaddedSides:
    """The queries or the targets of a micro batch of n pairs, padded to the length of the longest."""

    ids: Tensor
    """[n, longest] int64; 0 at visual tokens and padding."""
    is_visual: Tensor
    """[n, longest] bool; whether a position is a visual token."""
    mask: Tensor
    """[n, longest] int64; 1 where there is no padding."""
    pixels: Tensor
    """[tiles, 3, edge, edge], normalised; an input without an image has a blank tile."""
    tiles: list[int]
    """Number of tiles of each input."""
    sizes: list[tuple[int, int] | None]
    """Width and height of the image of each input."""

    @staticmethod
    def of(sides: Sequence[Side], model: ModelConfig, device: torch.device, dtype: torch.dtype) -> "PaddedSides":
        """Pad the inputs."""
        longest, blank = max(side.sequence.length for side in sides), torch.zeros(1, 3, *2 * [model.vision.image_size])
        ids, is_visual, mask = (torch.zeros(len(sides), longest, dtype=torch.int64) for _ in range(3))
        for row, side in enumerate(sides):
            layouts, place = iter(side.sequence.layouts), 0
            for token in side.sequence.tokens:
                width = len(next(layouts)) if token == IMAGE else 1
                (is_visual if token == IMAGE else ids)[row, place : place + width] = 1 if token == IMAGE else token
                place += width
            mask[row, :place] = 1
        tiles = [normalise(torch.from_numpy(np.concatenate(s.sequence.tiles))) if s.size else blank for s in sides]
        tensors = (ids.to(device), is_visual.bool().to(device), mask.to(device), torch.cat(tiles).to(device, dtype))
        return PaddedSides(*tensors, [len(part) for part in tiles], [side.size for side in sides])


def padded(
    pairs: Sequence[Pair], model: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PaddedSides, PaddedSides]:
    """The micro batch of these pairs, padded the official way."""
    queries, targets = (PaddedSides.of(sides, model, torch.device(device), dtype) for sides in sequences_of(pairs))
    return queries, targets


def embed(released: Module, sides: PaddedSides) -> Tensor:
    """Unit vectors [n, h] float32 of one padded forward pass."""
    model = released.model
    visual = visual_tokens(released, sides)
    hidden = model.language_model.embed_tokens(sides.ids)  # [n, longest, h]
    hidden = hidden.masked_scatter(sides.is_visual[..., None], visual.to(hidden.dtype))
    hidden = model.language_model(inputs_embeds=hidden, attention_mask=sides.mask, use_cache=False).last_hidden_state
    last = sides.mask.sum(1) - 1
    return F.normalize(hidden[torch.arange(len(last), device=last.device), last].float(), dim=-1)


def visual_tokens(released: Module, sides: PaddedSides) -> Tensor:
    """Visual tokens [v, h] of all images; the vision encoder also runs on the blank tiles."""
    model = released.model
    newline = model.image_newline
    with torch.no_grad():
        features = model.vision_tower(sides.pixels, output_hidden_states=True).hidden_states[-1]
    parts = model.multi_modal_projector(features).split(sides.tiles)
    images = [part for part, size in zip(parts, sides.sizes) if size]
    if not images:
        return features.new_zeros(0, newline.shape[0])
    heights_and_widths = [(size[1], size[0]) for size in sides.sizes if size]
    made, _ = model.pack_image_features(
        images, heights_and_widths, image_newline=newline, vision_aspect_ratio=model.config.vision_aspect_ratio
    )
    return torch.cat(list(made))


def contrastive_loss(query: Tensor, target: Tensor, temperature: float, alpha: float) -> Tensor:
    """The paper's loss over a micro batch: alpha times its detached cosine is added to the logit of a negative."""
    cosines = query @ target.T
    hardness = alpha * cosines.detach()
    logits = cosines / temperature + hardness.fill_diagonal_(0)
    labels = torch.arange(len(query), device=query.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def take_step(
    embed_sides: Callable[[Any], Tensor],
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[tuple[Any, Any]],
    temperature: float,
    alpha: float,
    clip: float,
) -> float:
    """Take one training step; returns the loss. `embed_sides`: padded queries or targets -> unit vectors [n, h]."""
    losses = []
    for sides in micro_batches:
        query, target = map(embed_sides, sides)
        loss = contrastive_loss(query, target, temperature, alpha)
        (loss / len(micro_batches)).backward()
        losses.append(loss.detach())
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_([parameter for parameter in trained if parameter.grad is not None], clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(torch.stack(losses).mean())
