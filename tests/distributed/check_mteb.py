"""Under torchrun: mteb with the golden model at a layout, on mteb's mock tasks, which need no network.

check_mteb.py mock OUT tensor,pipeline[,context] TOKENIZER    all tasks by mteb.mock_run: their scores, in OUT.json
check_mteb.py command OUT tensor,... TOKENIZER [OPTION ...]    tools/evaluate.py mteb on three of them
check_mteb.py waits OUT tensor,... TOKENIZER                   without mteb: the first rank is slower than the timeout
check_mteb.py checks OUT 1,1 TOKENIZER                         mock, and what needs mteb and one rank
"""

import json
import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from golden_model import ONEVISION

from megatron_llave.commands import evaluate
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.embedding import cache
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.embedder import embed_parts, load_model
from megatron_llave.embedding.inputs import Input
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation import mteb_encoder, mteb_instructions
from megatron_llave.evaluation.benchmarks import mteb as benchmark
from megatron_llave.evaluation.mteb_encoder import DistributedEncoder

TIMEOUT = 10
"""Seconds after which a collective would end the ranks."""
NAMES = ("MockClassificationTask", "MockRetrievalTask", "MockImageClassification")


def overrides(layout: str, tokenizer: str) -> list[str]:
    sizes = zip(("tensor", "pipeline", "context"), layout.split(","))
    return [f"data.tokenizer={tokenizer}", *(f"parallel.{key}={size}" for key, size in sizes)]


def encoder_of(model, out: str, prompts: dict[str, Any] | None = None) -> DistributedEncoder:
    """The encoder that mteb gets, on all ranks."""
    identity = model.identity()
    embedder = CachedEmbedder(partial(embed_parts, model), out, identity, model.groups.dp, cfg=model.cfg)
    instructions = mteb_instructions.instructions_of(model.cfg, prompts or {})
    meta = benchmark.model_meta(model.cfg, identity, instructions, "golden") if dist.get_rank() == 0 else None
    return mteb_encoder.build_encoder(embedder, model.cfg.model.language.hidden_size, instructions, meta)


def mock_tasks(names: tuple[str, ...] = NAMES) -> list[Any]:
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID

    by_name = {task.metadata.name: task for task in ALL_MOCK_TASK_TEST_GRID}
    return [by_name[name] for name in names]


def mock_run(encoder: DistributedEncoder) -> dict[str, float]:
    """The main score of each mock task that a model of texts and images can do; fails where mteb reports an error."""
    import mteb

    found = {name: result for name, result in mteb.mock_run(encoder).items() if result is not None}
    errors = {name: result.exception for name, result in found.items() if not hasattr(result, "scores")}
    assert not errors, errors
    return {name: result.get_score() for name, result in found.items()}


def write_mock_scores(model, out: str) -> None:
    encoder = encoder_of(model, out)
    scores = encoder.run(partial(mock_run, encoder))
    if scores is not None:
        counts = {"inputs": encoder.num_inputs, "embedded": encoder.num_embedded}
        Path(f"{out}.json").write_text(json.dumps({"scores": scores, **counts}))


def check_waits(out: str, layout: str, tokenizer: str) -> None:
    """The other ranks wait for the first one beyond the timeout of collectives, and all of them hear of its error."""
    process_groups.SECONDS_FOR_THE_WATCHDOG = 0
    model = load_model(ONEVISION, [*overrides(layout, tokenizer), f"parallel.timeout_seconds={TIMEOUT}"])
    identity = model.identity()
    embedder = CachedEmbedder(partial(embed_parts, model), out, identity, model.groups.dp, cfg=model.cfg)
    [block] = mteb_encoder.blocks([Input(str(number)) for number in range(100)], "task")

    def score() -> int:
        time.sleep(TIMEOUT + 2)
        return len(encoder._embed(block))

    encoder = DistributedEncoder(embedder, 64, mteb_instructions.Instructions(), None)
    assert encoder.run(score) == (100 if dist.get_rank() == 0 else None)
    for entries, fail, message in (
        ([], lambda: 1 / 0, "division by zero"),
        ([Input("", (b"damaged",))] * 9, lambda: None, "cannot be embedded: .*not a readable image"),
    ):

        def work(entries=entries, fail=fail):
            with suppress(DataError):  # as mteb.mock_run does
                for each in mteb_encoder.blocks(entries, "task"):
                    encoder._embed(each)
            fail()

        encoder = DistributedEncoder(embedder, 64, mteb_instructions.Instructions(), None)
        with pytest.raises(Exception, match=message):
            encoder.run(work)
    print("waited", flush=True)


def run_command(out: str, changes: list[str], *options: str) -> None:
    benchmark.choose_tasks = lambda names, of, languages: benchmark.Chosen(mock_tasks())
    evaluate.main(["mteb", "--checkpoint", str(ONEVISION), "--out", out, *options, "--tasks", "mock", *changes])


def check_names() -> None:
    """Unknown names, and tasks of other inputs, are refused with the nearest name."""
    for wrong, message in [
        ((["cifar1"], None, []), "--tasks 'cifar1' is not known to mteb .*; the nearest is 'CIFAR10"),
        (([], "MIEB(light)", []), r"--benchmark 'MIEB\(light\)' is not known .*; the nearest is 'MIEB\(lite\)'"),
        (([], None, []), "name the tasks with --tasks, or a benchmark"),
        ((["CIFAR10"], "MIEB(lite)", []), "and not both"),
        ((["MSRVTTT2V"], None, []), "task MSRVTTT2V needs video"),
        ((["SciFact"], None, ["deu"]), "SciFact has none of the --languages deu"),
    ]:
        with pytest.raises(ConfigError, match=message):
            benchmark.choose_tasks(*wrong)
    assert len(benchmark.choose_tasks([], "MIEB(lite)", []).tasks) == 51
    german = benchmark.choose_tasks(["MassiveIntentClassification"], None, ["deu"]).tasks
    assert [task.hf_subsets for task in german] == [["de"]]


def check_means() -> None:
    """Of a benchmark they are those of mteb's leaderboard."""
    from mteb.results import TaskResult

    chosen = benchmark.choose_tasks([], "MIEB(lite)", [])
    results, by_type = [], {}
    for number, task in enumerate(chosen.tasks):
        languages = task.metadata.hf_subsets_to_langscripts
        subsets = {
            name: {"main_score": number / 100, "hf_subset": name, "languages": languages[name]}
            for name in task.hf_subsets
        }
        results.append(TaskResult.from_task_results(task, dict.fromkeys(task.eval_splits, subsets), 0.0))
        by_type.setdefault(task.metadata.type, []).append(number / 100)
    means = benchmark.means_of(chosen, results, "megatron_llave/x")
    expected = {kind: float(np.mean(values)) for kind, values in by_type.items()}
    expected["Mean(TaskType)"] = float(np.mean(list(expected.values())))
    assert {key: means.get(key) for key in expected} == pytest.approx(expected)
    assert benchmark.means_of(chosen, results[1:], "megatron_llave/x") == {}
    alone = benchmark.means_of(benchmark.Chosen(chosen.tasks), results, "x")
    assert alone == pytest.approx({**expected, "Mean(Task)": 0.25})


def check_prompts(out: str) -> None:
    path = Path(f"{out}-prompts.json")
    for values, message in [
        ({"SciFaci": "x"}, "'SciFaci' is neither a task nor .*; the nearest is 'SciFact'"),
        ({"SciFact": 3}, "'SciFact' must be a text, or"),
        ({"Retrieval": {"corpus": "x"}}, "'Retrieval' must be a text, or"),
        ({"query": {"query": "x"}}, "'query' must be a text"),
        ({"template": "{text}"}, "'template' must be a text with {instruction} and {text}"),
        ({"tasks": "no"}, "'tasks' must be true or false"),
    ]:
        path.write_text(json.dumps(values))
        with pytest.raises(DataError, match=message):
            mteb_instructions.read_prompts(path, [])
    folder = Path(f"{out}-folder")
    folder.mkdir()
    assert mteb_instructions.own_prompts(folder, mock_tasks()) == {}
    own = {"query": "Q", "document": "", "Classification": "C", "other": "O", "Retrieval": 3}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": own}))
    assert mteb_instructions.own_prompts(folder, mock_tasks()) == {"query": "Q", "Classification": "C"}
    good = {"SciFact": {"query": "a", "document": "b"}, "STS": "c", "query": "d", "tasks": False, "image": ""}
    path.write_text(json.dumps(good))
    assert mteb_instructions.read_prompts(path, []) == good


def check_instructions(model, out: str) -> None:
    """The texts that the model gets: mteb's own instructions, and those of a file, which win over them."""
    import mteb
    from mteb.types import PromptType

    def texts(prompts: dict, name: str, side: PromptType | None) -> str:
        encoder, task = encoder_of(model, out, prompts), mteb.get_task(name).metadata
        loader = [{"text": ["x"]}]
        seen, encoder._embed = [], lambda block: seen.append(block) or np.zeros((1, 64), np.float32)
        encoder._entries.__globals__["undecoded"], kept = (lambda loader: loader), mteb_encoder.undecoded
        encoder.encode(loader, task_metadata=task, hf_split="", hf_subset="", prompt_type=side)
        encoder._entries.__globals__["undecoded"] = kept
        return seen[0].entries[0].text

    query, document = PromptType.query, PromptType.document
    own = mteb.get_task("SciFact").metadata.prompt["query"]
    assert texts({}, "SciFact", query) == f"{own}\nx" and texts({}, "SciFact", document) == "x"
    assert texts({"query": "Q:"}, "SciFact", query) == "Q:\nx"
    assert texts({"Retrieval": "R", "query": "Q"}, "SciFact", query) == "R\nx"
    assert texts({"SciFact": {"query": "S", "document": "D"}, "Retrieval": "R"}, "SciFact", document) == "D\nx"
    assert texts({"SciFact": "S", "document": "D"}, "SciFact", document) == "D\nx"
    assert texts({"tasks": False}, "SciFact", query) == "x" == texts({"tasks": False}, "STS12", None)
    assert texts({"tasks": False, "STS": "S", "template": "{text}/{instruction}"}, "STS12", None) == "x/S"
    assert texts({}, "STS12", None) == f"{mteb.get_task('STS12').abstask_prompt}\nx"


def check_failures(model, out: str) -> None:
    """What mteb cannot finish is one line with the task's name; the others can go on, and embeddings are kept."""
    encoder, (first, second, _) = encoder_of(model, out), mock_tasks()
    evaluate_second = second.evaluate
    for error, message in [
        (ConnectionError("Couldn't reach 'x' on the Hub"), "its data, .* at revision .*, are not on this machine"),
        (KeyError("wrong"), "mteb ended with KeyError: 'wrong'.*; traceback: .*MockRetrievalTask.txt"),
    ]:

        def fail(*args, error=error, **kwargs):
            evaluate_second(*args, **kwargs)
            raise error

        second.evaluate = fail
        with pytest.raises(DataError, match=f"^task MockRetrievalTask: {message}"):
            encoder.run(lambda: benchmark.run_tasks(encoder, [second, first], out))
        encoder = encoder_of(model, out)
        scored = encoder.run(
            lambda: benchmark.run_tasks(encoder, [second, first], f"{out}-{type(error).__name__}", True)
        )
        assert [result.task_name for result in scored.results] == ["MockClassificationTask"]
        assert list(scored.failed) == ["MockRetrievalTask"] and encoder.num_embedded < encoder.num_inputs
    assert "KeyError: 'wrong'" in (Path(out) / "failed" / "MockRetrievalTask.txt").read_text()
    second.evaluate = evaluate_second


def check_images_stay_encoded() -> None:
    """Data sets that store files give their bytes; other Pillow images become PNG."""
    import datasets
    from PIL import Image
    from torch.utils.data import DataLoader

    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    data = datasets.Dataset.from_dict({"image": [image]}, features=datasets.Features(image=datasets.Image()))
    stored = data.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]
    loader = DataLoader(data, collate_fn=lambda rows: {"image": [row["image"] for row in rows]})
    assert [mteb_encoder.image_bytes(x) for batch in mteb_encoder.undecoded(loader) for x in batch["image"]] == [stored]
    rows = DataLoader([{"image": image}], collate_fn=lambda rows: rows)
    assert mteb_encoder.undecoded(rows) is rows


def check_command(out: str, changes: list[str]) -> None:
    """The command writes mteb's files and the report; a second time it reads them, and a damaged one is made again."""
    run_command(out, changes)
    (folder,) = (Path(out) / "results" / "megatron_llave__hf_tiny").iterdir()
    meta = json.loads((folder / "model_meta.json").read_text())
    assert meta["revision"] == folder.name and meta["modalities"] == ["text", "image"]
    assert (meta["similarity_fn_name"], meta["embed_dim"], meta["framework"]) == ("cosine", 64, ["PyTorch"])
    report = json.loads((Path(out) / "report.json").read_text())
    scores = {task["task"]: task["score"] for task in report["tasks"]}
    assert list(scores) == list(NAMES) and report["means"]["Mean(Task)"] == pytest.approx(
        np.mean(list(scores.values()))
    )
    assert "seed 42" in report["evaluation"]["mteb"]
    assert all(name in (Path(out) / "report.md").read_text() for name in NAMES)
    (folder / f"{NAMES[0]}.json").write_text('{"half')
    run_command(out, changes)
    again = json.loads((Path(out) / "report.json").read_text())
    assert {task["task"]: pytest.approx(task["score"], abs=1e-6) for task in again["tasks"]} == scores
    json.loads((folder / f"{NAMES[0]}.json").read_text())


if __name__ == "__main__":
    _, what, out, layout, tokenizer, *options = sys.argv
    cpu_emulation.enable()
    cache.PART_COST = 20  # a few inputs a part, so that every rank gets some
    if what == "waits":
        check_waits(out, layout, tokenizer)
        sys.stdout.flush()
        os._exit(0)  # the ranks are not in step any more after the last error
    if what == "command":
        run_command(out, overrides(layout, tokenizer), *options)
        sys.exit()
    model = load_model(ONEVISION, overrides(layout, tokenizer))
    write_mock_scores(model, out)  # first, because the mock tasks draw other data the next time
    if what == "checks":
        check_names()
        check_means()
        check_prompts(out)
        check_instructions(model, out)
        check_failures(model, f"{out}-failures")
        check_images_stay_encoded()
        check_command(f"{out}-command", overrides(layout, tokenizer))
    process_groups.destroy_distributed()
