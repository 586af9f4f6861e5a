"""Imports go one way through the package, and some names stay in the one file they belong to.

Reads the source, imports nothing. The rules are checked on made-up offenders too, so that they are known to bite.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_llave"

ORDER = """
errors files < hub launch locks processes versions < config < batch options < distributed < data < models < loss
< planning < training < checkpoint < embedding < evaluation < mining < convert report search < train < prepare < study
< commands < __main__
"""
"""The rule: a room (a folder, or a file beside them) imports from the rooms before it and from itself alone; rooms
between the same two signs do not see each other, but for errors and files, of which files is the second."""
LEVEL = {room: level for level, rooms in enumerate(ORDER.split("<")) for room in rooms.split()}

SHARED_BY_FAMILIES = {"blocks", "hf", "qwen_vl"}
FAMILIES = {path.parent.name for path in (ROOT / PACKAGE / "models").glob("*/__init__.py")} - SHARED_BY_FAMILIES
"""The second rule: nobody but models/__init__.py imports a family's folder from outside of it, or names it."""
MAY_NAME_FAMILIES = {"megatron_llave.models", "megatron_llave.config.model", "megatron_llave.config.presets"}
"""The registry, the default of model.family, and the presets."""

BEFORE_ALL = {f"{PACKAGE}.distributed.compiler", f"{PACKAGE}.distributed.cuda_environment"}
"""What the package itself imports: the one is to come before megatron-core, the other before CUDA starts."""
MAY_NAME_PARALLEL_STATE = {"megatron_llave.distributed.process_groups"}
MAY_UNPICKLE = {
    f"megatron_llave.{name}"
    for name in ("checkpoint.safe_reads", "checkpoint.state", "checkpoint.stream", "convert.inspect")
}
"""The reader of checkpoints that runs no code from them, and those that load inside of it."""
UNPICKLING = {"torch", "pickle", "dist_checkpointing", "torch_checkpoint", "joblib", "shelve", "marshal"}
# All to compare with.
MAY_IMPORT_TRANSFORMERS = {"megatron_llave.convert.verify"} | {
    f"benchmarks.{name}" for name in ("data_pipeline", "released_step", "qwen_vl_step")
}


def source_files() -> list[Path]:
    folders = [PACKAGE, "tools", "benchmarks", "examples"]
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN_MODULES = {module_name(path) for path in source_files()}


def imported_names(node: ast.AST, module: str) -> list[str]:
    """Full dotted names that an import statement binds; `from a import b` gives a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
        return [f"{base}.{alias.name}" for alias in node.names]
    return []


def own_part(name: str) -> str | None:
    """Room that an import of ours refers to; "" for the package itself, None for foreign code."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    is_module = len(parts) > 1 and (".".join(parts[:2]) in KNOWN_MODULES or parts[1] in LEVEL)
    return parts[1] if is_module else ""


def offences(module: str, source: str) -> Iterator[str]:
    """One line for each rule that this source breaks."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in imported_names(node, module):
            yield from order_offences(module, name)
            yield from foreign_offences(module, name)
        yield from name_offences(module, node)
        yield from family_offences(module, node)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for node in ast.walk(function):
                for name in imported_names(node, module):
                    if own_part(name) is not None:
                        yield f"{module}: imports {name} inside a function"


def order_offences(module: str, name: str) -> Iterator[str]:
    """Imports of our own modules that go upward or sideways."""
    own, target = own_part(module), own_part(name)
    if own is None:
        return  # tools, benchmarks and examples stand above the package and see all of it
    if name.split(".")[0] in ("tools", "tests", "benchmarks", "examples"):
        yield f"{module}: imports {name}, which is not part of the package"
    if not target or target == own:
        return
    if own == "" and name in BEFORE_ALL:
        return
    if own == "":
        yield f"{module}: imports {name}; the package itself imports {' and '.join(sorted(BEFORE_ALL))} alone"
    elif target not in LEVEL:
        yield f"{module}: imports {name}, which has no place in ORDER"
    elif LEVEL[target] > LEVEL[own]:
        yield f"{module}: imports {name} from a layer above"
    elif LEVEL[target] == LEVEL[own] and (own, target) != ("files", "errors"):
        yield f"{module}: imports its sibling {name}"


def family_offences(module: str, node: ast.AST) -> Iterator[str]:
    """Imports, from outside of a family's folder, of what is in it; and its name, written out."""
    parts = module.split(".")
    if parts[0] not in (PACKAGE, "tools"):
        return  # tests and benchmarks may look at one family
    others = FAMILIES - set(parts[2:3] if parts[1:2] == ["models"] else ())
    for name in imported_names(node, module):
        if name.startswith(f"{PACKAGE}.models.") and name.split(".")[2] in others and module != f"{PACKAGE}.models":
            yield f"{module}: imports {name}; models/__init__.py alone knows the families"
    if isinstance(node, ast.Attribute) and node.attr in others and module != f"{PACKAGE}.models":
        yield f"{module}: reaches the family {node.attr}; models/__init__.py alone knows the families"
    if isinstance(node, ast.Constant) and node.value in others and module not in MAY_NAME_FAMILIES:
        yield f"{module}: names the family {node.value}; ask models.family_of"


def foreign_offences(module: str, name: str) -> Iterator[str]:
    """Imports of packages that are not wanted, or not wanted here."""
    parts = name.split(".")
    if parts[0] == "megatron" and parts[1:2] != ["core"]:
        yield f"{module}: imports {name}; only megatron.core is used"
    if parts[0] == "apex":
        yield f"{module}: imports apex; megatron-core uses it where it is there"
    if parts[0] == "transformers" and module not in MAY_IMPORT_TRANSFORMERS:
        yield f"{module}: imports transformers, which is the tests' reference"
    if name.startswith("torch.distributed") and module.startswith("megatron_llave.data"):
        yield f"{module}: imports {name}; rank and world come into data/ as ints"


def name_offences(module: str, node: ast.AST) -> Iterator[str]:
    """Names and attributes, imported or reached through another module, that belong to one file."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = {word for name in imported_names(node, module) for word in name.split(".")}
    elif isinstance(node, ast.Attribute):
        names = {node.attr}
    else:
        names = {node.id} if isinstance(node, ast.Name) else set()
    if "parallel_state" in names and module not in MAY_NAME_PARALLEL_STATE:
        yield f"{module}: names parallel_state; process groups are arguments"
    if isinstance(node, ast.Attribute) and node.attr.startswith("load") and module not in MAY_UNPICKLE:
        own_queue = (module, node.attr) == ("megatron_llave.checkpoint.async_writer", "loads")
        if isinstance(node.value, ast.Name) and node.value.id in UNPICKLING and not own_queue:
            yield f"{module}: calls {node.value.id}.{node.attr}; checkpoint/safe_reads.py reads without running code"
    through_torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
    if through_torch and "distributed" in names and module.startswith("megatron_llave.data"):
        yield f"{module}: uses torch.distributed; rank and world come into data/ as ints"


def cycles(imports: dict[str, set[str]]) -> list[str]:
    """Modules that reach themselves through `imports`."""
    found = []
    for start in sorted(imports):
        seen: set[str] = set()
        waiting = list(imports[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting.extend(imports.get(module, ()))
        if start in seen:
            found.append(start)
    return found


def import_graph() -> dict[str, set[str]]:
    """Which module of the package imports which, as far as the named thing is a module."""
    graph = {}
    for path in source_files():
        module = module_name(path)
        nodes = ast.walk(ast.parse(path.read_text()))
        names = {name for node in nodes for name in imported_names(node, module)}
        holders = {name.rpartition(".")[0] for name in names - KNOWN_MODULES}
        graph[module] = (names | holders) & KNOWN_MODULES - {PACKAGE}
    return graph


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_source_keeps_the_order(path: Path) -> None:
    assert list(offences(module_name(path), path.read_text())) == []


def test_package_itself_imports_nothing_of_its_own() -> None:
    assert list(offences(PACKAGE, "import warnings")) == []
    assert len(list(offences(PACKAGE, "from megatron_llave import config"))) == 1


def test_every_module_has_a_place() -> None:
    parts = {path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py") for path in (ROOT / PACKAGE).rglob("*.py")}
    assert parts - {"__init__"} == set(LEVEL), "add the new room to ORDER"


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / PACKAGE).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == [], "setup.py would leave it out"


def test_no_cycles() -> None:
    graph = import_graph()
    assert sum(len(targets) for targets in graph.values()) > 0
    assert cycles(graph) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("loss", "from megatron_llave.train import train", "from a layer above"),
        ("config.schema", "import megatron_llave.distributed", "from a layer above"),
        ("errors", "from megatron_llave import files", "sibling"),
        ("files", "from megatron_llave.errors import DataError", None),
        ("loss.contrastive", "from megatron_llave.distributed.collectives import row_counts", None),
        ("data.packing", "from megatron_llave.models.blocks.pooling import pool", "from a layer above"),
        ("data.packing", "from megatron_llave import loss", "from a layer above"),
        ("data.packing", "from ..evaluation import ranking", "from a layer above"),
        ("data.packing", "from megatron_llave.data.index import Index", None),
        ("data.packing", "from .index import Index", None),
        ("report.plots", "from megatron_llave.train import train", "above"),
        ("report.plots", "from megatron_llave.convert.hf import export_hf", "sibling"),
        ("config.schema", "from megatron_llave.config.presets import PRESETS", None),
        ("train", "from megatron_llave import __version__", None),
        ("train", "from tools.plot import curve", "not part of the package"),
        ("train", "def f():\n    from megatron_llave import loss", "inside a function"),
        ("train", "def f():\n    import wandb", None),
        ("train", "from megatron.training import get_args", "only megatron.core"),
        ("train", "import megatron.training.checkpointing", "only megatron.core"),
        ("train", "from megatron import training", "only megatron.core"),
        ("train", "from megatron.core import tensor_parallel", None),
        ("training.optimizer", "import apex.optimizers", "apex"),
        ("training.optimizer", "from megatron.core import parallel_state as ps", "parallel_state"),
        ("training.optimizer", "from megatron.core.parallel_state import get_data_parallel_group", "parallel_state"),
        ("training.optimizer", "import megatron.core as core\ncore.parallel_state.destroy()", "parallel_state"),
        ("distributed.process_groups", "from megatron.core import parallel_state", None),
        ("embedding.cache", "import torch\ntorch.load('x')", "safe_reads"),
        ("checkpoint.async_writer", "import pickle\npickle.load(file)", "safe_reads"),
        ("checkpoint.async_writer", "import pickle\npickle.loads(own)", None),
        ("checkpoint.state", "dist_checkpointing.load(state, path)", None),
        ("models.blocks.siglip", "from transformers import SiglipVisionModel", "transformers"),
        ("convert.verify", "from transformers import AutoTokenizer", None),
        (
            "train",
            "from megatron_llave.models.llava_onevision.embedder import LlaveEmbedder",
            "alone knows",
        ),
        ("train", "from megatron_llave.models import llava_onevision", "alone knows"),
        (
            "models.blocks.siglip",
            "from megatron_llave.models.llava_onevision import anyres",
            "alone knows",
        ),
        ("models.llava_onevision.processor", "from megatron_llave.models.llava_onevision import anyres", None),
        ("models", "from megatron_llave.models import llava_onevision", None),
        ("train", "from megatron_llave.models import build_model", None),
        ("convert.hf", "layout = 'llava_onevision'", "names the family llava_onevision"),
        ("models.llava_onevision.hf_config", "LAYOUTS = ('llava_onevision',)", None),
        ("config.model", "family: str = 'llava_onevision'", None),
        ("convert.hf", "from megatron_llave import models\nmodels.llava_onevision.FAMILY", "reaches the family"),
        ("data.pipeline", "import torch.distributed as dist", "as ints"),
        ("data.pipeline", "from torch import distributed", "as ints"),
        ("data.pipeline", "import torch\nrank = torch.distributed.get_rank()", "as ints"),
        ("loss", "import torch.distributed as dist", None),
    ],
)
def test_rules_bite(module: str, source: str, expected: str | None) -> None:
    found = list(offences(f"{PACKAGE}.{module}", source))
    if expected is None:
        assert found == []
    else:
        assert any(expected in line for line in found), found
