"""Damages the files that users bring, and reads them: python tests/mutants.py --count 1000 [READER ...]

Each reader gets a folder with one damaged file. It must return, or raise a UserError of one line; anything else is a
fault: another exception, more than SECONDS, more memory than MEGABYTES, or, where a checksum exists, other content than
was written. tests/test_mutants.py runs a few of each.
"""

import argparse
import io
import json
import operator
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from golden_model import ONEVISION, byte_tokenizer  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from megatron_llave.batch import Pair, Side  # noqa: E402
from megatron_llave.checkpoint.pretrained import find_pretrained  # noqa: E402
from megatron_llave.config.load import load_config  # noqa: E402
from megatron_llave.convert.hf import import_hf  # noqa: E402
from megatron_llave.data.image_files import ImageSettings, decode_image  # noqa: E402
from megatron_llave.data.index import Index, read_index, write_index  # noqa: E402
from megatron_llave.data.shard_reader import ShardReader  # noqa: E402
from megatron_llave.data.shards import write_subset  # noqa: E402
from megatron_llave.data.storage import Storage  # noqa: E402
from megatron_llave.embedding.cache import EmbeddingCache  # noqa: E402
from megatron_llave.embedding.embedder import load_model  # noqa: E402
from megatron_llave.embedding.inputs import Input, Inputs  # noqa: E402
from megatron_llave.embedding.jsonl import read_inputs  # noqa: E402
from megatron_llave.errors import LONGEST_MESSAGE, DataError, UserError, to_one_line  # noqa: E402
from megatron_llave.evaluation.benchmarks.corpus import read_retrieval  # noqa: E402
from megatron_llave.evaluation.benchmarks.mmeb import read_task as read_mmeb  # noqa: E402
from megatron_llave.evaluation.benchmarks.prepared import (  # noqa: E402
    EvaluationSet,
    input_key,
    read_evaluation,
    write_evaluation,
)
from megatron_llave.prepare import columns, swift, tables, vlm2vec, webdataset  # noqa: E402
from megatron_llave.prepare.captions import read_captions  # noqa: E402
from megatron_llave.prepare.jsonl import check_lines  # noqa: E402
from megatron_llave.prepare.own_pairs import check_some  # noqa: E402
from megatron_llave.prepare.shard_jobs import SourceRow  # noqa: E402

SECONDS = 20
MEGABYTES = 600
"""How much the largest resident size of the process may grow over all mutants of a reader."""
TEXTS = ["", "a\0b", "\ud83d", "../x", "x" * 5000]
WORDS = [None, True, 0, -1, 2**63, 10**400, 1e308, *TEXTS, [], {}, [[]], {"": ""}, [None]]
"""What a structure-aware edit puts in the place of a value."""


@dataclass(frozen=True)
class Reader:
    """A reader of the product, with a folder of files that it can read."""

    make: Callable[[Path], None]
    """Writes good files into a folder."""
    files: str
    """Pattern of the files that are damaged, one at a time."""
    read: Callable[[Path], Any]
    """Reads the folder; returns what can be compared."""
    is_part_of: Callable[[Any, Any], bool] | None = None
    """Whether what was read of a damaged folder lies in what was read of the good one; None: there is no checksum."""


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 8])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.choices(range(len(data) + 1), k=2))
    deep = rng.choice([b"[", b"{"]) * 100_000
    piece = rng.choice([b"", data[a:b] * 2, bytes(b - a), rng.randbytes(16), deep, b"\xff\xfe"])
    return data[:a] + piece + data[b if rng.random() < 0.5 else a :]


def edit_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove or double a value somewhere in a JSON file, or in a line of a JSONL file."""
    lines = data.split(b"\n")
    places = [number for number, line in enumerate(lines) if line.strip()]
    is_lines = len(places) > 1 and data[:1] == b"{" and lines[places[0]].rstrip().endswith(b"}")
    number = rng.choice(places) if is_lines else None
    try:
        value = json.loads(data if number is None else lines[number])
    except ValueError:
        return flip(data, rng)
    nodes = list(containers(value))
    if not nodes:
        return flip(data, rng)
    node = rng.choice(nodes)
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    action = rng.random()
    if action < 0.7:
        node[key] = rng.choice(WORDS)
    elif action < 0.85:
        del node[key]
    elif isinstance(node, list):
        node.append(node[key])
    else:
        node[f"{key}s"] = node[key]
    text = json.dumps(value).encode()
    if number is None:
        return text
    lines[number] = text
    return b"\n".join(lines)


def containers(value: Any) -> Iterator[Any]:
    """All dictionaries and lists in a parsed JSON that are not empty."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def damage(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    is_json = file.suffix in (".json", ".jsonl")
    kind = rng.choice([flip, cut, splice, *([edit_json] * 4 if is_json else [flip, splice])]) if data else None
    file.write_bytes(kind(data, rng) if kind else b"\0")


class Slow(BaseException):
    """A reader took more than SECONDS."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Slow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time, because a busy machine is no fault of a reader
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(name: str, count: int, folder: Path, seed: int = 0, say: Callable[[str], None] = print) -> Counter[str]:
    """Read `count` damaged folders; returns how many were unharmed, refused, changed or faults of each kind."""
    reader, results = READERS[name], Counter()
    good = folder / "good"
    good.mkdir(parents=True)
    reader.make(good)
    right = reader.read(good)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        rng = random.Random(f"{name} {seed} {number}")
        bad = folder / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        damage(rng.choice(sorted(file for file in bad.rglob(reader.files) if file.is_file())), rng)
        result, detail = read_damaged(reader, bad, right)
        results[result] += 1
        if result not in ("unharmed", "refused", "changed, no checksum"):
            say(f"{name} {seed} {number}: {result}: {detail}")
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak > MEGABYTES * 1000:
        results["over memory"] += 1
    return results


def read_damaged(reader: Reader, folder: Path, right: Any) -> tuple[str, str]:
    """Read a damaged folder; returns what came of it, with details."""
    try:
        with limited(SECONDS):
            found = reader.read(folder)
    except UserError as error:
        message = str(error)
        is_line = message == to_one_line(message) and len(message) <= LONGEST_MESSAGE
        return ("refused", message) if is_line else ("not one line", message)
    except Slow:
        return "hang", ""
    except Exception:
        return "traceback", traceback.format_exc()
    if reader.is_part_of is None:
        return "unharmed" if repr(found) == repr(right) else "changed, no checksum", ""
    return ("unharmed", "") if reader.is_part_of(found, right) else ("changed", f"{found!r:.500}")


# ---- the readers ----


def image(seed: int) -> bytes:
    """A small image file."""
    return (ROOT / "tests/golden/mmeb/eval/ImageNet-1K" / f"{seed % 4}.png").read_bytes()


def make_shards(folder: Path) -> None:
    sides = [(Side(f"find {i}", [image(i)] if i % 2 else []), Side(f"target {i}", [])) for i in range(6)]
    pairs = (
        Pair(f"cats-{i}", "cats", query, target, f"q{i}", f"t{i}", [Side("no", [])], ["n"])
        for i, (query, target) in enumerate(sides)
    )
    write_index(folder, Index({"cats": write_subset(pairs, folder, "cats", "retrieval", 3)}))


def read_shards(folder: Path) -> list[Pair]:
    """The pairs that training would take; damaged ones are left out one by one."""
    index = read_index(folder, check_shards=False)
    reader, pairs = ShardReader(Storage(str(folder), None), 4), []
    for shard in index.subsets["cats"].shards:
        for number in range(shard.pairs):
            try:
                pairs.append(reader.read(shard, number))
            except DataError:
                pass
    return pairs


def all_in(found: list, right: list) -> bool:
    """Whether each item that was found is one of the right ones, and none was found more often than it is there."""
    rest = list(right)
    for item in found:
        if item not in rest:
            return False
        rest.remove(item)
    return True


def make_config(folder: Path) -> None:
    text = (ROOT / "examples" / "tiny.yaml").read_text()
    (folder / "run.yaml").write_text(text)
    overrides = ["train.steps=5", "data.subsets={a: {weight: 2}}", "model.freeze=[vision]", "train.output=a b"]
    (folder / "overrides.txt").write_text("\n".join(overrides))


def read_config(folder: Path) -> Any:
    text = (folder / "overrides.txt").read_bytes().decode(errors="surrogateescape")
    return load_config(folder / "run.yaml", text.split("\n"))


def make_hf(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ONEVISION / name, folder)
    byte_tokenizer(folder)
    grids = json.loads((folder / "config.json").read_text())["image_grid_pinpoints"]
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 56, "width": 56}}
    settings["image_grid_pinpoints"] = grids
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def embed(folder: Path) -> list[str]:
    """An embedding by a model; rounded, because threads may add in another order."""
    model = load_model(folder)
    return [f"{value:.4f}" for value in model.embed("a red car").tolist()]


def read_hf(folder: Path) -> Any:
    """Everything that is read before the weights are; the weights of safetensors have no checksum."""
    pretrained = find_pretrained(folder)
    return pretrained.cfg.model, [(name, array.shape) for name, array in sorted(load_sizes(folder).items())]


def load_sizes(folder: Path) -> dict[str, np.ndarray]:
    try:
        embed(folder)
        return load_file(folder / "model.safetensors")
    except UserError:
        raise
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise AssertionError("the product read what safetensors does not") from error
        raise


def make_lines(folder: Path) -> None:
    lines = [{"id": f"d{i}", "text": f"text {i}", "image": ["a.png"]} for i in range(4)]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [{"subset": "s", "id": f"p{i}", "query": {"text": "q"}, "target": lines[0]} for i in range(3)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))


def make_qrels(folder: Path) -> None:
    lines = "".join(json.dumps({"id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(5))
    for name in ("queries", "corpus"):
        (folder / f"{name}.txt").write_text(lines)
    (folder / "judgements.qrels").write_text("".join(f"d{i} 0 d{(i + 1) % 5} 1\n" for i in range(5)))


def read_qrels(folder: Path) -> Any:
    return read_retrieval(folder / "queries.txt", folder / "corpus.txt", folder / "judgements.qrels").judgements


def make_parquet(folder: Path) -> None:
    (folder / "VOC2007").mkdir()
    (folder / "0.png").write_bytes(image(0))
    row = {"qry_text": "<|image_1|>\nWhat is it?", "qry_img_path": "0.png"}
    row |= {"tgt_text": ["a", "b"], "tgt_img_path": ["", ""]}
    pq.write_table(pa.Table.from_pylist([row] * 3), folder / "VOC2007" / "test-00000-of-00001.parquet")


INPUTS = Inputs("inputs", [Input(f"text {i}") for i in range(30)], ".")


def make_store(folder: Path) -> None:
    store = EmbeddingCache(folder, INPUTS)
    store.claim({"weights": "w"})
    rows = np.random.default_rng(0).normal(size=(len(INPUTS), 8)).astype(np.float32)
    for part in range(store.num_parts):
        store.write(part, rows[store.bounds[part] : store.bounds[part + 1]])


def read_store(folder: Path) -> list[list[float]]:
    store = EmbeddingCache(folder, INPUTS)
    store.claim({"weights": "w"})
    gone = set(store.missing())
    kept = [i for part in range(store.num_parts) if part not in gone for i in range(*store.bounds[part : part + 2])]
    return store.rows(np.array(kept, np.int64)).tolist() if kept else []


def make_sets(folder: Path) -> None:
    sides = [Side(f"text {i}", [image(i)]) for i in range(4)]
    inputs = {input_key(side): side for side in sides}
    keys = list(inputs)
    write_evaluation(folder, inputs, [EvaluationSet("one", "retrieval", "ind", keys, keys, [0, 1, 2, 3])])


def make_checkpoint(folder: Path) -> None:
    source = folder.parent / "hf"
    source.mkdir(exist_ok=True)
    make_hf(source)
    import_hf(source, folder / "checkpoint", load_model(source).groups)


def make_captions(folder: Path) -> None:
    rows = [(f"{i}.png", f"a {word} thing, {i}") for i, word in enumerate(("red", "blue", "gr\u00fcn"))]
    (folder / "a.csv").write_text("image,caption\n" + "".join(f'{image},"{text}"\n' for image, text in rows))
    (folder / "b.tsv").write_text("image\tcaption\n" + "".join(f"{image}\t{text}\n" for image, text in rows))
    (folder / "c.txt").write_text("".join(f"{image}\t{text}\n" for image, text in rows))
    (folder / "d.jsonl").write_text("".join(json.dumps({"file_name": i, "text": t}) + "\n" for i, t in rows))


def read_caption_files(folder: Path) -> list:
    return [caption[:2] for file in sorted(folder.iterdir()) for caption in read_captions(file)]


def make_tables(folder: Path) -> None:
    rows = [{"anchor": f"q {i}", "positive": {"bytes": image(i), "path": "a.png"}} for i in range(40)]
    table = pa.Table.from_pylist([row | {"negatives": ["x", "y"], "label": [1, 0.5, 0]} for row in rows])
    pq.write_table(table, folder / "a.parquet", row_group_size=15)
    with pa.ipc.new_stream(folder / "b.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=15)
    with pa.ipc.new_file(folder / "c.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=15)
    texts = [{"query": f"q {i}", "positive": {"path": "a.png"}, "negative_1": "x", "score": None} for i in range(5)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "e.json").write_text(json.dumps(texts))
    (folder / "f.csv").write_text("sentence1,sentence2,score\n" + "".join(f'a {i},"b, c",0.{i}\n' for i in range(5)))


def read_tables(folder: Path) -> list:
    return [shown(row) for file in sorted(folder.iterdir()) for row in rows_of_table(file)]


def rows_of_table(file: Path) -> Iterator[SourceRow]:
    table = tables.open_table(file)
    return columns.read_pairs(table, columns.check_roles(table, columns.known_roles(table)), "s", 0)


def shown(row: SourceRow) -> list:
    """A row with the bytes of its images."""
    images = [image for side in (row.query, *row.targets) for image in side.images]
    read = [image if isinstance(image, str) else image.read() for image in images]
    return [row.fault, row.query.text, [side.text for side in row.hard_negatives], row.scores, read]


def make_swift(folder: Path) -> None:
    text = [{"role": "user", "content": "<image>a"}]
    line = {"messages": text, "images": ["a.png"], "positive_messages": [text], "positive_images": [["b.png"]]}
    old = {"query": "<image>a", "response": "b", "rejected_response": ["c"], "images": ["a.png"], "label": None}
    lines = [line, line | {"negative_messages": [text], "negative_images": [["c.png"]]}, old]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_swift(folder: Path) -> list:
    return [row.fault or row for _, row in swift.read_rows([folder / "a.jsonl"])]


def make_tars(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(6):
            values = json.dumps({"caption": f"text {number}"}).encode()
            members = {"png": image(number), "json": values, "txt": b"a caption"}
            for suffix, data in list(members.items())[: 3 - number % 2]:
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def read_tars(folder: Path) -> list:
    check_some(lambda: (("captions", row) for row in webdataset.read_pairs(folder / "a.tar")))
    return [shown(row) for row in webdataset.read_pairs(folder / "a.tar")]


def make_list(folder: Path) -> None:
    row = {"qry": "q", "qry_image_path": "a.png", "pos_text": "p", "pos_image_path": "", "neg_text": ["n", "m"]}
    pq.write_table(pa.Table.from_pylist([row] * 3), folder / "rows.parquet")
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    sets = {name: {"dataset_parser": "mmeb_neg", "dataset_name": name} for name in ("rows.parquet", "rows.jsonl")}
    (folder / "list.yaml").write_text(json.dumps({name[5:]: entry | {"weight": 0.5} for name, entry in sets.items()}))


def read_listed(folder: Path) -> list:
    listed = vlm2vec.read_list(folder / "list.yaml", folder)
    return [row.fault or row for entry in listed for row in vlm2vec.read_rows(entry)] + [
        vlm2vec.mixture_of(listed, "out")
    ]


def make_images(folder: Path) -> None:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm", "avif", "jpeg2000"):
        pixels.save(folder / f"a.{kind}", kind)


def read_images(folder: Path) -> list:
    return [decode_image(file.read_bytes(), ImageSettings(10_000)).tobytes() for file in sorted(folder.iterdir())]


READERS = {
    "shards": Reader(make_shards, "*.tar", read_shards, all_in),
    "index": Reader(make_shards, "index.json", read_index),
    "configuration": Reader(make_config, "*", read_config),
    "hf": Reader(make_hf, "*", read_hf),
    "checkpoint": Reader(make_checkpoint, "*", lambda folder: embed(folder / "checkpoint"), operator.eq),
    "jsonl": Reader(
        make_lines, "*", lambda f: (list(read_inputs(f / "items.jsonl")), check_lines([f / "pairs.jsonl"]))
    ),
    "parquet": Reader(make_parquet, "*.parquet", lambda f: read_mmeb(f, f, "VOC2007").digest),
    "qrels": Reader(make_qrels, "*", read_qrels),
    "captions": Reader(make_captions, "*", read_caption_files),
    "tables": Reader(make_tables, "*", read_tables),
    "swift": Reader(make_swift, "*", read_swift),
    "webdataset": Reader(make_tars, "*", read_tars),
    "vlm2vec": Reader(make_list, "*", read_listed),
    "images": Reader(make_images, "*", read_images),
    "store": Reader(make_store, "*", read_store, all_in),
    "sets": Reader(make_sets, "*", lambda f: sorted(read_evaluation(f)[0].items(), key=str), all_in),
}


def main() -> int:
    """Run the readers; the status is 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", default=list(READERS))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faults = 0
    for name in args.readers:
        with tempfile.TemporaryDirectory() as folder:
            results = run(name, args.count, Path(folder), args.seed)
        print(f"{name:14}", dict(results), flush=True)
        faults += sum(number for kind, number in results.items() if kind not in OK)
    return 1 if faults else 0


OK = ("unharmed", "refused", "changed, no checksum")

if __name__ == "__main__":
    sys.exit(main())
