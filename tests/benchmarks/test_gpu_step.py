"""benchmarks/gpu_step.py on a CPU: both ways give the same embeddings, and the table says what is missing."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forking import fork, run_script

pytest.importorskip("transformers")

from benchmarks import gpu_step  # noqa: E402

SMALL = [
    *("model.vision.hidden_size=32", "model.vision.num_heads=4", "model.vision.ffn_hidden_size=64"),
    *("model.vision.image_size=56", "model.vision.num_layers=2", "model.language.hidden_size=48"),
    *("model.language.num_heads=4", "model.language.num_kv_heads=2", "model.language.ffn_hidden_size=80"),
    *("model.language.num_layers=2", "model.language.vocab_size=300"),
]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants run in forks, which start sooner than new processes."""

    def run_variant(command: list[str], timeout: float, **given: object) -> subprocess.CompletedProcess:
        assert command[:3] == [sys.executable, "-m", "benchmarks.gpu_step"]
        return run_script(gpu_step.__file__, *command[3:], timeout=timeout)

    monkeypatch.setattr(subprocess, "run", run_variant)


def test_rows_of_the_table(capsys: pytest.CaptureFixture[str], forked: None) -> None:
    gpu_step.main(["--presets", "0.5b", "--pairs", "2", "--repeats", "1", *SMALL])
    rows = [
        line.strip("| \n").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.5b")
    ]
    found = {row[1]: row[2:] for row in rows}
    assert list(found) == [*gpu_step.OURS, *gpu_step.RELEASED]
    if not torch.cuda.is_available():
        assert found["ours, Transformer Engine"][2].strip() == "no Transformer Engine"
        assert found["released, flash attention"][2].strip() == "no flash attention"
    for variant in ("ours, torch", "released, SDPA"):
        cells = found[variant]
        assert float(cells[2]) > 0
        assert float(cells[-1]) > 0.99  # bf16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pairs", ["2", "3"])
def test_every_kernel_gives_the_same_embeddings_and_trains(capsys: pytest.CaptureFixture[str], pairs: str) -> None:
    """Real widths, for FP8 and the fused attentions want their multiples; 3 pairs have an odd number of tokens."""
    small = ["model.vision.num_layers=2", "model.language.num_layers=2", "model.language.vocab_size=4096"]
    gpu_step.main(["--presets", "0.5b", "--pairs", pairs, "--repeats", "1", *small])
    rows = [line.strip("| \n").split(" | ") for line in capsys.readouterr().out.splitlines() if "0.5b" in line]
    ran = {row[1]: float(row[-1]) for row in rows if row[-1].strip()}
    assert {"ours, torch", "released, SDPA"} <= ran.keys()
    for variant, cosine in ran.items():
        assert cosine > (0.98 if "FP8" in variant else 0.999), (variant, cosine)


def test_variant_that_fails_is_a_row_and_ends_in_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no such kernel")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit) as ended:
        gpu_step.main(["--presets", "0.5b", "--pairs", "2", *SMALL])
    assert ended.value.code == 1
    assert "| failed: RuntimeError: no such kernel |" in capsys.readouterr().out


def test_settings_are_lines_as_soon_as_they_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], forked: None
) -> None:
    raw, both = tmp_path / "raw.jsonl", ["micro_batch", "global_batch"]
    arguments = ["--presets", "0.5b", "--variants", "sdpa", "local", "--pairs", "3", "2", "--negatives", *both]
    gpu_step.main([*arguments, "--repeats", "1", "--raw", str(raw), "--folder", str(tmp_path / "kept"), *SMALL])
    table = capsys.readouterr().out
    lines = [json.loads(line) for line in raw.read_text().splitlines()]
    settings = [
        (line["variant"], line["pairs"], line["negatives"]) for line in lines if line["variant"] != gpu_step.CEILING
    ]
    ours = [("ours, torch", pairs, negatives) for pairs in (3, 2) for negatives in both]
    assert sorted(settings) == sorted([("released, SDPA", pairs, "micro_batch") for pairs in (3, 2)] + ours)
    assert all(len(line["seconds"]) == 1 and line["cosine"] > 0.99 for line in lines if "seconds" in line)
    gpu_step.main(["--table", str(raw)])
    assert capsys.readouterr().out == table


@pytest.mark.slow
def test_variant_that_hangs_is_ended_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw.jsonl"
    arguments = ["--presets", "0.5b", "--variants", "local", "--repeats", "100000", "--limit", "3", "--raw", str(raw)]
    with pytest.raises(SystemExit):
        gpu_step.main([*arguments, "--pairs", "2", *SMALL])
    assert "| failed: ended after 3 s |" in capsys.readouterr().out


def test_variants_wait_for_their_turn(tmp_path: Path) -> None:
    script, out = tmp_path / "waits.py", tmp_path / "out"
    script.write_text(
        "import sys, pathlib\nfrom benchmarks import gpu_step\nprint('asks', flush=True)\n"
        "gpu_step.take_turn(pathlib.Path(sys.argv[1]), 60)\nprint('has it')"
    )
    out.touch()
    with (tmp_path / "turn").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = fork([str(script), str(tmp_path)], (str(out), os.devnull), {})
        while not out.read_text():
            assert waiting.is_alive()
            time.sleep(0.02)
        waiting.join(1)
        assert waiting.is_alive() and out.read_text() == "asks\n"
    waiting.join(120)
    assert waiting.exitcode == 0 and out.read_text() == "asks\nhas it\n"
