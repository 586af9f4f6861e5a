"""The golden MMEB-eval sets, and an embedder that gives their golden embeddings instead of a model's."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from megatron_llave.batch import Side
from megatron_llave.embedding.inputs import Inputs
from megatron_llave.evaluation.benchmarks.mmeb import choose_sets, read_task
from megatron_llave.evaluation.task import Task

GOLDEN = Path(__file__).parent / "golden" / "mmeb" / "eval"
NAMES = ["CIRR", "ImageNet-1K", "MSCOCO_t2i", "RefCOCO-Matching"]
IDENTITY = {"weights": "golden"}


def golden_tasks() -> list[Task]:
    return [read_task(GOLDEN, GOLDEN, name) for name in choose_sets(GOLDEN, None)]


def golden_rows(inputs: Inputs) -> torch.Tensor:
    """[inputs, 16] of inputs of a golden set."""
    with np.load(GOLDEN / inputs.name / "embeddings.npz") as file:
        columns = [(file[f"{side}_text"], file[f"{side}_img_path"], file[f"{side}_emb"]) for side in ("qry", "tgt")]
    rows = {(str(t), str(i)): row for texts, images, vectors in columns for t, i, row in zip(texts, images, vectors)}
    return torch.from_numpy(np.stack([rows[entry.text, "".join(entry.images)] for entry in inputs.entries]))


class GoldenEmbedder:
    """Stands for embedding.embed_parts; counts what it is asked for."""

    def __init__(self, is_writer: bool = True, stop_after: int | None = None) -> None:
        self.is_writer, self.stop_after = is_writer, stop_after
        self.asked: list[str] = []

    def __call__(self, parts: Iterable[Mapping[str, Side]]) -> Iterator[torch.Tensor | None]:
        for number, part in enumerate(parts):
            if number == self.stop_after:
                raise KeyboardInterrupt
            assert isinstance(part, Inputs)
            self.asked += part
            yield golden_rows(part) if self.is_writer else None


def assert_released_files(out: Path) -> None:
    """Scores and predictions are those that the official evaluation wrote, byte for byte."""
    for name in NAMES:
        for kind in ("score.json", "pred.txt"):
            expected = (GOLDEN / name / f"expected_{kind}").read_bytes()
            assert (out / f"{name}_{kind}").read_bytes() == expected, f"{name}_{kind} differs from the released file"
