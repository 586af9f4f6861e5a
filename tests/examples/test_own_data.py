"""The commands of docs/own_data.md, in their order, on a small folder of images and with few steps."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from forking import run_script
from PIL import Image

from megatron_llave.commands.prepare_tables import NEXT
from megatron_llave.evaluation.benchmarks.prepared import read_tasks

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "own_data.md"
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
FEWER = {"train.steps": 4, "train.global_batch_size": 16, "log.interval": 1, "data.workers": 0}

pytestmark = pytest.mark.long


def run_line(line: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the page as one process, which is a fork; training is run as one of its ranks runs it."""
    words = shlex.split(line)
    if words[:2] == ["llave", "train"]:
        fewer = [f"{key}={value}" for key, value in FEWER.items()]
        return run_script(ROOT / "megatron_llave" / "train.py", *words[2:], *fewer)
    script = next(number for number, word in enumerate(words) if word.endswith((".py", ".sh")))
    assert words[:script] in (["python"], ["bash"], ["torchrun", "--nproc-per-node", "2"]), line
    paths = [str(ROOT / word) if word.startswith(("tools/", "examples/")) else word for word in words[script:]]
    return run_script(*paths)


def test_from_a_folder_of_images_to_search(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"noise number {number}")
    printed = []
    for block in BLOCK.findall(PAGE.read_text()):
        for line in block.replace("\\\n", "").splitlines():
            done = run_line(line)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
    prepared, inspected, _, evaluated, built, found = printed
    command = NEXT.format("data/own")
    assert prepared.splitlines()[-1] == f"next: {command}" and command in PAGE.read_text()
    assert "22 / 0 / 0" in inspected and "0 / 0 / 22" in inspected
    assert [(task.name, len(task.queries)) for task in read_tasks("data/own")] == [
        ("caption_to_image", 2),
        ("image_to_caption", 2),
    ]
    assert "chance" in evaluated and "before" in evaluated and evaluated.count("_to_") == 2 and " 50 " in evaluated
    assert {"report.html", "montage.png"} <= {path.name for path in Path("runs/own/report").iterdir()}
    assert built.startswith("runs/own/search: 24 images\n")
    lines = [line.split() for line in found.splitlines()]
    assert len(lines) == 5 and all(Path("photos", name).is_file() for _, name in lines)
    assert [float(score) for score, _ in lines] == sorted((float(score) for score, _ in lines), reverse=True)
