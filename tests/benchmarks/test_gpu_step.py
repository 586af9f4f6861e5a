"""benchmarks/gpu_step.py runs without a GPU too: both ways of it, the same embeddings; what is missing is said."""

import subprocess

import pytest
import torch

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
    if not torch.cuda.is_available():
        assert found["ours, Transformer Engine"][0].strip() == "no Transformer Engine"
        assert found["released, flash attention"][0].strip() == "no flash attention"
    for arm in ("ours, torch", "released, SDPA"):
        cells = found[arm]
        assert float(cells[0]) > 0
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
    for arm, cosine in ran.items():
        assert cosine > (0.98 if "FP8" in arm else 0.999), (arm, cosine)


def test_arm_that_fails_is_a_row_and_ends_in_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no such kernel")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit) as ended:
        gpu_step.main(["--presets", "0.5b", "--pairs", "2", *SMALL])
    assert ended.value.code == 1
    assert "| failed: RuntimeError: no such kernel |" in capsys.readouterr().out
