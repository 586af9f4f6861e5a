"""benchmarks/gpu_step.py runs without a GPU too: both ways of it, the same embeddings; what is missing is said."""

import subprocess

import pytest

pytest.importorskip("transformers")

from benchmarks import gpu_step  # noqa: E402

SMALL = [
    *("model.vision.hidden_size=32", "model.vision.num_heads=4", "model.vision.ffn_hidden_size=64"),
    *("model.vision.image_size=56", "model.vision.num_layers=2", "model.language.hidden_size=48"),
    *("model.language.num_heads=4", "model.language.num_kv_heads=2", "model.language.ffn_hidden_size=80"),
    *("model.language.num_layers=2", "model.language.vocab_size=300"),
]


def test_rows_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_step.main(["--presets", "0.5b", "--pairs", "2", "--repeats", "1", *SMALL])
    rows = [
        line.strip("| \n").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.5b")
    ]
    found = {row[1]: row[2:] for row in rows}
    assert list(found) == [*gpu_step.OURS, *gpu_step.RELEASED]
    assert found["ours, Transformer Engine"][0].strip() == "no Transformer Engine"
    assert found["released, flash attention"][0].strip() == "no flash attention"
    for arm in ("ours, torch", "released, SDPA"):
        cells = found[arm]
        assert float(cells[0]) > 0
        assert float(cells[-1]) > 0.99  # bf16


def test_arm_that_fails_is_a_row_and_ends_in_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no such kernel")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit) as ended:
        gpu_step.main(["--presets", "0.5b", "--pairs", "2", *SMALL])
    assert ended.value.code == 1
    assert "| failed: RuntimeError: no such kernel |" in capsys.readouterr().out
