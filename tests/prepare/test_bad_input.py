"""Every kind of damage costs the pairs it hits: they are left out, counted, logged; too many stop the run."""

import io
import itertools
import json
import pickle
import re
import struct
import tarfile
import zlib

import pytest
from letters import Letters
from PIL import Image

from megatron_llave.batch import Pair, Side
from megatron_llave.config.data import DataConfig
from megatron_llave.config.schema import RunConfig, TrainConfig
from megatron_llave.data.index import INDEX_FILE, Index, write_index
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.shards import write_subset
from megatron_llave.data.step_buffer import unpack_step
from megatron_llave.errors import DataError
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor

PER_SHARD, SHARDS, BATCH = 10, 4, 8
NUM_PAIRS = PER_SHARD * SHARDS
FILE = "cats-000002.tar"
VICTIM = "cats-25"
"""In FILE."""


def png(size=(28, 28)):
    data = io.BytesIO()
    Image.new("RGB", size, (90, 0, 0)).save(data, "PNG")
    return data.getvalue()


def make_pair(number):
    key = f"cats-{number}"
    return Pair(key, "cats", Side(f"cat {number}", [png()]), Side("cat", []), key, "cat")


@pytest.fixture
def folder(tmp_path):
    """Four shards of ten pairs."""
    subset = write_subset(map(make_pair, range(NUM_PAIRS)), tmp_path, "cats", "retrieval", PER_SHARD)
    write_index(tmp_path, Index({"cats": subset}))
    return tmp_path


def rewrite(folder, change):
    """Write FILE again with other members: `change` takes and gives a list of (name, bytes). The index follows."""
    path = folder / FILE
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = json.loads((folder / INDEX_FILE).read_text())
    index["subsets"]["cats"]["shards"][2]["bytes"] = path.stat().st_size
    (folder / INDEX_FILE).write_text(json.dumps(index))


def change_member(name, change):
    return lambda folder: rewrite(folder, lambda members: [(n, change(d) if n == name else d) for n, d in members])


def change_pair(change):
    """Of the victim's JSON, and without the checksums, which would be seen first."""

    def edit(data):
        described = json.loads(data)
        del described["json_crc32"]  # as in a shard of other tools
        described["query"].pop("crc32")
        change(described)
        return json.dumps(described).encode()

    return change_member(f"{VICTIM}.json", edit)


def replace_picture(data):
    def edit(members):
        members = dict(members)
        described = json.loads(members[f"{VICTIM}.json"])
        del described["json_crc32"]
        described["query"]["crc32"] = [zlib.crc32(data)]
        new = {f"{VICTIM}.json": json.dumps(described).encode(), f"{VICTIM}.query.0.png": data}
        return list((members | new).items())

    return lambda folder: rewrite(folder, edit)


def bomb():
    """A small PNG whose header says 60,000 x 60,000."""
    data = png()
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def truncate(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:3000])


def scramble_header(folder):
    """The tar keeps its size, so that only reading it tells."""
    data = bytearray((folder / FILE).read_bytes())
    data[:512] = b"\xff" * 512
    (folder / FILE).write_bytes(data)


BAD = {
    "truncated tar": (truncate, PER_SHARD, "is truncated or changed: 3000 bytes"),
    "missing tar": (lambda folder: (folder / FILE).unlink(), PER_SHARD, "is missing, though the index names it"),
    "damaged tar": (scramble_header, PER_SHARD, "cannot be read as a tar"),
    "empty shard": (lambda folder: rewrite(folder, lambda _: []), PER_SHARD, "holds 0 pairs, index.json says 10"),
    "wrong checksum": (change_member(f"{VICTIM}.query.0.png", lambda d: d[:-1] + b"x"), 1, "bytes are not those"),
    "missing JSON": (
        lambda folder: rewrite(folder, lambda members: [m for m in members if m[0] != f"{VICTIM}.json"]),
        1,
        "has no .json member",
    ),
    "no JSON": (change_member(f"{VICTIM}.json", lambda data: data[:-9]), 1, "not valid JSON"),
    "missing picture": (
        lambda folder: rewrite(folder, lambda members: [m for m in members if m[0] != f"{VICTIM}.query.0.png"]),
        1,
        "named in the JSON but not in the tar",
    ),
    "damaged picture": (replace_picture(png()[:50]), 1, "not a readable image"),
    "image bomb": (replace_picture(bomb()), 1, "exceeds( the)? limit of [0-9]+ pixels"),
    "path trick": (
        lambda folder: rewrite(folder, lambda ms: [(n.replace(VICTIM, f"../{VICTIM}"), d) for n, d in ms]),
        1,
        "must be 1 to 80 letters",
    ),
    "pickled member": (
        lambda folder: rewrite(folder, lambda ms: [*ms, (f"cats-{PER_SHARD * 3 - 1}.pkl", pickle.dumps(print))]),
        1,
        "its JSON does not name the members pkl",
    ),
    "zero-length text": (change_pair(lambda d: d["target"].update(text="")), 1, "neither text nor image"),
    "beyond the limit": (change_pair(lambda d: d["target"].update(text="x" * 400)), 1, "beyond data.max_length=64"),
}


def epoch(folder, workers=0, **data):
    """The micro batches of one epoch on one rank."""
    data = DataConfig(path=str(folder), prompt="plain", max_length=64, workers=workers, **data)
    cfg = RunConfig(data=data, train=TrainConfig(global_batch_size=BATCH))
    encoder = LlavaOnevisionProcessor(Letters(), "plain", 64, (), 28, 14, too_long="skip")
    stream = build_train_stream(cfg, encoder, 0, 1, 1)
    steps = list(itertools.islice(stream, NUM_PAIRS // BATCH))
    return [batch for step in steps for batch in unpack_step(step).batches]


@pytest.mark.parametrize("kind", BAD)
def test_bad_pairs_are_left_out_counted_and_logged(folder, caplog, kind):
    damage, lost, message = BAD[kind]
    damage(folder)
    batches = epoch(folder, max_bad_fraction=0.5)
    kept = sorted(key for batch in batches for key in batch.keys)
    assert len(kept) == len(set(kept)) == NUM_PAIRS - lost
    assert sum(batch.num_skipped for batch in batches) == lost
    assert re.search(message, caplog.text) and (FILE in caplog.text or VICTIM in caplog.text)
    if lost == PER_SHARD:
        assert kept == sorted(f"cats-{i}" for i in range(NUM_PAIRS) if i // PER_SHARD != 2)


@pytest.mark.parametrize("kind", BAD)
def test_beyond_the_budget_the_run_stops_and_says_what_was_wrong(folder, kind):
    damage, lost, message = BAD[kind]
    damage(folder)
    with pytest.raises(DataError, match="more than data.max_bad_fraction=0") as caught:
        epoch(folder, max_bad_fraction=0.0)
    assert re.search(message, str(caught.value))


def test_first_pairs_count_as_a_thousand(folder):
    (folder / FILE).unlink()
    with pytest.raises(DataError, match="with it 10 of 40 pairs are lost, more than data.max_bad_fraction=0.2"):
        epoch(folder, max_bad_fraction=0.2)
    scattered = {f"cats-{i}.json" for i in range(20, 26)}
    write_index(folder, Index({"cats": write_subset(map(make_pair, range(40)), folder, "cats", "retrieval", 10)}))
    rewrite(folder, lambda members: [(n, b"{" if n in scattered else d) for n, d in members])
    assert sum(batch.num_skipped for batch in epoch(folder, max_bad_fraction=0.006)) == 6
    with pytest.raises(DataError, match="6 of [0-9]+ pairs were bad, more than data.max_bad_fraction=0.005"):
        epoch(folder, max_bad_fraction=0.005)


def test_what_a_worker_meets_is_one_error_here(folder):
    BAD["damaged picture"][0](folder)
    batches = epoch(folder, workers=2, max_bad_fraction=0.5)
    assert sum(batch.num_skipped for batch in batches) == 1
    with pytest.raises(DataError, match="1 of .* pairs were bad.*not a readable image"):
        epoch(folder, workers=2, max_bad_fraction=0.0)


def test_cut_texts_are_counted(folder):
    BAD["beyond the limit"][0](folder)
    data = DataConfig(path=str(folder), prompt="plain", max_length=64, workers=0)
    stream = build_train_stream(
        RunConfig(data=data, train=TrainConfig(global_batch_size=BATCH)),
        LlavaOnevisionProcessor(Letters(), "plain", 64, (), 28, 14),
        rank=0,
        world=1,
        pad_to_multiple=1,
    )
    batches = [unpack_step(step).batches[0] for step in itertools.islice(stream, NUM_PAIRS // BATCH)]
    assert sum(batch.num_cut for batch in batches) == 1 and sum(batch.num_skipped for batch in batches) == 0
