"""The tool's commands from the command line: what they print, their exit status, and how few flags they have."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from megatron_llave.commands import prepare as prepare_data
from megatron_llave.commands.prepare_tables import NEXT
from megatron_llave.planning import pair_lengths

MMEB = Path(__file__).parents[1] / "golden" / "mmeb" / "train"
QWEN_SUBSET = Path(__file__).parents[1] / "golden" / "prompts" / "qwen_subset_tokenizer.json"


def run(capsys, *arguments):
    """Exit status, stdout, stderr."""
    status = 0
    try:
        prepare_data.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        status = stopped.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def cells(printed):
    """Rows of the tables, without their frames."""
    rows = (re.split(r"[\u2502\u2503|]", line)[1:-1] for line in printed.splitlines())
    return [[cell.strip() for cell in row] for row in rows if row]


def test_mmeb_prints_what_it_made_and_what_it_left_out(tmp_path, capsys):
    rows = json.loads((MMEB / "OK-VQA.json").read_text())
    rows[2]["qry_image_path"] = "images/none.png"
    (tmp_path / "OK-VQA.json").write_text(json.dumps(rows))
    (tmp_path / "images").symlink_to(MMEB / "images")
    given = ["mmeb", "--source", tmp_path, "--out", tmp_path / "out", "--workers", 1]
    status, out, _ = run(capsys, *given, "--subsets", "OK-VQA", "--limit", 5)
    assert status == 0
    assert ["OK-VQA", "vqa", "4", "1", "0.0"] in cells(out) and ["OK-VQA", "1", "missing image"] in cells(out)
    assert "out/report.jsonl" in out and f"wrote {tmp_path / 'out'}" in out
    status, out, err = run(capsys, *given)
    assert (status, out) == (2, "") and "--overwrite" in err.splitlines()[-1]
    status, out, _ = run(capsys, *given, "--overwrite", "--max-pixels", 1)
    assert status == 0 and ["OK-VQA", "6", "image too large"] in cells(out)


def test_jsonl_prints_what_it_made(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"query": {"text": "q"}, "target": {"text": "t"}}\n')
    (tmp_path / "b.jsonl").write_text('{"query": {"text": "q"}, "target": {"text": "t"}}\n' * 2)
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    status, out, _ = run(
        capsys, "jsonl", "--source", *files, "--out", tmp_path / "out", "--meta-task", "grounding", "--workers", 1
    )
    assert status == 0 and "skipped" not in out
    assert cells(out)[1:] == [
        ["a", "grounding", "1", "1", "0.0"],
        ["b", "grounding", "2", "1", "0.0"],
        ["total", "", "3", "2", "0.0"],
    ]


def test_jsonl_error_is_one_line_with_file_and_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"query": {"text": "q"}, "target": {"text": "t"}}\n{"query": {"text": "q"}}\n')
    status, out, err = run(capsys, "jsonl", "--source", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"error: {tmp_path / 'a.jsonl'}:2: target is missing"


def test_jsonl_holds_out_makes_a_tokenizer_and_says_what_comes_next(tmp_path, capsys):
    lines = [json.dumps({"query": {"text": f"question {n}"}, "target": {"text": f"answer {n}"}}) for n in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    status, printed, _ = run(capsys, "jsonl", "--source", tmp_path / "a.jsonl", "--out", out, "--held-out", 0.1)
    assert status == 0 and ["a_query_to_target", "retrieval", "3", "3", "33.3"] in cells(printed)
    assert ["a", "retrieval", "27", "1", "0.0"] in cells(printed)
    assert printed.splitlines()[-1] == f"next: {NEXT.format(out)}"
    assert "nor a set" not in printed
    twice = tmp_path / "twice.jsonl"
    twice.write_text("\n".join([line for line in lines for _ in range(2)]))
    status, printed, _ = run(capsys, "jsonl", "--source", twice, "--out", tmp_path / "more", "--held-out", 0.1)
    assert "subset twice: number of held-out pairs that are in neither training nor a set: 3; they share" in printed
    trained = (out / "tokenizer.model").read_bytes()
    status, printed, err = run(capsys, "tokenizer", "--source", out)
    assert (status, printed) == (2, "") and "tokenizer.model exists already" in err
    status, printed, _ = run(capsys, "tokenizer", "--source", out, "--overwrite")
    assert status == 0 and (out / "tokenizer.model").read_bytes() == trained  # trained on the same texts
    text = tmp_path / "text"
    text.write_text("a red car\n\na blue car\n")
    assert run(capsys, "tokenizer", "--source", text)[::2] == (
        2,
        "error: --source is no folder, so that --out FILE.model is needed\n",
    )
    status, printed, _ = run(capsys, "tokenizer", "--source", text, "--out", tmp_path / "t.model", "--vocabulary", 500)
    assert status == 0 and re.fullmatch(rf"wrote {tmp_path}/t.model: [0-9]+ pieces\n", printed)
    (tmp_path / "bare").write_text("\n")
    _, _, err = run(capsys, "tokenizer", "--source", tmp_path / "bare", "--out", tmp_path / "b.model")
    assert "there is no text to train the tokenizer" in err and not (tmp_path / "b.model").exists()


@pytest.fixture
def golden_shards(tmp_path, capsys):
    run(capsys, "mmeb", "--source", MMEB, "--out", tmp_path / "out", "--workers", 1)
    return tmp_path / "out"


def test_inspect_prints_tables(golden_shards, capsys):
    status, out, _ = run(capsys, "inspect", golden_shards)
    assert status == 0
    rows = cells(out)
    assert ["CIRR", "retrieval", "8", "1", "0.0"] in rows
    assert ["CIRR", "0 / 0 / 8", "0 / 0 / 8", "8"] in rows
    assert ["WebQA", "8 / 0 / 0", "0 / 0 / 8", "0"] in rows
    assert ["64 - 127", "32", "8", "0", "#" * 24] in rows
    assert ["longest", "103", "91", "39", ""] in rows and ["longest", "200", "200", "200", ""] in rows
    assert "looked at" not in out
    _, out, _ = run(capsys, "inspect", golden_shards, "--tokenizer", QWEN_SUBSET, "--preset", "0.5b")
    assert ["1024 - 2047", "20", "19", "6", "#" * 24] in cells(out)


def test_inspect_says_when_it_sampled(tmp_path, capsys, monkeypatch):
    line = '{"query": {"text": "q"}, "target": {"text": "t"}}\n'
    (tmp_path / "a.jsonl").write_text(line * 1500)
    run(capsys, "jsonl", "--source", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--workers", 1)
    monkeypatch.setattr(pair_lengths, "PAIRS_COUNTED", 10)
    _, out, _ = run(capsys, "inspect", tmp_path / "out")
    assert "* a: 1000 of its 1500 pairs were read" in out and ["a*", "1000 / 0 / 0", "1000 / 0 / 0", "0"] in cells(out)


def test_verify_ends_with_status_1_where_something_is_wrong(golden_shards, capsys):
    status, out, _ = run(capsys, "verify", golden_shards)
    assert status == 0 and "is complete" in out
    shard = golden_shards / "WebQA-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    status, out, _ = run(capsys, "verify", golden_shards)
    assert status == 1
    assert f"shard {shard}: its sha256 is" in out and out.splitlines()[-1].endswith("problems")
    status, _, err = run(capsys, "verify", golden_shards / "nowhere")
    assert status == 2 and "nowhere does not exist" in err


def test_images_that_lose_something_are_told_by_every_command(tmp_path, capsys):
    Image.new("RGBA", (8, 8)).save(tmp_path / "sticker.png")
    (tmp_path / "a.jsonl").write_text('{"query": {"images": ["sticker.png"]}, "target": {"text": "t"}}\n')
    given = ["jsonl", "--source", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--workers", 1]
    for command in (given, ["inspect", tmp_path / "out"], ["verify", tmp_path / "out"]):
        status, out, _ = run(capsys, *command)
        rows = [row[:3] for row in cells(out)]
        assert status == 0
        assert ["a", "1", "image with transparency"] in rows and ["a", "1", "image of one colour"] in rows
    assert "a-00000000 query.0.png" in out


@pytest.mark.parametrize(
    "command",
    [
        "openmoji",
        "mmeb",
        "folder",
        "csv",
        "jsonl",
        "columns",
        "swift",
        "vlm2vec",
        "webdataset",
        "tokenizer",
        "inspect",
        "verify",
    ],
)
def test_no_command_has_more_than_eight_flags(command, capsys):
    _, out, _ = run(capsys, command, "--help")
    flags = set(re.findall(r"^  (--[a-z-]+)", out, re.MULTILINE))
    assert len(flags) <= 8 and (command == "verify" or len(flags) >= 2)
