"""The golden model at one process, tensor 2, pipeline 2 and 2 x 2, from checkpoints and from Hugging Face folders."""

from pathlib import Path

import pytest
from golden_model import ONEVISION, QWEN
from megatron.core.process_groups_config import ProcessGroupCollection
from run_ranks import run_ranks

from megatron_llave.convert.hf import import_hf

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).parent / "check_golden_model.py"


@pytest.mark.slow
def test_embeddings_are_golden_at_every_layout(groups: ProcessGroupCollection, tmp_path: Path) -> None:
    runs = []
    for source in (ONEVISION, QWEN):
        checkpoint = import_hf(source, tmp_path / source.name, groups)
        runs += [f"{checkpoint}:{layout}" for layout in ("1,1", "2,1", "1,2", "2,2", "2,2,1")]
        runs += [f"{source}:{layout}" for layout in ("1,1", "2,2")]
    output = run_ranks(4, SCRIPT, *runs)
    # Each rank of a last pipeline stage has compared and says so.
    assert output.count("embeddings") == 2 * (4 + 4 + 2 + 2 + 2 + 4 + 2)
