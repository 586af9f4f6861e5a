"""verify and inspect of what was mined: nothing is wrong with a right folder, and each fault is one line."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.batch import Pair, Side
from megatron_llave.commands import prepare
from megatron_llave.config.mining import Rules
from megatron_llave.data.index import Index, Shard, read_index, write_index
from megatron_llave.data.mined_negatives import parse_manifest
from megatron_llave.data.shards import read_samples, to_json_bytes, unpack_json, write_samples, write_subset
from megatron_llave.mining import negatives_folder
from megatron_llave.mining.inputs import read_subsets
from megatron_llave.mining.mined import Mined

N = 12


def write(folder: Path, size: int = N) -> Path:
    """Shards of five pairs; each query has two pairs, and so two positives. The last pair cannot be read."""
    pairs = [
        Pair(f"b{i}", "birds", Side(f"query {i // 2}", []), Side(f"target {i}", []), f"q{i // 2}", f"t{i}")
        for i in range(size)
    ]
    index = Index({"birds": write_subset(pairs, folder, "birds", "retrieval", 5)})
    last = folder / index.subsets["birds"].shards[-1].file
    last.write_bytes(last.read_bytes().replace(b'"id":"t11"', b'"id":"t99"'))
    write_index(folder, index)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, groups: ProcessGroupCollection) -> dict[str, Path]:
    """The shards, their negatives as mining writes them, and an order."""
    root = tmp_path_factory.mktemp("made")
    data, out = write(root / "data"), root / "mined"
    out.mkdir()
    plan = {"models": [{"weights": "abc"}], "rules": asdict(Rules()), "data": {"sha256": "d"}}
    index = read_index(data, check_shards=False)
    assert not negatives_folder.claim(out, plan, index, overwrite=False)
    (inputs,) = read_subsets(data, index, ["birds"], [])
    queries = len(inputs.query_ids)
    numbers = np.array([[(2 * query + step) % (N - 1) for step in (3, 4)] for query in range(queries)])
    report = {"pairs": N, "pairs_with_negatives": N - 1, "queries": queries, "queries_dropped": 0, "targets": N - 1}
    report |= {"queries_without_negatives": 0, "kept": 2 * queries, "left_out_together": {"max_uses": 0}}
    report["models"] = [{"candidates": 60, "depth": 0, "ratio": 6, "kept": 54}]
    mined = Mined(
        numbers, np.full((queries, 2), 0.5, np.float32), np.zeros(queries, bool), np.ones((queries, 3)), report
    )
    negatives_folder.finish(
        out,
        {"checkpoints": ["tiny"], **plan},
        [(inputs, mined, negatives_folder.write_subset(out, data, inputs, mined))],
    )
    order = root / "order"
    order.mkdir()
    shards = [{"file": shard.file, "sha256": shard.sha256} for shard in index.subsets["birds"].shards]
    of_birds = {"shards": shards, "order": list(range(N))[::-1], "pairs": N, "clusters": 3, "left_over": 0}
    of_birds |= {"connections": 4, "connections_inside": 3, "hardest": []}
    value = {"format": "megatron_llave order", "version": 1, "cluster_size": 4, "checkpoints": ["tiny"], **plan}
    value |= {"rules": {"cluster_size": 4, "skip": 0}, "subsets": {"birds": of_birds}}
    (order / "order.json").write_text(json.dumps(value))
    return {"data": data, "mined": out, "order": order}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, list[str]]:
    """Exit status and lines of stdout, or those of stderr where the command refuses."""
    status: object = 0
    try:
        prepare.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        status = stopped.code
    printed = capsys.readouterr()
    return status, (printed.err if status == 2 else printed.out).splitlines()


@pytest.mark.parametrize("name", ["mined", "order"])
def test_nothing_is_wrong_with_what_mining_writes(made: dict[str, Path], capsys, name: str) -> None:
    assert run(capsys, "verify", made[name])[0] == 0
    status, lines = run(capsys, "verify", made[name], "--data", made["data"])
    assert status == 0 and lines[-1].endswith(f"and it is of the shards in {made['data']}"), lines


def change(file: str, key: str, edit: Callable[[dict], None] | None) -> Callable[[Path], None]:
    """Write a file of negatives anew with the JSON of one sample edited, or without it; all checksums are right."""

    def changed(out: Path) -> None:
        samples = []
        for sample in read_samples(out / file):
            described, name = unpack_json(sample, ""), sample["__key__"]
            if name == key and edit is None:
                continue
            if name == key:
                edit(described)
            samples.append((described.pop("key", name), {"json": to_json_bytes(described)}))
        register(out, write_samples(samples, out / file))

    return changed


def register(out: Path, shard: Shard) -> None:
    manifest = json.loads((out / "negatives.json").read_text())
    for entry in manifest["subsets"]["birds"]["shards"]:
        entry.update(asdict(shard) if entry["file"] == shard.file else {})
    (out / "negatives.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (change("birds-000000.tar", "b1", None), "birds-000000.tar has no sample b1, which the data's birds-0"),
        (
            change("birds-000001.tar", "b6", lambda sample: sample.update(key="b99")),
            "sample b99 is of no pair of the data's birds-000001.tar; mine again",
        ),
        (
            change("birds-000000.tar", "b2", lambda sample: sample.update(query="q4")),
            "sample b2: is of query 'q4', the data's pair is of 'q1'; mine again",
        ),
        (
            change("birds-000000.tar", "b2", lambda sample: sample["hard_negatives"][1].update(id="t3")),
            "sample b2: negative 1 has the id 't3' of a positive of its query 'q1'; mine again",
        ),
        (
            change("birds-000000.tar", "b2", lambda sample: sample["hard_negatives"][0].update(id="t99")),
            "sample b2: negative 0 has the id 't99', which no target of the subset has; mine again",
        ),
    ],
)
def test_each_fault_of_negatives_is_a_line(made: dict[str, Path], tmp_path: Path, capsys, broken, message) -> None:
    out = Path(shutil.copytree(made["mined"], tmp_path / "out"))
    broken(out)
    assert run(capsys, "verify", out)[0] == 0  # by themselves they are right
    status, lines = run(capsys, "verify", out, "--data", made["data"])
    assert status == 1 and any(message in line for line in lines), lines
    assert len(lines) == 2 + message.startswith("sample b99") and lines[-1] == f"{len(lines) - 1} problems", lines


def test_damage_and_other_shards_are_lines(made: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = Path(shutil.copytree(made["mined"], tmp_path / "out"))
    file = out / "birds-000000.tar"
    file.write_bytes(file.read_bytes().replace(b'"id":"t4"', b'"id":"t5"', 1))
    status, lines = run(capsys, "verify", out, "--data", made["data"])
    assert status == 1 and [*map(lambda line: "checksum was made of" in line, lines)].count(True) == 1, lines
    cut = Path(shutil.copytree(made["data"], tmp_path / "cut"))
    (cut / "birds-000000.tar").write_bytes((cut / "birds-000000.tar").read_bytes()[:3000])
    status, lines = run(capsys, "verify", made["mined"], "--data", cut)
    assert status == 1 and len(lines) == 2 and "birds-000000.tar is truncated or not a tar" in lines[0], lines
    other = write(tmp_path / "other", 10)
    status, lines = run(capsys, "verify", made["mined"], "--data", other)
    assert status == 1 and "is of 3 shards of subset birds, the data have 2; mine again" in lines[0], lines
    status, lines = run(capsys, "verify", made["order"], "--data", other)
    assert status == 1 and "is of 3 shards of subset birds, the data have 2; run `llave mine batches`" in lines[0]
    status, lines = run(capsys, "verify", made["data"], "--data", other)
    assert status == 2 and "is for mined negatives and orders, but" in lines[-1]


@pytest.mark.parametrize(("name", "file"), [("mined", "negatives.json"), ("order", "order.json")])
def test_what_has_no_subsets_is_not_right(made: dict[str, Path], tmp_path: Path, capsys, name: str, file: str) -> None:
    out = Path(shutil.copytree(made[name], tmp_path / "out"))
    (out / file).write_text(json.dumps(json.loads((out / file).read_text()) | {"subsets": {}}))
    for more in ((), ("--data", made["data"])):
        status, lines = run(capsys, "verify", out, *more)
        assert status == 1 and f"{file} has no subsets; " in lines[0] and lines[1:] == ["1 problems"], lines


def test_an_order_has_each_pair_once(made: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = Path(shutil.copytree(made["order"], tmp_path / "out"))
    value = json.loads((out / "order.json").read_text())
    value["subsets"]["birds"]["order"][3] = 0
    (out / "order.json").write_text(json.dumps(value))
    status, lines = run(capsys, "verify", out)
    assert status == 1 and "order.json is incomplete: the 12 entries of subset birds lack pair 8" in lines[0], lines
    status, lines = run(capsys, "inspect", out)
    assert status == 2 and len(lines) == 1 and "lack pair 8" in lines[0]


def test_inspect_prints_models_rules_counts_and_age(made: dict[str, Path], tmp_path: Path, capsys) -> None:
    status, lines = run(capsys, "inspect", made["mined"])
    printed = "\n".join(lines)
    assert status == 0 and "birds, tiny: of 60 candidates, left out ratio 10.0 %" in printed
    assert "model: tiny\nits weights: abc\nrules: --negatives 5 --depth 100" in printed
    assert "negatives.json was written: 20" in printed and "UTC, 0.0 hours ago" in printed
    status, lines = run(capsys, "inspect", made["order"])
    assert status == 0 and "75.0 %" in "\n".join(lines) and "rules: --cluster-size 4 --skip 0" in lines
    large = Path(shutil.copytree(made["order"], tmp_path / "large"))
    text = (large / "order.json").read_text()
    (large / "order.json").write_text(
        text.replace('"cluster_size": 4', '"cluster_size": 13').replace('ters": 3', 'ters": 0')
    )
    assert "birds: its 12 pairs fill no cluster of 13; its batches are random" in run(capsys, "inspect", large)[1]
    status, lines = run(capsys, "inspect", made["order"], "--preset", "tiny")
    assert status == 2 and "are for a folder of shards, but" in lines[-1]
    out = Path(shutil.copytree(made["mined"], tmp_path / "out"))
    manifest = json.loads((out / "negatives.json").read_text())
    for wrong, message in (
        ({"complete": False}, "has not ended"),
        ({"rules": 3}, "is malformed .*AttributeError"),
    ):
        (out / "negatives.json").write_text(json.dumps({**manifest, **wrong}))
        status, lines = run(capsys, "inspect", out)
        assert status == 2 and message.partition(" .*")[0] in lines[-1], lines
    assert parse_manifest(made["mined"] / "negatives.json", "").subsets.keys() == {"birds"}
