"""Whole runs through the command line: the same run at every layout, its checkpoint, and what a user gets wrong."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from forking import run_script
from launching import data_with_few_sets
from run_ranks import run_ranks

from megatron_llave.batch import Pair, Side
from megatron_llave.config.load import load_config
from megatron_llave.data.index import Index, read_index, write_index
from megatron_llave.data.shards import write_subset
from megatron_llave.loss.schedules import temperature_at
from megatron_llave.training.run_state import read_state

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "examples" / "pretrain_llave_tiny.sh"  # its Python half, as torchrun runs it
START = ROOT / "megatron_llave" / "train.py"
EVALUATE = ROOT / "tools" / "evaluate.py"
SHORT = ["train.steps=3", "train.global_batch_size=16", "optimizer.warmup_steps=0"]
LAYOUTS = {
    "one": (1, []),
    "tensor2_pipeline2": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
}


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(openmoji_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same three steps at two layouts."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (world, layout) in LAYOUTS.items():
        told = run_ranks(world, TRAIN, f"data.path={openmoji_data}", f"train.output={folder / name}", *SHORT, *layout)
        (folder / f"{name}.txt").write_text(told)
    return {name: folder / name for name in LAYOUTS}


def test_loss_is_the_same_at_another_layout(runs: dict[str, Path]) -> None:
    for one, other in zip(log_of(runs["one"]), log_of(runs["tensor2_pipeline2"]), strict=True):
        assert one["subset"] == other["subset"]
        for key in ("loss", "gradient_norm", "positive_similarity", "hardest_negative_similarity"):
            assert other[key] == pytest.approx(one[key], abs=1e-4, rel=1e-4), key
        assert (other["pairs"], other["tokens"]) == (16, one["tokens"])


def test_a_start_says_once_what_it_is_doing(runs: dict[str, Path], openmoji_data: Path) -> None:
    said = [f"opening the data in {openmoji_data}", "building the model with random weights of seed 0"]
    said += ["waiting for the first batch of 16 pairs", "step 1/3  loss ", "step 3/3  loss "]
    for run in runs.values():
        text = run.with_suffix(".txt").read_text()
        assert [text.count(line) for line in said] == [1] * len(said), text
        assert [text.index(line) for line in said[:3]] == sorted(text.index(line) for line in said[:3])


def test_each_step_has_the_temperature_of_the_schedule(runs: dict[str, Path]) -> None:
    config = load_config(runs["one"] / "config.yaml").loss
    scheduled = [temperature_at(config, step) for step in range(len(log_of(runs["one"])))]
    assert len(set(scheduled)) == len(scheduled) > 1
    assert [record["temperature"] for record in log_of(runs["one"])] == scheduled


@pytest.mark.slow
def test_checkpoint_of_any_layout_evaluates_the_same_at_any_other(
    runs: dict[str, Path], openmoji_data: Path, tmp_path: Path
) -> None:
    """Saved at tensor 2 x pipeline 2 with sequence parallel; Precision@1 is equal, or a near tie has flipped.

    One evaluation set of each kind: from image to text, from text to image, from both to image, and from both to text.
    """
    data = data_with_few_sets(openmoji_data, tmp_path / "data", "group", "name_to_image", "composed", "vqa")
    reports = []
    for world, layout in [(1, []), (2, ["parallel.pipeline=2"])]:
        out = tmp_path / str(len(reports))
        arguments = [
            "prepared",
            "--checkpoint",
            str(runs["tensor2_pipeline2"]),
            "--data",
            str(data),
            "--out",
            str(out),
            "--before",
            "initial",
        ]
        run_ranks(world, EVALUATE, *arguments, *layout)
        reports.append(json.loads((out / "report.json").read_text()))
        assert {file.name for file in out.iterdir()} >= {"report.md", "loss.png", "similarities.png", "montage.png"}
    for other in reports[1:]:
        assert len(other["sets"]) == 4
        for one, two in zip(reports[0]["sets"], other["sets"], strict=True):
            assert one["name"] == two["name"]
            for key in ("precision_at_1", "before_training"):
                assert two[key] == pytest.approx(one[key], abs=100 / one["num_queries"] + 1e-6)
    about = [report["evaluation"] for report in reports]
    for key in ("step", "model", "fingerprint of the sets", "training", "prompt"):
        assert about[0][key] == about[1][key], key
    assert about[0]["step"] == 3 and "1.041 M parameters" in about[0]["model"] and about[1]["processes"] == 2
    assert "--before initial" in about[0]["command"] and "torch 2" in about[0]["versions"]


@pytest.fixture(scope="module")
def data_with_hard_negatives(openmoji_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs of words; most have hard negatives, of which some are the targets of other pairs."""
    folder = tmp_path_factory.mktemp("hard")
    words = [f"word {number}" for number in range(20)]
    pairs = []
    for number, word in enumerate(words):
        hard = [words[(number + step) % 20] for step in range(1, 1 + number % 4)]
        sides = [Side(text, []) for text in (f"what is {number}?", word, *hard)]
        pairs.append(Pair(f"pair-{number}", "words", *sides[:2], f"q{number}", word, sides[2:], hard))
    write_index(folder, Index({"words": write_subset(pairs, folder, "words", "retrieval")}))
    shutil.copy(openmoji_data / "tokenizer.model", folder)
    return folder


def test_every_choice_of_the_loss_at_once_is_the_same_on_two_ranks(
    data_with_hard_negatives: Path, tmp_path: Path
) -> None:
    config = tmp_path / "all.yaml"
    config.write_text(
        f"""
        model: {{preset: tiny}}
        data: {{path: {data_with_hard_negatives}, prompt: plain, hard_negatives: 2,
               subsets: {{words: {{mask_same_target: true, mask_margin: .inf}}}}}}
        loss: {{temperature: 0.1, mask_margin: 0.2, reward: ema, matryoshka_dims: [32, 128], hardness: hard_negatives}}
        train: {{steps: 3, global_batch_size: 16, micro_batch_size: 4}}
        optimizer: {{learning_rate: 0.001, epsilon: 0.00001}}
        log: {{histogram_interval: 2}}
        """
    )
    run_ranks(1, START, "--config", str(config), f"train.output={tmp_path / 'one'}")
    run_ranks(2, START, "--config", str(config), f"train.output={tmp_path / 'two'}")
    for one, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for key in ("loss", "gradient_norm", "positive_similarity", "hardest_negative_similarity"):
            assert other[key] == pytest.approx(one[key], abs=1e-4, rel=1e-4), key
        assert other["similarity_overlap"] == pytest.approx(one["similarity_overlap"], abs=0.13)  # two queries of 16
        assert 0 < one["hard_negatives"] == other["hard_negatives"] <= 32
        assert 1 < other["effective_negatives"] < 15 + one["hard_negatives"]
    for name in ("positive_histogram", "hardest_share_histogram"):  # of the queries of both ranks
        assert [sum(record.get(name, [])) for record in log_of(tmp_path / "two")] == [0, 16, 0]


def test_negatives_of_the_own_micro_batch_are_gathered_from_nobody(openmoji_data: Path, tmp_path: Path) -> None:
    """Micro batches of four compare the same four pairs on one rank and on two, which the gathered ones do not."""
    logs = {}
    for world in (1, 2):
        for negatives in ("own_micro_batch", "micro_batch"):
            settings = [f"loss.negatives={negatives}", "train.micro_batch_size=4", "optimizer.epsilon=0.00001"]
            settings += [f"data.path={openmoji_data}", f"train.output={tmp_path / negatives / str(world)}"]
            run_ranks(world, TRAIN, *settings, *SHORT)
            logs[negatives, world] = log_of(tmp_path / negatives / str(world))
    for one, other in zip(logs["own_micro_batch", 1], logs["own_micro_batch", 2], strict=True):
        for key in ("loss", "gradient_norm", "positive_similarity", "hardest_negative_similarity"):
            assert other[key] == pytest.approx(one[key], abs=1e-4, rel=1e-4), key
        assert other["effective_negatives"] <= 3 + 1e-5
    assert logs["own_micro_batch", 1][0]["loss"] == pytest.approx(logs["micro_batch", 1][0]["loss"], abs=1e-5)
    assert logs["micro_batch", 2][0]["loss"] > logs["own_micro_batch", 2][0]["loss"] + 0.1


def test_averaged_weights_that_are_not_there_are_named(runs: dict[str, Path], openmoji_data: Path) -> None:
    done = run_script(EVALUATE, "prepared", "--checkpoint", runs["one"], "--data", openmoji_data, "--average")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "has no averaged weights: its run had loss.reward=self, not ema" in done.stderr


def test_run_folder_says_how_it_was_made(runs: dict[str, Path]) -> None:
    run = runs["tensor2_pipeline2"]
    current = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    assert current.name == "step-0000003"
    assert "tensor: 2" in (current / "config.yaml").read_text()
    assert (run / "config.yaml").read_text() == (current / "config.yaml").read_text()
    assert not list(run.rglob("*.partial"))


def copy_data(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "data"))


def a_shard(data: Path) -> Path:
    return data / read_index(data).subsets["name_to_image"].shards[0].file


def fails_with(*overrides: str, config: Path = ROOT / "examples" / "tiny.yaml") -> str:
    """The one line of a run that ends with status 2 and no traceback."""
    done = run_script(START, "--config", config, *overrides)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_wrong_key_is_named(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model: {preset: tiny}\ntrain: {steps: 1}\nloss: {alhpa: 9}\n")
    line = fails_with(config=config)
    assert "loss.alhpa" in line and "mine.yaml" in line and "loss.alpha" in line


def test_impossible_layout_is_named(openmoji_data: Path) -> None:
    line = fails_with(f"data.path={openmoji_data}", "parallel.tensor=2")
    assert "1 processes" in line and "parallel.tensor=2" in line


def test_missing_shard_is_named(openmoji_data: Path, tmp_path: Path) -> None:
    data = copy_data(openmoji_data, tmp_path)
    shard = a_shard(data)
    shard.unlink()
    assert str(shard) in fails_with(f"data.path={data}", f"train.output={tmp_path / 'run'}", *SHORT)


def test_truncated_tar_is_named(openmoji_data: Path, tmp_path: Path) -> None:
    data = copy_data(openmoji_data, tmp_path)
    shard = a_shard(data)
    shard.write_bytes(shard.read_bytes()[:-5000])
    assert str(shard) in fails_with(f"data.path={data}", f"train.output={tmp_path / 'run'}", *SHORT)


def test_error_that_all_ranks_meet_is_said_once(openmoji_data: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        run_ranks(2, TRAIN, f"data.path={openmoji_data}", "parallel.tensor=3")
    assert str(failure.value).count("error: 2 processes cannot be split into parallel.tensor=3") == 1


def test_bf16_follows_fp32(runs: dict[str, Path], openmoji_data: Path, tmp_path: Path) -> None:
    """Saving averaged weights at every step must not disturb it."""
    settings = ["model.precision=bf16", "loss.reward=ema", "checkpoint.interval=1"]
    run_ranks(2, TRAIN, f"data.path={openmoji_data}", f"train.output={tmp_path}", *SHORT, *settings)
    for exact, rounded in zip(log_of(runs["one"]), log_of(tmp_path), strict=True):
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)
        assert rounded["loss"] != exact["loss"]
        assert rounded["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=0.1)


def test_output_that_cannot_be_written_is_named(openmoji_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = fails_with(f"data.path={openmoji_data}", f"train.output={tmp_path / 'file'}", *SHORT)
    assert f"train.output={tmp_path / 'file'} cannot be made: File exists" in line


def test_kernels_that_are_not_installed_are_named(openmoji_data: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("Transformer Engine is installed")
    line = fails_with(
        f"data.path={openmoji_data}", f"train.output={tmp_path}", "model.kernels=transformer_engine", *SHORT
    )
    assert "model.kernels=transformer_engine needs Transformer Engine" in line


def test_step_without_a_single_readable_pair_goes_on(openmoji_data: Path, tmp_path: Path) -> None:
    """No sequence fits eight tokens once it has a picture: every micro batch is empty on both ranks."""
    settings = ["data.max_length=8", "data.max_bad_fraction=1"]
    run_ranks(2, TRAIN, f"data.path={openmoji_data}", f"train.output={tmp_path}", *SHORT, *settings)
    for record in log_of(tmp_path):
        assert (record["pairs"], record["skipped"], record["loss"]) == (0, 16, 0)


def test_missing_data_and_missing_checkpoint_are_named(tmp_path: Path, openmoji_data: Path) -> None:
    assert str(tmp_path / "nowhere") in fails_with(f"data.path={tmp_path / 'nowhere'}")
    done = run_script(EVALUATE, "prepared", "--checkpoint", tmp_path / "none", "--data", openmoji_data)
    assert done.returncode == 2
    assert f"error: {tmp_path / 'none'}" in done.stderr and "Traceback" not in done.stderr


def test_corrupt_image_is_skipped_and_counted(openmoji_data: Path, tmp_path: Path) -> None:
    """Five pictures of a subset damaged on disk: their pairs are left out, the run goes on to its end on both ranks."""
    data = copy_data(openmoji_data, tmp_path)
    shard = a_shard(data)
    content = shard.read_bytes()
    damaged = content.replace(b"IDAT", b"IDAX", 5)  # the data chunk of five PNG files
    assert damaged != content
    shard.write_bytes(damaged)
    text = (ROOT / "examples" / "tiny.yaml").read_text()
    mixture = text[text.index("  subsets:") : text.index("\nloss:")]
    config = tmp_path / "only.yaml"
    config.write_text(text.replace(mixture, "  subsets: {name_to_image: {weight: 1}}\n"))
    pairs = read_index(data).subsets["name_to_image"].pairs
    steps = pairs // 16
    arguments = [f"data.path={data}", f"train.output={tmp_path / 'run'}", f"train.steps={steps}"]
    output = run_ranks(2, START, "--config", str(config), *arguments, "train.global_batch_size=16")
    records = log_of(tmp_path / "run")
    seen = sum(record["skipped"] for record in records)
    assert 0 < seen <= 5
    assert all(record["pairs"] + record["skipped"] == 16 for record in records)
    assert all(record["loss"] > 0 for record in records)
    assert output.count(f"left out a pair of subset name_to_image: {shard}: sample ") == seen


def test_last_save_that_fails_is_an_error(openmoji_data: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()  # where the folder would be
    with pytest.raises(AssertionError, match="error: the run ends after step 2, which is not saved") as caught:
        run_ranks(1, TRAIN, f"data.path={openmoji_data}", f"train.output={tmp_path}", *SHORT, "train.steps=2")
    assert "exit code 2" in str(caught.value) and "could not be saved: " in str(caught.value)
    state = read_state(tmp_path)
    assert (state["state"], state["step"]) == ("failed", 2) and "step 2, which is not saved" in state["reason"]
