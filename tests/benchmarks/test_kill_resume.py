"""A sample of benchmarks/kill_resume.py: killed runs resume, and their ends are bit-equal; and each way kills."""

from pathlib import Path

import pytest

from benchmarks.kill_resume import PRESETS, ROOT, SETTINGS, kill_and_compare
from megatron_llave.config.load import load_config
from megatron_llave.models import family_of

pytestmark = pytest.mark.long


@pytest.mark.slow
def test_killed_runs_end_like_an_uninterrupted_one(openmoji_data: Path, tmp_path: Path) -> None:
    counts, faults = kill_and_compare(openmoji_data, tmp_path, "tiny", kills=2, seed=3)
    assert not faults and counts.total() >= 2


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_is_a_possible_model(preset: str) -> None:
    settings = [f"model.preset={preset}", *SETTINGS, *PRESETS[preset]]
    model = load_config(str(ROOT / "examples" / "tiny.yaml"), settings).model
    family_of(model).check(model)
    assert model.language.hidden_size == 64 and family_of(model).name == model.family
