"""The examples of docs/formats.md: each makes its data and becomes pairs; in the slow tier each trains ten steps."""

import json
import re
from pathlib import Path

import pytest
from doc_commands import ROOT, guide_blocks
from forking import run_script
from shard_pairs import read_shard

from megatron_llave.commands import prepare
from megatron_llave.evaluation.benchmarks.prepared import read_tasks

PAGE = ROOT / "docs" / "formats.md"
SECTIONS = {
    match[1]: match[2] for match in re.finditer(r"^## (.*)\n((?:(?!## ).*\n)*)", PAGE.read_text(), re.MULTILINE)
}
EXAMPLES = [name for name, text in SECTIONS.items() if "```python" in text]
RESULTS = {
    # Of each example the folder, the numbers of pairs, hard negatives and held-out sets, and texts of one pair.
    "Columns of sentence-transformers and datasets": ("data/columns", 40, 1, 0, "Find an image: a wall in aqua", ""),
    "Embedding data of ms-swift": ("data/swift", 36, 1, 2, "a wall in aqua", "<image>"),
    "Lists of VLM2Vec and B3": (
        *("data/vlm2vec", 40, 2, 0),
        *("Find a wall in aqua.\n", "<|image_1|>\nRepresent the given image.\n"),
    ),
    "Tars of WebDataset and img2dataset": ("data/tars", 36, 0, 2, "a wall in aqua", "Represent the given image."),
    "An imagefolder": ("data/walls", 36, 0, 2, "a wall in aqua", "Represent the given image."),
}


def follow(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Do what a section of the page says."""
    blocks = {block.text: block for block in guide_blocks(PAGE)}
    for block in (block for text, block in blocks.items() if text in SECTIONS[name]):
        if block.language == "python":
            exec(compile(block.text, str(PAGE), "exec"), {})
        for command in block.commands():
            words = re.findall(r'"[^"]*"|\S+="[^"]*"|\S+', command)[2:]
            prepare.main(
                [word.replace('"', "") for word in words] + ([] if "tokenizer" in words else ["--workers", "1"])
            )
    capsys.readouterr()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_becomes_pairs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    follow(name, capsys)
    folder, count, negatives, sets, query, target = RESULTS[name]
    pairs = [pair for shard in sorted(Path(folder).glob("*.tar")) for pair in read_shard(shard)]
    assert (len(pairs), {len(pair.hard_negatives) for pair in pairs}) == (count, {negatives})
    assert all(len(pair.query.images + pair.target.images) == 1 for pair in pairs)
    assert (len(read_tasks(folder)) if sets else 0) == sets and Path(folder, "tokenizer.model").is_file()
    assert (query, target) in [(pair.query.text, pair.target.text) for pair in pairs]
    report = [json.loads(line) for line in Path(folder, "report.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in report} == {"noticed: image of one colour"}, "the example's images are plain"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_trains_ten_steps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    follow(name, capsys)
    steps = ["train.steps=10", "train.global_batch_size=8", "log.interval=5", "data.workers=0"]
    given = [f"data.path={RESULTS[name][0]}", "train.output=runs/own", *steps]
    launch = ROOT / "examples" / "pretrain_llave_tiny.sh"
    done = run_script(launch, "--config", ROOT / "examples" / "own_data.yaml", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in Path("runs/own/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 10 and all(0 < loss < 10 for loss in losses)


def test_the_page_shows_every_source_of_other_trainers(capsys: pytest.CaptureFixture[str]) -> None:
    assert EXAMPLES == list(RESULTS)
    for command in ("columns", "swift", "vlm2vec", "webdataset"):
        assert f"prepare_data.py {command} " in PAGE.read_text()
    with pytest.raises(SystemExit):
        prepare.main(["columns", "--source", "x.parquet", "--out", "data/x", "--set", "colour=red"])
    assert "--set colour=red: give KEY=VALUE, with one of the keys subset, split" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main(["webdataset", "--source", "x.tar", "--out", "data/x", "--captions", "names"])
    assert "--captions names must be auto or column=NAME" in capsys.readouterr().err
