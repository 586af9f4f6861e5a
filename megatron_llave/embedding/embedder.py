"""Loads a checkpoint and embeds texts and images as unit vectors, spread over the data-parallel ranks.

model = load_model("CHECKPOINT or HF_DIR")
vectors = model.embed(["A cat and a dog", Side.read("<image>\\nRepresent the given image.", "cat.jpg")])
"""

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Module

from megatron_llave.batch import PackedSequences, Side, to_device
from megatron_llave.checkpoint.pretrained import Pretrained, find_pretrained, of_first_rank
from megatron_llave.config.checks import require_same_adapters, require_same_model
from megatron_llave.config.load import override_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.packing import EncodedSequence, Processor, pack_sequences
from megatron_llave.data.tokenizer import TOKENIZERS
from megatron_llave.distributed import collectives, cpu_emulation, process_groups
from megatron_llave.distributed.layout import validate_layout
from megatron_llave.distributed.schedule import run_schedule
from megatron_llave.embedding.describe import describe
from megatron_llave.embedding.embeddable import Embeddable, to_sides
from megatron_llave.errors import BadInputError, DataError, NotFiniteError
from megatron_llave.models import build_model, build_processor
from megatron_llave.models.blocks.kernels import row_multiple
from megatron_llave.processes import end_with_launcher


@dataclass(repr=False)
class LoadedModel:
    """A model ready to embed, at the parallel layout of this process group."""

    cfg: RunConfig
    chunks: list[Module]
    encoder: Processor
    groups: ProcessGroupCollection
    progress: Callable[[str], None] = lambda doing: None
    """Called with what is being done, for each input that is read and each row that is embedded."""
    source: Pretrained | None = None
    """The weights that were loaded; None for a model in training."""
    average: bool = False
    """Whether the averaged weights were loaded."""
    image_notes: Counter[str] = field(default_factory=Counter)
    """How many images that this replica has embedded lost something when they were read (data.image_files)."""

    def identity(self) -> dict[str, str]:
        """What the embeddings depend on (Pretrained.identity), on the first rank; empty on the others.

        Raises:
            CheckpointError: the loaded weights cannot be read any more.
        """
        assert self.source is not None
        return self.source.identity(self.cfg, self.average) if dist.get_rank() == 0 else {}

    def print_image_notes(self, among: str = "") -> None:
        """Print one line on how many images of all replicas lost something when they were read; all ranks call it.

        `among` says of which inputs they are, if not of all.
        """
        of_replicas: list[Counter[str]] = [Counter()] * self.groups.dp.size()
        dist.all_gather_object(of_replicas, self.image_notes, group=self.groups.dp)
        counts = sum(of_replicas, Counter())
        if counts and dist.get_rank() == 0:
            noticed = ", ".join(f"{count} x {note}" for note, count in counts.most_common())
            print(f"noticed{among}: {noticed} (docs/data.md says how they are read)", file=sys.stderr)

    def pack(self, encoded: list[EncodedSequence]) -> PackedSequences:
        """Return a row of these sequences, or of padding alone, as this rank of the layout needs it."""
        layout, shape = self.cfg.parallel, self.encoder.tile_shape
        row = pack_sequences(encoded, row_multiple(self.cfg.model, layout), shape, layout.context)
        return row.part(self.groups.cp.rank())

    def embed(self, inputs: Embeddable | Iterable[Embeddable]) -> Tensor:
        """Embed inputs as float32 of unit length on every rank: a list of them as [n, d] in their order, one as [d].

        Args:
            inputs: an input, or an iterable of them. An input is a text, a `pathlib.Path` of an image file, a PIL
                image, a uint8 array [h, w] (grey), [h, w, 3] (RGB) or [h, w, 4] (RGBA), the bytes of an image file, a
                mapping with `text` and `image` (one of these or a file's name, or a list of them), a tuple (text,
                image), or a Side.

        Raises:
            DataError: an input is none of these or cannot be read; the message names its index.
            NotFiniteError: an embedding is not finite.
        """
        sides, is_single = to_sides(inputs)
        rows = embed(self, {str(index): side for index, side in enumerate(sides)})
        return rows[0] if is_single else rows

    def __repr__(self) -> str:
        """Three lines, because a notebook shows it: what model, what it takes and gives, where it lies."""
        place = None if self.source is None else self.source.place
        return describe(self.cfg, self.chunks, place, self.average, dist.get_world_size())


def load_model(path: str | Path, overrides: Sequence[str] = (), average: bool = False) -> LoadedModel:
    """Build the model that a folder holds and load its weights.

    The parallel layout of its training is not used: every process is a data-parallel rank unless `overrides`
    (parallel.tensor=2, ...) say otherwise.

    Args:
        path: a checkpoint, a run's output directory, a Hugging Face folder in either format, or the name of a model on
            the hub (hub.py).
        overrides: `section.key=value`, which win over the checkpoint's configuration.
        average: whether to load the averaged weights of a run with loss.reward=ema.

    Raises:
        UserError: there is no checkpoint, or no averaged weights in it; the weights that its adapters are for are gone
            or others; an override or the parallel layout is invalid.
    """
    end_with_launcher()
    cpu_emulation.enable()
    found = find_pretrained(path)
    cfg = _configure(found, overrides)
    process_groups.initialize_distributed(cfg.parallel.timeout_seconds)
    pretrained = of_first_rank(found)
    if pretrained is not found:
        cfg = _configure(pretrained, overrides)
    validate_layout(cfg.model, cfg.parallel, dist.get_world_size())
    groups = process_groups.initialize_model_parallel(cfg.parallel, cfg.train.seed)
    pretrained.require_plausible()
    chunks = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), seed=None, lora=cfg.lora)
    pretrained.load(chunks, groups, average, cfg.lora.base)
    for chunk in chunks:
        chunk.eval()
    encoder = build_processor(cfg.data, cfg.model)
    return LoadedModel(cfg, chunks, encoder, groups, source=pretrained, average=average)


def read_identity(
    path: str | Path, overrides: Sequence[str] = (), average: bool = False
) -> tuple[RunConfig, dict[str, str], Path]:
    """The configuration, the identity and the folder of the weights that load_model would load; builds no model.

    Raises:
        UserError: as load_model does.
    """
    pretrained = find_pretrained(path)
    cfg = _configure(pretrained, overrides)
    return cfg, pretrained.identity(cfg, average), pretrained.folder


def _configure(pretrained: Pretrained, overrides: Sequence[str]) -> RunConfig:
    """The configuration of these weights with the caller's changes; the arguments are those of load_model."""
    cfg = pretrained.cfg
    tokenizer = pretrained.find_tokenizer() or cfg.data.tokenizer
    cfg = override_config(replace(cfg, data=replace(cfg.data, tokenizer=tokenizer)), overrides)
    require_same_model(cfg.model, pretrained.cfg.model, str(pretrained.folder))
    require_same_adapters(cfg.lora, pretrained.cfg.lora, str(pretrained.folder), "lora.rank=0 merges them")
    if not cfg.data.tokenizer and not cfg.data.path:
        raise DataError(
            f"{pretrained.assets} has neither {' nor '.join(TOKENIZERS)}; set data.tokenizer (llave convert "
            "import makes one of vocab.json and merges.txt)"
        )
    return cfg


def embed(model: LoadedModel, sides: Mapping[str, Side]) -> Tensor:
    """Embed inputs as [n, d] float32 in their order on every rank, the work spread over the data-parallel ranks.

    A rank reads from the mapping only the inputs that it embeds.

    Raises:
        DataError: an input cannot be read; the message names its key.
    """
    groups = model.groups
    encoded = [_encode(model, key, sides) for key in islice(sides, groups.dp.rank(), None, groups.dp.size())]
    local = embed_encoded(model, encoded)
    dist.broadcast(local, dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)
    counts = [len(range(rank, len(sides), groups.dp.size())) for rank in range(groups.dp.size())]
    gathered = collectives.all_gather_rows(local, counts, groups.dp)  # [n, d] rank by rank
    places = torch.cat([torch.arange(rank, len(sides), groups.dp.size()) for rank in range(groups.dp.size())])
    embeddings = torch.empty_like(gathered)
    embeddings[to_device(places, gathered.device)] = gathered
    require_finite(embeddings, sides)
    return embeddings


def embed_parts(
    model: LoadedModel, parts: Iterable[Mapping[str, Side]], skip_bad: bool = False
) -> Iterator[Tensor | None]:
    """Embed parts of inputs one after the other on this replica alone; threads read and decode one part ahead.

    Args:
        model: the model; its data-parallel ranks may have different parts, and different numbers of them.
        parts: the parts, the same on all ranks of a replica.
        skip_bad: whether an input that cannot be read gets a row of zeros, which no embedding is, and no error.

    Yields:
        [inputs of the part, d] float32 in their order, on one rank of the replica; None on its other ranks.

    Raises:
        DataError: an input cannot be read; the message names its key.
    """
    groups = model.groups
    has_result = groups.pp.rank() == groups.pp.size() - 1 and groups.tp.rank() == groups.cp.rank() == 0
    pool = ThreadPoolExecutor(model.cfg.evaluate.threads)
    try:
        ahead: deque[list[Future[EncodedSequence]]] = deque()
        for part in chain(parts, [None]):
            if part is not None:
                ahead.append([pool.submit(_encode, model, key, part) for key in part])
            if ahead and (part is None or len(ahead) > 1):
                rows = _embed_readable(model, ahead.popleft(), skip_bad)
                yield rows if has_result else None
    finally:
        pool.shutdown(cancel_futures=True)


def _embed_readable(model: LoadedModel, inputs: Sequence[Future[EncodedSequence]], skip_bad: bool) -> Tensor:
    """Embed encoded inputs as [n, d]; with `skip_bad` those that raised a BadInputError get rows of zeros."""
    is_bad = [skip_bad and isinstance(future.exception(), BadInputError) for future in inputs]
    readable = [number for number, bad in enumerate(is_bad) if not bad]
    embedded = embed_encoded(model, [inputs[number].result() for number in readable])
    rows = embedded.new_zeros(len(inputs), embedded.shape[1])
    rows[to_device(torch.tensor(readable, dtype=torch.int64), rows.device)] = embedded
    return rows


def embed_encoded(model: LoadedModel, encoded: list[EncodedSequence]) -> Tensor:
    """Embed this replica's inputs as [n, d] float32 in their order; zeros except on the last pipeline stage."""
    model.image_notes.update(note for sequence in encoded for note in sequence.image_notes)
    # Sequences of similar length share a row, so that attention pads them little.
    order = sorted(range(len(encoded)), key=lambda index: encoded[index].length)
    outputs = forward_only(model, list(packed_rows([encoded[index] for index in order], model)))
    rows = torch.zeros(len(encoded), model.cfg.model.language.hidden_size, device=process_groups.device())
    if model.groups.pp.rank() == model.groups.pp.size() - 1 and encoded:
        rows[to_device(torch.tensor(order), rows.device)] = torch.cat(outputs)
    return rows


def require_finite(embeddings: Tensor, keys: Iterable[str]) -> None:
    """Check that the embeddings [n, d] of the inputs `keys` are finite: a ranking would hide NaN.

    Raises:
        NotFiniteError: names the first input whose embedding is not finite, and says how many there are.
    """
    is_bad = ~embeddings.isfinite().all(dim=1)  # [n]
    num_bad = int(is_bad.sum())
    if num_bad:
        first = next(islice(keys, int(is_bad.int().argmax()), None))
        count = f"{num_bad} of {len(is_bad)} inputs that were embedded together"
        hint = "take an earlier checkpoint or, if the weights are finite, model.precision=fp32"
        raise NotFiniteError(f"input {first} has no finite embedding ({count}); {hint}")


def _encode(model: LoadedModel, key: str, sides: Mapping[str, Side]) -> EncodedSequence:
    model.progress(f"reading input {key}")
    try:
        return model.encoder.encode(sides[key])
    except DataError as error:
        raise BadInputError(f"input {key} cannot be embedded: {error}") from error


def packed_rows(encoded: list[EncodedSequence], model: LoadedModel) -> Iterator[PackedSequences]:
    """Pack sequences into rows of at most `evaluate.tokens_per_batch` tokens; a longer one gets a row of its own."""
    row: list[EncodedSequence] = []
    num_tokens = 0
    for sequence in encoded:
        if row and num_tokens + sequence.length > model.cfg.evaluate.tokens_per_batch:
            yield model.pack(row)
            row, num_tokens = [], 0
        row.append(sequence)
        num_tokens += sequence.length
    yield model.pack(row)


def forward_only(model: LoadedModel, rows: list[PackedSequences]) -> list[Tensor]:
    """Run rows through megatron-core's schedule: embeddings [n, d] of each on the last pipeline stage, else empty."""
    stages, num_chunks = model.groups.pp.size(), len(model.chunks)
    missing = -len(rows) % stages if num_chunks > 1 else 0  # the interleaved schedule needs a multiple of the stages
    empty = model.pack([])
    padded = rows + [empty] * missing
    forward_step = partial(_forward_step, progress=model.progress)
    lengths = [sum(row.padded_lengths) for row in padded]
    return run_schedule(model.chunks, padded, len(padded), max(lengths), forward_step, forward_only=True)[: len(rows)]


def _forward_step(
    rows: Iterator[PackedSequences], chunk: Module, progress: Callable[[str], None]
) -> tuple[Tensor, object]:
    progress("embedding inputs")
    return chunk(next(rows).to(process_groups.device())), lambda output, non_loss_data: output
