"""benchmarks/lora_step.py: what the kinds train, and that each of them takes the same steps."""

from pathlib import Path

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.lora_step import KINDS, build, measure, print_table
from megatron_llave.config.load import load_config

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "tiny_lora.yaml"


def test_kinds_take_the_same_steps(
    openmoji_data: Path, groups: ProcessGroupCollection, capsys: pytest.CaptureFixture[str]
) -> None:
    subset = "{composed: {weight: 1}}"
    overrides = [f"data.path={openmoji_data}", "data.workers=0", "data.subsets=null", f"data.subsets={subset}"]
    overrides += ["train.global_batch_size=4"]
    kinds = [build(str(CONFIG), name, overrides, groups) for name in KINDS]
    measure(load_config(CONFIG, overrides), kinds, 2, groups)
    counts = [kind.sizes()[0] for kind in kinds]
    # Rank 8 times inputs and outputs: two layers of the decoder, then two of the vision encoder and the projector too.
    decoder = 8 * 2 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 352))
    assert counts[1:] == [decoder, decoder + 8 * (2 * (4 * (128 + 128) + 2 * (128 + 512)) + 2 * (128 + 128))]
    assert counts[0] > 10 * counts[2]
    for kind, count in zip(kinds, counts):
        _, gradients, optimizer = kind.sizes()
        assert gradients == 4 * count and 8 * count <= optimizer < 8 * count + 1000, "float32; two moments, and steps"
        assert len(kind.seconds) == len(kind.cpu_seconds) == 2
        assert all(0 < cpu <= 1.1 * wall for cpu, wall in zip(kind.cpu_seconds, kind.seconds))
    print_table(kinds)
    assert [line.count("|") for line in capsys.readouterr().out.splitlines()] == [9] * 5
