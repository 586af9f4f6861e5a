"""MMEB-eval, the 36 test sets of the MMEB benchmark, read from their Parquet files into tasks.

The columns are those that the official MMEB evaluation reads: qry_text, qry_img_path and the lists tgt_text and
tgt_img_path, whose first entry is the right one. The texts include their instructions. Names, meta-tasks and splits are
those of arXiv 2410.05160, table 2; the 20 sets in distribution are those with a training subset.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_llave.config.model import ModelConfig
from megatron_llave.config.presets import PRESETS
from megatron_llave.config.schema import RunConfig
from megatron_llave.embedding.inputs import Input
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmark import Benchmark
from megatron_llave.evaluation.task import Task, build_task
from megatron_llave.options import evaluate as options

META_TASKS = {
    ("classification", "ind"): ("ImageNet-1K", "N24News", "HatefulMemes", "VOC2007", "SUN397"),
    ("classification", "ood"): ("Place365", "ImageNet-A", "ImageNet-R", "ObjectNet", "Country211"),
    ("vqa", "ind"): ("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"),
    ("vqa", "ood"): ("ScienceQA", "VizWiz", "GQA", "TextVQA"),
    ("retrieval", "ind"): (
        *("VisDial", "CIRR", "VisualNews_t2i", "VisualNews_i2t"),
        *("MSCOCO_t2i", "MSCOCO_i2t", "NIGHTS", "WebQA"),
    ),
    ("retrieval", "ood"): ("FashionIQ", "Wiki-SS-NQ", "OVEN", "EDIS"),
    ("grounding", "ind"): ("MSCOCO",),
    ("grounding", "ood"): ("RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"),
}
SETS = {name: kind for kind, names in META_TASKS.items() for name in names}
"""The 36 data sets, spelled as in the test data, with (meta-task, split)."""

PUBLISHED = {
    "0.5b": {"classification": 57.4, "vqa": 50.3, "retrieval": 59.8, "grounding": 82.9, "overall": 59.1},
    "2b": {
        **{"classification": 62.1, "vqa": 60.2, "retrieval": 65.2, "grounding": 84.9, "overall": 65.2},
        **{"ind": 69.4, "ood": 59.8},
    },
    "7b": {
        **{"classification": 65.7, "vqa": 65.4, "retrieval": 70.9, "grounding": 91.9, "overall": 70.3},
        **{"ind": 75.0, "ood": 64.4},
    },
}
"""Mean Precision@1 in percent of the published LLaVE models, by preset (arXiv 2503.04812, table 1)."""

FILES_HINT = "the paths must start from the folder that --images names, or evaluate.images while training"
COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


def choose_sets(source: str | Path, subsets: Sequence[str] | None, asked_by: str = "--subsets") -> list[str]:
    """The data sets asked for, or all that the folder holds, in the order of the paper.

    Args:
        source: folder of MMEB-eval.
        subsets: names of data sets; None or empty: all there are.
        asked_by: name of the option that gave them, for messages.

    Raises:
        ConfigError: a name is not that of an MMEB data set.
        DataError: the folder holds none of the data sets.
    """
    for name in subsets or ():
        if name not in SETS:
            raise ConfigError(f"{asked_by}: {name!r} is no data set of MMEB-eval, which are {', '.join(SETS)}")
    if not Path(source).is_dir():
        raise DataError(f"{source} is not a folder; it must be that of MMEB-eval")
    chosen = [name for name in SETS if (name in subsets if subsets else (Path(source) / name).is_dir())]
    if not chosen:
        raise DataError(f"{source} holds no folder of an MMEB-eval data set, such as {next(iter(SETS))}/")
    return chosen


def read_task(source: str | Path, image_folder: str | Path, name: str) -> Task:
    """Read one data set.

    Args:
        source: folder with `<name>/test-00000-of-00001.parquet`, in one part or more.
        image_folder: folder that the image paths are relative to.
        name: one of SETS.

    Raises:
        DataError: a file is missing or damaged, a column is missing, or a row is malformed or has no right candidate.
    """
    rows = []
    for number, row in enumerate(_read_rows(Path(source) / name)):
        where = f"data set {name} of {source}, row {number}"
        query = _input(row["qry_text"], row["qry_img_path"], where, "qry")
        rows.append((query, _candidates(row, where)))
    if not rows:
        raise DataError(f"data set {name} of {source} has no rows; download it again")
    return build_task(name, *SETS[name], rows, image_folder, FILES_HINT)


def _candidates(row: dict[str, Any], where: str) -> list[Input]:
    texts, images = row["tgt_text"], row["tgt_img_path"]
    if isinstance(texts, str) and isinstance(images, list):
        texts = [texts] * len(images)  # one text that goes with each image
    if not isinstance(texts, list) or not isinstance(images, list):
        raise DataError(f"{where}: tgt_text and tgt_img_path must be lists, not {texts!r:.40} and {images!r:.40}")
    if len(texts) != len(images):
        raise DataError(f"{where}: {len(texts)} entries in tgt_text, but {len(images)} in tgt_img_path")
    if not texts:
        raise DataError(f"{where} has no candidate; the first entry of tgt_text must be the right one")
    return [_input(text, image, where, f"tgt[{index}]") for index, (text, image) in enumerate(zip(texts, images))]


def _input(text: Any, image: Any, where: str, part: str) -> Input:
    text, image = text or "", image or ""
    if not isinstance(text, str) or not isinstance(image, str):
        raise DataError(f"{where}: {part} must be a text and an image path, not {text!r:.40} and {image!r:.40}")
    if not text and not image:
        right = "; it should be the right candidate" if part == "tgt[0]" else ""
        raise DataError(f"{where}: {part} has neither text nor image{right}")
    return Input(text, (image,) if image else ())


def _read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    parts = sorted(folder.glob("test-*-of-*.parquet"))
    wanted = [f"test-{number:05d}-of-{len(parts):05d}.parquet" for number in range(len(parts))]
    if not parts or [part.name for part in parts] != wanted:
        names = ", ".join(part.name for part in parts) or "none"
        raise DataError(f"{folder} must hold test-00000-of-00001.parquet, or all parts (found: {names})")
    for part in parts:
        try:
            with pq.ParquetFile(part) as file:
                missing = [column for column in COLUMNS if column not in file.schema_arrow.names]
                if missing:
                    names = ", ".join(file.schema_arrow.names)
                    raise DataError(f"{part} has no column {missing[0]!r}; its columns are {names}")
                for batch in file.iter_batches(columns=list(COLUMNS)):
                    yield from batch.to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{part} cannot be read ({' '.join(str(error).split())}); download it again") from error


def published_means(cfg: RunConfig) -> Mapping[str, float] | None:
    """The means of PUBLISHED for the model of the default family whose language model has these sizes."""
    sizes = cfg.model.family, cfg.model.language.hidden_size, cfg.model.language.num_layers
    for name, means in PUBLISHED.items():
        language = PRESETS[name]["language"]
        if sizes == (ModelConfig.family, language["hidden_size"], language["num_layers"]):
            return means
    return None


def _read_tasks(args: argparse.Namespace) -> list[Task]:
    names = choose_sets(args.data, args.subsets)
    return [read_task(args.data, args.images or args.data, name) for name in names]


BENCHMARK = Benchmark(
    **vars(options.MMEB),
    read_tasks=_read_tasks,
    published=published_means,
)
