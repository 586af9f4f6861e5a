"""Queries to an index: a text, an image, or both become one embedding by the model of the index."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_llave.batch import MAX_IMAGE_BYTES
from megatron_llave.embedding.cache import require_same_model
from megatron_llave.embedding.embedder import LoadedModel, embed, load_model, read_identity
from megatron_llave.files import read_bytes
from megatron_llave.search.index import MANIFEST, ImageIndex, Manifest
from megatron_llave.search.prompts import Prompts

EmbedQuery = Callable[[str, bytes | None], np.ndarray]
"""Embeds a text ("": none) and the bytes of an image (None: none) as [d] float32 of unit length."""


@dataclass(frozen=True)
class QueryModel:
    """The model of an index, ready for queries."""

    model: LoadedModel
    prompts: Prompts

    def __call__(self, text: str, image: bytes | None, image_name: str | None = None) -> np.ndarray:
        """Embed a query; under torchrun all ranks call it.

        Args:
            text: what is looked for in words; "": nothing.
            image: the bytes of an image file.
            image_name: how a message names the image.

        Raises:
            UserError: there is neither text nor image, or the image cannot be read.
        """
        rows = embed(self.model, {image_name or "of the query": self.prompts.query(text, image)})
        return rows[0].cpu().numpy()


def load_query_model(
    index: ImageIndex, checkpoint: str | None = None, overrides: Sequence[str] = (), prompts: dict[str, str] = {}
) -> QueryModel:
    """Load the model of an index, and check that it is the one that has embedded the images.

    Args:
        index: the index.
        checkpoint: where the model is now; None: where it was.
        overrides: `section.key=value` beside those of the build, such as parallel.tensor=2.
        prompts: texts of queries other than those of the index, by name.

    Raises:
        UserError: the model cannot be loaded, or is another one.
    """
    manifest = index.manifest
    place, all_overrides = checkpoint or manifest.checkpoint, [*manifest.overrides, *overrides]
    folder = require_model_of(index.folder, manifest, place, all_overrides)
    model = load_model(folder, all_overrides, manifest.average)
    return QueryModel(model, replace(manifest.prompts, **prompts))


def require_model_of(folder: Path, manifest: Manifest, checkpoint: str, overrides: Sequence[str]) -> Path:
    """Return the folder of a checkpoint's weights; raise a UserError unless they are the model of an index."""
    _, identity, weights = read_identity(checkpoint, overrides, manifest.average)
    hint = f"llave search build --rebuild embeds the images with {checkpoint}"
    require_same_model(folder / MANIFEST, manifest.model, identity, hint)
    return weights


def read_image(path: str | Path) -> bytes:
    """Read the image file of a query.

    Raises:
        DataError: it cannot be read.
    """
    return read_bytes(path, MAX_IMAGE_BYTES, "name another file")
