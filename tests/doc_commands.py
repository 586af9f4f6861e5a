"""The commands in the pages: how they are found, which of them the tests run, and how.

A code block says its language. A block with a title, such as "Needs GPUs", has commands that the tests cannot run; what
may be needed is a closed list. Every other command is run by test_doc_commands.py, or by the test that ELSEWHERE names.
"""

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forking import run_script

ROOT = Path(__file__).resolve().parents[1]
# Commands in a dated result are those of its day.
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
GUIDES += [page for page in sorted((ROOT / "docs").rglob("*.md")) if "results/2" not in page.as_posix()]
LANGUAGES = ("bash", "bibtex", "json", "python", "text", "yaml")
NEEDS = ("GPUs", "a cluster", "a download", "the network")
"""What commands may need that the tests do not have: the word after "Needs" in the title of their block."""
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *``` *$", re.MULTILINE | re.DOTALL)

ELSEWHERE = {
    # A command, as a pattern of its whole text: the test that runs it, and words of the command that are in this test.
    r"(python tools/prepare_data\.py|llave prepare) openmoji --out runs/openmoji": (
        "tests/conftest.py::openmoji_data",
        ["openmoji"],
    ),
    r"(python tools/prepare_data\.py|llave prepare) openmoji .*--hard-negatives 2.*": (
        "tests/prepare/test_openmoji.py::test_hard_negatives_are_near_wrong_and_trained",
        ["add_hard_negatives"],
    ),
    r"python tools/prepare_data\.py clips --out data/clips": (
        "tests/evaluation/benchmarks/test_video.py::clips",
        ["make_clips"],
    ),
    r"make demo CONFIG=examples/(studies/tiny_start|tiny_lora)\.yaml.*": (
        "tests/examples/test_examples.py::test_adapters_of_the_demo_start_from_other_tasks",
        ["tiny_start.yaml", "tiny_lora.yaml"],
    ),
    r"python tools/search\.py serve .*": (
        "tests/search/test_server.py::test_the_command_serves_until_ctrl_c",
        ["serve"],
    ),
    r"torchrun --nproc-per-node 2 tools/embed\.py --checkpoint runs/judge\S* --shards .*": (
        "tests/commands/test_embed.py::test_the_inputs_of_shards_get_their_names",
        ["--shards"],
    ),
    r"python -m benchmarks\.communication .*": (
        "tests/benchmarks/test_communication.py::test_measures_once_and_reports",
        ["run_communication"],
    ),
}
PAGES_ELSEWHERE = {
    "docs/formats.md": "tests/examples/test_formats.py::test_the_example_trains_ten_steps",
    "docs/own_data.md": "tests/examples/test_own_data.py::test_from_a_folder_of_images_to_search",
}
"""Pages all of whose blocks one other test runs; its file names the page."""
PYTHON_ELSEWHERE = {
    # A line of a block of Python: the test that runs the block, or what it shows.
    "from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration": (
        "tests/models/llava_onevision/test_hf_files.py::test_embedding_as_the_guide_says",
        ["docs/conversion.md", "exec"],
    ),
    "from sentence_transformers import SentenceTransformer": (
        "tests/convert/test_sentence_transformers.py::test_the_code_of_a_card_runs_as_printed",
        ["sentence_transformers", "exec"],
    ),
    "from megatron_llave.evaluation.benchmark import Benchmark, register_benchmark": (
        "tests/evaluation/test_benchmark.py::test_a_benchmark_from_outside_is_evaluated_by_the_tool",
        ["animals", "evaluate"],
    ),
}
FEW_STEPS = ["train.steps=2", "train.global_batch_size=8", "log.interval=1", "data.workers=0"]
"""Overrides of every training."""
PRELUDE = "my_model = lambda text, images: [float(len(text)), 1.0]\n"
"""What blocks of Python may use of the reader's own."""


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    where: str
    """Page and line."""
    language: str
    needs: tuple[str, ...]
    """What its commands need that the tests do not have."""
    text: str

    def commands(self) -> list[str]:
        """Its shell commands, without comments and with continued lines joined."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines() if self.language == "bash" else []
        return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def blocks_of(text: str, name: str) -> Iterator[Block]:
    """The blocks of a page; a fence that is not understood is an error."""
    for match in FENCE.finditer(text):
        where = f"{name}:{text[: match.start()].count(chr(10)) + 1}"
        info = re.fullmatch(r'(\w+)(?: title="Needs ([^"]+)")?', match[2])
        assert info and info[1] in LANGUAGES, f"{where}: ```{match[2]} must be a language of {', '.join(LANGUAGES)}"
        needs = tuple(info[2].split(" and ")) if info[2] else ()
        assert set(needs) <= set(NEEDS), f"{where}: needs {needs}, but the list is {', '.join(NEEDS)}"
        yield Block(where, info[1], needs, match[3])


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def guide_blocks(page: Path) -> list[Block]:
    """The blocks of a guide."""
    return list(blocks_of(page.read_text(), name_of(page)))


def elsewhere(command: str) -> str | None:
    """The test outside of test_doc_commands.py that runs this command."""
    return next((test for pattern, (test, _) in ELSEWHERE.items() if re.fullmatch(pattern, command)), None)


def python_elsewhere(code: str) -> str | None:
    """The test outside of test_doc_commands.py that runs this block of Python."""
    return next((test for line, (test, _) in PYTHON_ELSEWHERE.items() if line in code.splitlines()), None)


def script_of(words: list[str]) -> list[str] | None:
    """The script and arguments that one process of a command runs; None: the tests cannot run such a command."""
    program, *rest = words
    if program == "llave":
        is_run = rest[0] == "train"  # what each rank of the run does
        return ["megatron_llave/train.py", *rest[1:]] if is_run else ["megatron_llave/__main__.py", *rest]
    if program == "python" and rest[:1] == ["-c"]:
        return None
    if program in ("python", "bash", "torchrun"):
        for number, word in enumerate(rest):
            if word == "-m":
                return [str(ROOT / f"{rest[number + 1].replace('.', '/')}.py"), *rest[number + 2 :]]
            if word.endswith((".py", ".sh")):
                return rest[number:]
    return None


def is_training(script: str) -> bool:
    """Whether a script trains."""
    return Path(script).name.startswith("pretrain_") or Path(script).name == "train.py"


def can_run(command: str) -> bool:
    """Whether `run_command` knows what to do with a command."""
    words = without_variables(command)
    return words[0] in ("make", "source", "tail", "touch") or script_of(words) is not None


def without_variables(command: str) -> list[str]:
    """The words of a command after the variables that it sets for itself."""
    words = shlex.split(command)
    return words[next(number for number, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :]


def run_command(command: str) -> None:
    """Run a command of a page in the working directory, as one process and with few steps."""
    words = without_variables(command)
    if words[0] == "source":  # the tests' own environment
        return
    if words[0] == "make":
        for line in made_by(words[1:]):
            run_command(line)
        return
    if words[0] in ("tail", "touch"):
        subprocess.run([word for word in words if word != "-f"], check=True, capture_output=True)
        return
    script, *arguments = script_of(words)
    is_study = script.endswith("study.py") or arguments[:1] == ["study"]
    more = FEW_STEPS if is_training(script) else ["--task", "list"] if is_study else []
    if [word for word in (Path(script).stem, *arguments) if word != "__main__"][:2] == ["mine", "batches"]:
        more = ["--cluster-size", "4"]  # of which the few pairs of a batch are a multiple
    # There is one process, which has no parallel layout; tests/distributed has all of them.
    if "--procs" in arguments:
        place = arguments.index("--procs")
        del arguments[place : place + 2]
    kept = [word for word in arguments if not word.startswith("parallel.")]
    paths = [str(ROOT / word) if word.startswith(("tools/", "examples/", "benchmarks/")) else word for word in kept]
    done = run_script(ROOT / script, *paths, *more)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-5000:]}"


def made_by(arguments: list[str]) -> list[str]:
    """The commands with which make would train and, without arguments, evaluate; of other targets, none."""
    command = ["make", "-n", "-o", ".venv/.installed", "GPUS=0", *arguments]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100).stdout
    lines = [re.sub(r"^(.* )?PATH=\S+ |^\.venv/bin/", "", line) for line in made.splitlines()]
    wanted = ("bash examples/", "torchrun") if arguments == ["demo"] else ("bash examples/",)
    return [line for line in lines if line.startswith(wanted)] if "demo" in arguments else []
