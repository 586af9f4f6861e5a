"""One reader per replica at several layouts, by counting decoded images."""

from pathlib import Path

from run_ranks import run_ranks

SCRIPT = Path(__file__).parents[1] / "distributed" / "check_replica.py"
READERS = {"2,2,1": 1, "2,1,1": 2, "1,2,1": 2, "1,1,1": 4, "1,1,2": 2, "1,2,2": 1}
"""Number of ranks that read at each layout: tensor, pipeline, context."""


def test_images_are_decoded_once_per_replica(openmoji_data: Path, tmp_path: Path) -> None:
    run_ranks(4, SCRIPT, str(openmoji_data), str(tmp_path), *READERS)
    for layout, readers in READERS.items():
        counts = sorted(int(file.read_text()) for file in (tmp_path / layout).iterdir())
        assert counts == [0] * (4 - readers) + [3 * 8 // readers] * readers, layout
