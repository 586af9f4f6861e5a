"""benchmarks/gpu_day.sh with a program in Python's place that only notes what it is asked: order, settings, time."""

import os
import subprocess
from pathlib import Path

from forking import ROOT

NOTE = """#!/bin/bash
echo "$@" >> "$NOTES"
"""


def run(folder: Path, *arguments: str, **variables: str) -> tuple[list[str], str]:
    """The commands that it gave to Python in their order, without those of the background, and what it printed."""
    python, notes, state = folder / "python", folder / "notes", folder / "state"
    python.write_text(NOTE)
    python.chmod(0o755)
    for made in ("data", "engine"):
        (state / made).mkdir(parents=True, exist_ok=True)
    (state / "engine_tried").touch()
    notes.write_text("")
    env = {**os.environ, "PYTHON": str(python), "NOTES": str(notes), "STATE": str(state), "REHEARSAL": "1", **variables}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_day.sh"), *arguments]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    modules = [line for line in notes.read_text().splitlines() if line.startswith("-m")]
    return modules, ran.stdout + ran.stderr


def option(command: str, name: str) -> list[str]:
    """The values of the last option of this name, which is the one that counts."""
    return command.split(f"--{name} ")[-1].split(" --")[0].split()


def test_parts_come_in_their_order_with_both_kinds_of_negatives(tmp_path: Path) -> None:
    commands, said = run(tmp_path)
    steps = [command for command in commands if "benchmarks.gpu_step" in command and "--presets" in command]
    assert [option(command, "presets") for command in steps] == [["0.5b"], ["0.5b"], ["2b"], ["7b"]]
    assert [option(command, "variants") for command in steps[:2]] == [["local", "sdpa"], ["te", "tensorwise"]]
    for command in steps:
        assert option(command, "negatives") == ["micro_batch", "global_batch"]
        assert int(option(command, "limit")[0]) > 0 and option(command, "raw")
    assert "-m pytest" in commands[0] and "-m gpu" in commands[0] and commands[0].endswith("test_layer_specs.py")
    names = ["gpu_check", "gpu_step", "gpu_profile", "megatron_llave.train"]
    first = [next(i for i, command in enumerate(commands) if name in command) for name in names]
    assert first == sorted(first), "correctness first, the profile and training last"
    assert said.index("training, tiny-engine: ") < said.index("resumed, tiny-engine: ")
    resumed = [command for command in commands if "--resume" in command]
    assert len(resumed) == 2 and all("checkpoints/step-0000010" in command for command in resumed)


def test_options_override_the_settings_of_a_part(tmp_path: Path) -> None:
    commands, _ = run(tmp_path, "2b", "--variants", "te", "--pairs", "2", "--repeats", "1")
    [command] = [command for command in commands if "--presets" in command]
    given = {name: option(command, name) for name in ("presets", "variants", "pairs", "repeats")}
    assert given == {"presets": ["2b"], "variants": ["te"], "pairs": ["2"], "repeats": ["1"]}


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    commands, said = run(tmp_path, "2b", "7b", SECONDS_IN_ALL="0")
    assert not [command for command in commands if "--presets" in command]
    assert "steps of 2b: no time left" in said and "steps of 7b: no time left" in said
