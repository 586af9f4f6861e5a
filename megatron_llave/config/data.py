"""The section `data` of the configuration: training pairs and the mixture."""

import math
import re
from dataclasses import dataclass, field

from megatron_llave.config.loss import OBJECTIVES, is_margin
from megatron_llave.errors import at_least, one_of, require

REMOTE = re.compile(r"(https?://|pipe:)")
"""How data.path begins where it is an address on the network or a command, and not a folder."""
META_TASKS = ("classification", "vqa", "retrieval", "grounding")
IMAGE_CORRECTIONS = ("exif_rotation", "bit_depth")
VIDEO_NEWLINES = ("one_token", "grid", "frame", "no_token")
PROMPTS = ("qwen", "plain", "vlm2vec_v2", "gme", "qwen3_vl_embedding")
INSTRUCTION_PROMPTS = ("gme", "qwen3_vl_embedding")
"""Prompts with a place of their own for an instruction, which a first line that begins with `Instruct:` gives."""


@dataclass
class SubsetConfig:
    """One subset of the training mixture."""

    weight: float | None = None
    """Share of the batches that this subset gets, relative to the other subsets. null: its number of pairs to the power
    of data.size_power."""
    start_step: int = 0
    """First step (counted from 0) at which the subset is drawn. This makes a curriculum for models that are trained
    from scratch."""
    mask_same_target: bool | None = None
    """Value of loss.mask_same_target in the steps of this subset; null: that of `loss`."""
    mask_margin: float | None = None
    """Value of loss.mask_margin in the steps of this subset, .inf to mask nothing; null: that of `loss`."""
    negatives: str | None = None
    """own: in the steps of this subset, the negatives of a pair are only its own hard negatives, as with
    loss.negatives=own; null: those of `loss`."""
    objective: str | None = None
    """Value of loss.objective in the steps of this subset; null: that of `loss`."""
    alpha: float | None = None
    """Value of loss.alpha in the steps of this subset; null: that of `loss`."""
    temperature: float | None = None
    """Value of loss.temperature in the steps of this subset; null: that of `loss`."""


@dataclass
class DataConfig:
    """Training pairs."""

    path: str = ""
    """Folder of WebDataset shards with an index.json, as made by llave prepare. On the network:
    http(s)://HOST/FOLDER, or pipe:COMMAND with {file} in the command, such as pipe:aws s3 cp s3://bucket/pairs/{file}
    -"""
    cache: str | None = None
    """Local folder for copies of the shards on the network, in which each user's are private; null: a folder of the
    user in the system's temporary folder."""
    cache_gb: float = 200.0
    """Gigabytes of shard copies that are kept on each node."""
    retries: int = 5
    """Number of further attempts after a network failure; they wait 1, 2, 4, ... seconds."""
    workers: int = 2
    """Number of worker processes that decode coming steps, per rank that reads data; 0: the training process
    decodes."""
    tokenizer: str | None = None
    """SentencePiece .model or Hugging Face tokenizer.json. null: the tokenizer of the checkpoint that the run starts
    from, else the tokenizer.json in data.path, or the tokenizer.model where data.path has no tokenizer.json."""
    prompt: str = "qwen"
    """Prompt template: qwen (that of the released models), plain (text and end-of-sequence token), or for the Qwen-VL
    families that of an embedding model: vlm2vec_v2, gme or qwen3_vl_embedding (docs/qwen_vl.md)."""
    max_length: int = 4096
    """Maximum sequence length in tokens. Longer text is cut before the end of the template, so the pooled token is
    never lost."""
    image_token_without_image: str = "blank"
    """What an image placeholder in a text without an image becomes, in llava_onevision with prompt=qwen: blank (a tile
    of zeros, with which the released weights were trained) or remove."""
    video_newline: str = "one_token"
    """Where image_newline is inserted among the tokens of a video: one_token (after the last token), grid (after each
    row of each frame), frame (after each frame) or no_token. This is mm_newline_position of the official LLaVE
    repository."""
    hard_negatives: int = 0
    """Maximum number of hard negatives that are used per pair, taken from the start of its list. Each query is compared
    with the hard negatives of all pairs that it is compared with."""
    negatives: str | None = None
    """Folder of mined hard negatives for the shards of data.path, as made by llave mine negatives, or their address
    on the network like that of data.path. A pair gets them after its own hard negatives, and data.hard_negatives is the
    maximum of both together. null: there are none."""
    order: str | None = None
    """Folder with an order of the pairs of data.path in which batches are hard, as made by llave mine batches, or its
    address on the network like that of data.path. Batches are then made of its clusters, in an order that the seed
    shuffles for each epoch; train.global_batch_size / data.sub_batches must be a multiple of their size. null: the
    pairs are shuffled."""
    positives: int | None = None
    """Maximum number of targets that are used per pair, taken from the start of its list; null: all. With several, the
    loss of a pair is the mean over them."""
    subsets: dict[str, SubsetConfig] = field(default_factory=dict)
    """Mixture: subset name -> its settings. Empty: every subset of the index."""
    size_power: float = 1.0
    """Exponent of the weights of subsets without a weight of their own: pairs ** size_power. 1: weighted by size, so
    that an epoch has each pair once; 0: equal weights."""
    sub_batches: int = 1
    """Number of parts of a global batch, each of which is drawn from one subset. 1: all negatives of a pair are from
    its own subset."""
    too_long: str = "cut"
    """What happens to a pair with a text beyond data.max_length: cut the text, or skip the pair like a bad one."""
    min_pixels: int | None = None
    """Images of the Qwen-VL families with fewer pixels are enlarged; null: the pixels of 4 visual tokens."""
    max_pixels: int | None = None
    """Images of the Qwen-VL families with more pixels are shrunk; null: the pixels of 1280 visual tokens."""
    max_image_pixels: int = 89_000_000
    """Images with more pixels (width x height) than this are not decoded, and their pairs are bad. A side may have at
    most 1,000,000 pixels."""
    image_background: list[int] | None = field(default_factory=lambda: [255, 255, 255])
    """Colour (red, green, blue; 0 to 255) that transparent pixels are blended onto. null: alpha is dropped, as in the
    official LLaVE repository, which shows the colour that is stored under it, often black."""
    image_corrections: list[str] = field(default_factory=lambda: list(IMAGE_CORRECTIONS))
    """What is done beyond the official repository when an image is read: exif_rotation (images are rotated and mirrored
    as their EXIF orientation says) and bit_depth (16-bit grey, 32-bit integers and floats are scaled to 8 bits, as
    docs/data.md says; without it, values above 255 become white)."""
    max_bad_fraction: float = 0.01
    """Training stops when a larger fraction of a rank's pairs is bad (damaged, missing, empty or too large). Fewer bad
    pairs are dropped, counted and logged. The fraction is taken of at least 1000 pairs, so 0.01 always allows 10 of
    them."""

    def __post_init__(self) -> None:
        """Check names and sizes."""
        one_of("data.prompt", self.prompt, PROMPTS)
        one_of("data.image_token_without_image", self.image_token_without_image, ("blank", "remove"))
        require(self.max_length >= 8, f"data.max_length={self.max_length} must be at least 8 tokens")
        one_of("data.video_newline", self.video_newline, VIDEO_NEWLINES)
        one_of("data.too_long", self.too_long, ("cut", "skip"))
        for correction in self.image_corrections:
            one_of("data.image_corrections", correction, IMAGE_CORRECTIONS)
        colour = self.image_background
        ok = colour is None or (len(colour) == 3 and all(0 <= value <= 255 for value in colour))
        require(ok, f"data.image_background={colour} must be null or [red, green, blue], each from 0 to 255")
        at_least(self, "data", 0, ("hard_negatives", "cache_gb", "retries", "workers", "size_power"))
        at_least(self, "data", 1, ("positives", "sub_batches", "max_image_pixels", "min_pixels", "max_pixels"))
        ok = None in (self.min_pixels, self.max_pixels) or self.min_pixels <= self.max_pixels
        require(ok, f"data.min_pixels={self.min_pixels} is above data.max_pixels={self.max_pixels}")
        allowed = 0 <= self.max_bad_fraction <= 1
        require(allowed, f"data.max_bad_fraction={self.max_bad_fraction} must be from 0 to 1")
        for name, subset in self.subsets.items():
            ok = subset.weight is None or (math.isfinite(subset.weight) and subset.weight > 0)
            require(ok, f"data.subsets.{name}.weight={subset.weight} must be positive")
            at_least(subset, f"data.subsets.{name}", 0, ("start_step", "alpha"))
            ok = subset.temperature is None or 0 < subset.temperature < math.inf
            require(ok, f"data.subsets.{name}.temperature={subset.temperature} must be positive")
            is_margin(f"data.subsets.{name}.mask_margin", subset.mask_margin)
            if subset.negatives is not None:
                one_of(f"data.subsets.{name}.negatives", subset.negatives, ("own",))
            if subset.objective is not None:
                one_of(f"data.subsets.{name}.objective", subset.objective, OBJECTIVES)
