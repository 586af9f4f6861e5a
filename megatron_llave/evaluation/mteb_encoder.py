"""An encoder for mteb that embeds with all ranks: mteb runs on the first rank, and the others serve it.

Each call of `encode` on the first rank hands blocks of inputs to all ranks, which embed them through the cache. Between
the calls the other ranks wait in `serve` as long as mteb loads data and scores: over a group of gloo of its own, whose
waits do not end, while no collective of the model's groups is pending that could time out.

A block is found again by its content, so that an interrupted task embeds only the parts that are missing, at any
parallel layout, and inputs that several tasks or splits have in common are embedded once.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from megatron_llave.embedding import cache as parts
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.errors import DataError, one_line
from megatron_llave.evaluation.mteb_instructions import Instructions

Result = TypeVar("Result")

BLOCK_PARTS = 64
"""Number of parts of the cache whose inputs all ranks get together: about 3,600 images, or 32,768 short texts."""
BLOCK_BYTES = 2**29
"""Bytes of images after which a block ends too. Every rank holds a block while it is embedded."""
LONGEST_WAIT = timedelta(days=365)
"""How long the ranks wait for the first one while it loads data or scores."""
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
"""Pillow's modes that a PNG keeps; others become RGB."""


class ImageFile(bytes):
    """The bytes of an image file, which their hash stands for in the digest of inputs.

    The digest takes the repr of an input. That of bytes is made at 60 MB/s, their SHA-256 at 1,700 MB/s.
    """

    def __repr__(self) -> str:
        """The hash of the bytes."""
        return f"SHA-256 {hashlib.sha256(self).hexdigest()}"


class DistributedEncoder:
    """What the first rank gives to mteb, and the other ranks serve; `build_encoder` makes it one of mteb's encoders."""

    mteb_model_meta: Any
    """mteb's ModelMeta."""
    prompts_dict: dict[str, Any] | None
    get_instruction: Callable[..., str]
    """mteb's AbsEncoder has it."""

    def __init__(self, embedder: CachedEmbedder, width: int, instructions: Instructions, meta: Any) -> None:
        """Make the encoder; a collective over all ranks.

        Args:
            embedder: embeds the inputs; it needs a folder, which all ranks share.
            width: d, the width of the embeddings.
            instructions: what stands before the texts.
            meta: mteb's ModelMeta of the model; only the first rank's is used.
        """
        self.embedder, self.width, self.instructions, self.mteb_model_meta = embedder, width, instructions, meta
        self.prompts_dict = dict(instructions.by_name)
        self.failure: Exception | None = None
        """Error of an embedding, which mteb may have caught; the ranks are not in step any more."""
        self.num_inputs = self.num_embedded = 0
        """Number of inputs that mteb has asked for, and of those that were embedded for it."""
        is_alone = dist.get_world_size() == 1
        self._waiting = None if is_alone else dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def run(self, work: Callable[[], Result]) -> Result | None:
        """Call `work`, which gives this encoder to mteb, on the first rank; the others embed for it and return None.

        Raises:
            DataError: on all ranks, where `work` has raised an error on the first one.
        """
        try:
            if dist.get_rank() != 0:
                self._serve()
                return None
            result = work()
            if self.failure is not None:
                raise self.failure
            self._tell(None)
            return result
        except Exception as error:
            if dist.get_rank() == 0 and self.failure is None:
                self._tell(one_line(error))
            raise
        finally:
            if self._waiting is not None and self.failure is None:
                dist.destroy_process_group(self._waiting)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Embed the rows of a DataLoader of mteb as [n, d] float32 of unit length, in their order.

        Args:
            inputs: batches with `text`, `image`, or both.
            task_metadata: of the task, for its instruction.
            hf_split: not used.
            hf_subset: not used.
            prompt_type: whether these are queries or documents; None: neither.
            kwargs: not used.

        Raises:
            DataError: an image cannot be read; the message names the task and the number of the input.
            NotFiniteError: an embedding is not finite.
        """
        is_document = prompt_type is not None and prompt_type.value == "document"
        instruction = (
            self.instructions.for_document(task_metadata)
            if is_document
            else self._instruction(task_metadata, prompt_type)
        )
        rows = [np.empty((0, self.width), np.float32)]
        for block in blocks(self._entries(inputs, instruction), task_metadata.name):
            rows.append(self._embed(block))
        return torch.from_numpy(np.concatenate(rows))

    def _instruction(self, task_metadata: Any, prompt_type: Any) -> str:
        """The instruction of a query, or of an input of a task without queries and documents."""
        names = {task_metadata.name, task_metadata.type, prompt_type and prompt_type.value}
        if not self.instructions.uses_tasks and not names & self.instructions.by_name.keys():
            return ""
        return self.get_instruction(task_metadata, prompt_type)

    def _entries(self, loader: Any, instruction: str) -> Iterator[Input]:
        for batch in undecoded(loader):
            size = len(next(iter(batch.values())))
            for text, image in zip(batch.get("text", [""] * size), batch.get("image", [None] * size), strict=True):
                images = () if image is None else (ImageFile(image_bytes(image)),)
                yield Input(self.instructions.text(instruction, text, bool(images)), images)

    def _embed(self, block: Inputs) -> np.ndarray:
        """Embed a block with all ranks, or read it from the cache; only the first rank calls it."""
        if self.failure is not None:
            raise self.failure
        self.num_inputs += len(block)
        stored = self.embedder.cache(block)
        stored.claim(self.embedder.identity)
        if stored.missing():
            self._tell(block)
            try:
                stored = self.embedder.embed([block])[0]
            except Exception as error:
                self.failure = error
                raise
            self.num_embedded += stored.num_embedded
        return stored.rows(np.arange(len(block)))

    def _serve(self) -> None:
        """Embed what the first rank says, until it has finished."""
        while (message := self._tell(None)) is not None:
            if isinstance(message, str):
                raise DataError(message)
            self.embedder.embed([message])

    def _tell(self, message: Inputs | str | None) -> Inputs | str | None:
        """Give the first rank's message to all: inputs to embed, the error that has ended it, or None at its end."""
        box = [message]
        if self._waiting is not None:
            dist.broadcast_object_list(box, src=0, group=self._waiting)
        return box[0]


def build_encoder(embedder: CachedEmbedder, width: int, instructions: Instructions, meta: Any) -> DistributedEncoder:
    """The encoder as a subclass of mteb's AbsEncoder, on all ranks; the arguments are those of DistributedEncoder.

    mteb is imported on the first rank alone.
    """
    if dist.get_rank() != 0:
        return DistributedEncoder(embedder, width, instructions, meta)
    from mteb.models.abs_encoder import AbsEncoder

    return type("MegatronLlaveEncoder", (DistributedEncoder, AbsEncoder), {})(embedder, width, instructions, meta)


def blocks(entries: Iterable[Input], name: str) -> Iterator[Inputs]:
    """Cut inputs into blocks, which do not depend on the number of ranks; their names hold a hash of their content."""
    first, block, cost, num_bytes = 0, [], 0, 0
    for entry in entries:
        if block and (cost + entry.cost > BLOCK_PARTS * parts.PART_COST or num_bytes >= BLOCK_BYTES):
            yield _named(name, block, first)
            first, block, cost, num_bytes = first + len(block), [], 0, 0
        block.append(entry)
        cost += entry.cost
        num_bytes += sum(map(len, entry.images))
    if block:
        yield _named(name, block, first)


def _named(name: str, entries: list[Input], first: int) -> Inputs:
    block = Inputs(name, entries, ".", first)
    block.name = f"{name}-{block.digest[:16]}"
    return block


def undecoded(loader: Any) -> Any:
    """The DataLoader with images as the bytes of their files, where its data set stores those: ranks decode them."""
    import datasets

    data = loader.dataset
    features = data.features if isinstance(data, datasets.Dataset) else {}
    if not isinstance(features.get("image"), datasets.Image):
        return loader
    data = data.cast_column("image", datasets.Image(decode=False))
    return torch.utils.data.DataLoader(data, batch_size=loader.batch_size, collate_fn=loader.collate_fn)


def image_bytes(image: Any) -> bytes:
    """The bytes of an image file: those that a data set of `datasets` stores, or a PNG of a Pillow image."""
    if isinstance(image, Mapping):
        if image["bytes"] is not None:
            return image["bytes"]
        with open(image["path"], "rb") as file:
            return file.read()
    if not isinstance(image, Image.Image):
        raise DataError(f"mteb gave an image of type {type(image).__name__}, where Pillow images are expected")
    content = io.BytesIO()
    (image if image.mode in PNG_MODES else image.convert("RGB")).save(content, "PNG", compress_level=1)
    return content.getvalue()
