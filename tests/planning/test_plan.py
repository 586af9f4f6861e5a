"""A plan of a run: what it counts, what fits, and the tool that prints it."""

import sys
from dataclasses import replace
from pathlib import Path

import check_parameters
import pytest
from forking import run_script

from megatron_llave.commands import plan
from megatron_llave.config.load import config_from_dict, load_config, override_config
from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.model import PARTS
from megatron_llave.config.presets import PRESETS
from megatron_llave.config.schema import ParallelConfig, RunConfig
from megatron_llave.errors import ConfigError
from megatron_llave.models import model_without_memory
from megatron_llave.planning.context import layer_seconds, shortest_pairs
from megatron_llave.planning.flops import extra_flops, forward_flops, loss_flops, step_flops
from megatron_llave.planning.memory import Chunk, MicroBatch, temporary_bytes
from megatron_llave.planning.pair_lengths import Kind, SideShape, longest_batch, mmeb_like, read_kinds, targets_per_pair
from megatron_llave.planning.plan import count_parameters, find_fit, longest_pair, make_plan, mean_work
from megatron_llave.planning.token_budget import token_budget

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
QWEN_VL = ("qwen2vl", "qwen2_5vl", "qwen3vl")


def example(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / "examples" / f"{name}.yaml", overrides)


def plan_of(cfg: RunConfig, ranks: int):
    return make_plan(cfg, ranks, mmeb_like(cfg))


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_built_model(groups, preset: str) -> None:
    model = config_from_dict({"model": {"preset": preset}}).model
    chunk = Chunk(model, ParallelConfig(), model.language.num_layers, True, True)
    assert check_parameters.built(chunk, groups, None) == check_parameters.planned(chunk)


def test_parameters_are_those_of_every_rank() -> None:
    """At tensor 2 and pipeline 2: small models, and one of each family as large as it is released."""
    presets = ["tiny", "2b", *(f"tiny_{name}" for name in QWEN_VL), "qwen2vl_2b", "qwen2_5vl_3b", "qwen3vl_2b"]
    done = run_script(check_parameters.__file__, "2", "2", "1", *presets)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 2 * len(presets)


@pytest.mark.parametrize(("name", "millions"), [("0.5b", 893), ("2b", 1944), ("7b", 7483)])
def test_parameters_of_the_released_sizes(name: str, millions: float) -> None:
    found = sum(count_parameters(example(name).model).values()) / 1e6
    assert found == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(("name", "memory"), [("0.5b", 80), ("2b", 80), ("7b", 80), ("7b", 141)])
def test_examples_fit_where_they_say(name: str, memory: float) -> None:
    larger = ["parallel.tensor=1", "parallel.sequence=false"] if memory == 141 else []
    cfg = example(name, *larger)
    assert plan_of(cfg, 8).fits(memory * GIB)


def test_what_does_not_fit_gets_a_proposal_that_does() -> None:
    cfg = example("7b", "parallel.tensor=1", "parallel.sequence=false", "train.micro_batch_size=32")
    kinds = mmeb_like(cfg)
    assert not make_plan(cfg, 8, kinds).fits(80 * GIB)
    better, changes = find_fit(cfg, 8, kinds, 80 * GIB)
    assert changes and better.fits(80 * GIB)
    assert make_plan(override_config(cfg, changes), 8, kinds).fits(80 * GIB), "the overrides are what was planned"
    assert find_fit(cfg, 8, kinds, 2 * GIB) is None


def video(tokens: int) -> list[Kind]:
    """Pairs of a video, with 196 tokens per frame and tile, and a short text."""
    return [Kind(1, [(SideShape(tokens - 60, tokens - 92, tokens // 196), SideShape(60))])]


def test_states_of_the_optimizer_take_less_in_bf16_and_on_the_host() -> None:
    """The states of float32 are compared with what a step takes in test_memory.py, the others in tests/engine."""
    keys = ["moments=fp32", "moments=bf16", "offload_fraction=0.25"]
    whole, rounded, offloaded = (plan_of(example("7b", f"optimizer.{key}"), 8).worst for key in keys)
    assert rounded.memory["optimizer"] == pytest.approx(whole.memory["optimizer"] * 8 / 12, rel=1e-6)
    assert offloaded.memory["optimizer"] == pytest.approx(whole.memory["optimizer"] * 0.75, rel=1e-6)
    assert offloaded.offloaded == pytest.approx(whole.memory["optimizer"] * 0.25 * 16 / 12, rel=1e-6)
    assert whole.offloaded == 0 and offloaded.save == rounded.save == whole.save


@pytest.mark.parametrize("targets", [["language"], ["q_proj", "down_proj"]])
def test_adapters_are_those_of_the_built_model_and_make_a_plan_small(groups, targets: list[str]) -> None:
    cfg = example("7b", "checkpoint.init=base", "lora.rank=16", f"lora.targets={targets}", "model.recompute=full")
    built = model_without_memory(cfg.model, groups, cfg.lora)
    trained = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    assert count_parameters(cfg.model, cfg.lora)["adapters"] == trained
    adapted, whole = plan_of(cfg, 8), plan_of(replace(cfg, lora=LoraConfig()), 8)
    assert adapted.worst.memory["optimizer"] + adapted.worst.memory["gradients"] < 0.5 * GIB
    assert adapted.worst.total < whole.worst.total / 2
    assert adapted.model_flops < 0.8 * whole.model_flops
    with pytest.raises(ConfigError, match="only adapters of the decoder"):
        plan_of(override_config(cfg, ["lora.targets=[projector]"]), 8)
    with pytest.raises(ConfigError, match="lora.targets: qproj is no linear layer of this model's language"):
        plan_of(override_config(cfg, ["lora.targets=[q_proj, qproj]"]), 8)


def test_pairs_can_be_longer_with_context_parallel() -> None:
    cfg = example("7b", "train.global_batch_size=64", "train.micro_batch_size=4")
    longest = {}
    for context in (1, 2):
        shared = override_config(cfg, [f"parallel.context={context}"])
        longest[context] = longest_pair(shared, 8, video(6364), 80 * GIB)
        alone = override_config(shared, ["train.micro_batch_size=1"])
        for length, fits in ((0.98, True), (1.02, False)):
            assert make_plan(alone, 8, video(int(length * longest[context]))).fits(80 * GIB) == fits
    assert 1.5 < longest[2] / longest[1] < 2


def test_context_parallel_is_proposed_where_tensor_parallel_ends() -> None:
    """The 0.5b has two key heads, so no more than two tensor-parallel ranks."""
    cfg = example("0.5b", "train.global_batch_size=8", "train.micro_batch_size=1")
    _, changes = find_fit(cfg, 8, video(1_200_000), 80 * GIB)
    assert {"parallel.tensor=2", "parallel.context=2"} <= set(changes)


def test_context_ranks_save_time_where_they_compute_more_than_they_send() -> None:
    """The 0.5b by hand: 14 heads of 64 channels, two key heads, 896 hidden and 4,864 inner channels."""
    cfg = example("0.5b", "parallel.context=2")
    per_token = 2 * 896 * (2 * 896 + 2 * 128 + 3 * 4864)
    forward = (per_token * 1000 + 2 * 896 * (900**2 + 100**2)) / 989e12
    communication = 2 * (3.4e-6 + 1000 * 2 * 128 * 2 / 2 / 450e9)
    assert layer_seconds(cfg, 1000, 900**2 + 100**2) == pytest.approx((forward, communication), rel=1e-12)
    apart = override_config(cfg, ["parallel.tensor=2", "parallel.context=8"])  # on two nodes
    communication = 2 * 7 * (14e-6 + 1000 * 2 * 128 * 2 / 2 / 8 / 50e9)
    assert layer_seconds(apart, 1000, 900**2 + 100**2) == pytest.approx((forward / 2, communication), rel=1e-12)
    faster, cheaper = shortest_pairs(cfg, [Kind(1, [(SideShape(9000), SideShape(1000))])])

    def saved(tokens: int) -> tuple[bool, bool]:
        query, target = (-(-tokens * share // 10) for share in (9, 1))
        forward, communication = layer_seconds(cfg, query + target, query**2 + target**2)
        return 3 * forward / 2 > communication, forward > 2 * communication

    assert saved(faster)[0] and not saved(faster - 1)[0] and saved(cheaper)[1] and not saved(cheaper - 1)[1]
    assert 100 < faster < 200 < cheaper < 600


def test_pipeline_waits_and_splits() -> None:
    cfg = example("7b", "parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=4")
    found = plan_of(cfg, 8)
    assert found.bubble == 3 / (found.step.micro_batches + 3)
    assert 0 < found.balance < 1 and found.stages[0].flops == max(stage.flops for stage in found.stages)
    assert plan_of(example("7b"), 8).bubble == 0


def test_flops_of_the_way_of_computing() -> None:
    cfg = example("7b")
    work = mean_work([Kind(1, [(SideShape(800, 700, 5), SideShape(30))])], 8)
    assert (work.tokens, work.tiles) == (8 * 830, 40)
    once = extra_flops(cfg.model, work, embed_pass=True)
    cfg.model.freeze = []
    assert extra_flops(cfg.model, work, embed_pass=True) == forward_flops(cfg.model, work) > once > 0
    assert extra_flops(cfg.model, work, embed_pass=False) == 0
    cfg.model.recompute = "full"
    assert 0 < extra_flops(cfg.model, work, embed_pass=False) < step_flops(cfg.model, work) / 2
    assert (
        loss_flops(4, 8, [16]) == 4 * 2 * 4 * 8 * 16 == loss_flops(4, 8, [8, 8]) == loss_flops(4, 8, [16], True) * 2 / 3
    )


def test_longest_micro_batch_is_of_the_longest_pairs_of_one_kind() -> None:
    kinds = [
        Kind(1, [(SideShape(10), SideShape(1)), (SideShape(20), SideShape(2)), (SideShape(9), SideShape(1))]),
        Kind(1, [(SideShape(5), SideShape(5))]),
    ]
    assert [side.tokens for side in longest_batch(kinds, 2, hard_negatives=1)] == [20, 2, 2, 10, 1, 1]
    assert [side.tokens for side in longest_batch(kinds[1:], 2)] == [5, 5, 5, 5], "there are fewer pairs"
    several = Kind(1, [(SideShape(10), SideShape(3), SideShape(7)), (SideShape(12), SideShape(2))])
    assert [side.tokens for side in longest_batch([several], 1, hard_negatives=1)] == [10, 3, 7, 3]
    assert targets_per_pair([*kinds, several]) == 1.5 and mean_work([several], 2, 1).tokens == 10 + 6 + 7 + 12 + 4


def test_pairs_of_a_folder_are_measured(openmoji_data: Path) -> None:
    kinds = read_kinds(openmoji_data, example("tiny", f"data.path={openmoji_data}", "train.global_batch_size=16"))
    assert len(kinds) > 3 and all(kind.pairs and kind.share > 0 for kind in kinds)
    tiles = {side.tiles for kind in kinds for pair in kind.pairs for side in pair}
    assert tiles == {0, 1}, "the tiny model has no grids: a picture is one tile"


def test_sizes_must_be_known() -> None:
    with pytest.raises(ConfigError, match="name model.preset too"):
        plan_of(config_from_dict({"checkpoint": {"init": "somewhere"}}), 8)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    plan.main()


def test_tool_says_what_fits_on_one_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run(monkeypatch, "--config", "examples/7b.yaml", "--gpus", "1", "--gpu-memory", "24")
    output = capsys.readouterr().out
    assert "As configured it cannot start on 1 GPUs: 1 processes cannot be split into parallel.tensor=" in output
    assert "Nearest: parallel.tensor=1 " in output and " GB on the fullest rank" in output
    assert "Fits on " in output
    run(monkeypatch, "--config", "examples/7b.yaml", "--gpus", "1", "--gpu-memory", "400")
    assert "Fits: parallel.tensor=1 " in capsys.readouterr().out


def test_tool_says_what_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run(monkeypatch, "--config", "examples/7b.yaml", "--gpus", "8", "--gpu-memory", "40")
    output = capsys.readouterr().out
    assert "It does not fit" in output and "Fits: " in output
    for part in ("vision (frozen)", "activations", "pipeline bubble", "gathered by the loss", "(parallel.context=2)"):
        assert part in output
    sizes = ["--pair-tokens", "900", "40", "--pair-tiles", "5", "0"]
    run(monkeypatch, "--config", "examples/7b.yaml", "--gpus", "16", "--gpu-memory", "141", *sizes)
    output = capsys.readouterr().out
    assert "It fits" in output and "1 x 1 pairs" not in output and "940 tokens, 5 tiles" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml", "--gpus", "8", "--gpu-memory", "80"], "nowhere.yaml"),
        (["--config", "examples/7b.yaml", "--gpus", "3", "--gpu-memory", "80"], "3 processes cannot be split"),
        (["--config", "examples/7b.yaml", "--gpus", "0", "--gpu-memory", "80"], "--gpus 0 must be at least 1"),
        (["--config", "examples/7b.yaml", "--gpus", "9" * 20, "--gpu-memory", "80"], "at most 1000000"),
        (
            ["--config", "examples/7b.yaml", "--gpus", "8", "--gpu-memory", "80", "--pair-tokens", "9", "9"]
            + ["--pair-tiles", "9" * 20, "0"],
            "--pair-tiles 0 to 1000000",
        ),
        (["--config", "examples/7b.yaml", "--gpus", "8", "--gpu-memory", "-1"], "--gpu-memory -1 must be"),
        (["--config", "examples/7b.yaml", "--gpus", "8"], "--gpu-memory"),
    ],
)
def test_wrong_arguments_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code and message in error and error.count("\n") == 1, error


def test_a_token_budget_bounds_the_memory_of_every_kind_and_is_lowered_where_it_does_not_fit() -> None:
    cfg = example("2b", "train.micro_batch_size=null", "train.tokens_per_micro_batch=16384")
    kinds = [*mmeb_like(cfg), Kind(1, [(SideShape(300), SideShape(200))])]
    alone = [make_plan(cfg, 8, [kind]).worst for kind in kinds]
    text = alone[-1].total  # which has no tile
    assert all(0.8 * text < stage.total <= 1.01 * text for stage in alone)
    found = make_plan(cfg, 8, kinds)
    assert found.worst.total == pytest.approx(max(stage.total for stage in alone), rel=1e-3)  # with one more held
    assert found.step.held == 2 < found.step.micro_batches and found.step.has_embed_pass
    # A frozen vision encoder runs in each pass, and nothing of it is kept.
    assert found.worst.memory["vision features"] < 0.1 * GIB
    counted = make_plan(example("2b", "train.micro_batch_size=2"), 8, kinds)
    assert found.extra_flops > counted.extra_flops
    larger = make_plan(override_config(cfg, ["train.tokens_per_micro_batch=65536"]), 8, kinds)
    assert not larger.fits(80 * GIB)
    fit, overrides = find_fit(larger.cfg, 8, kinds, 80 * GIB)
    assert fit.fits(80 * GIB) and overrides == ["train.tokens_per_micro_batch=16384"]
    with pytest.raises(ConfigError, match="train.tokens_per_micro_batch=10 is less than any pair takes"):
        make_plan(override_config(cfg, ["train.tokens_per_micro_batch=10"]), 8, kinds)
    shared = override_config(cfg, ["parallel.pipeline=4", "parallel.virtual_pipeline=7"])
    assert make_plan(shared, 8, kinds).step.micro_batches % 4 == 0


@pytest.mark.parametrize("lora", [[], ["checkpoint.init=base", "lora.rank=16"]])
def test_a_tile_counts_as_the_tokens_that_need_its_memory(lora: list[str]) -> None:
    """By the formulas that test_memory.py compares with a real step: B tokens, or fewer and their tiles."""
    keys = ["model.freeze=[]", "train.micro_batch_size=null", "train.tokens_per_micro_batch=100000"]
    cfg = example("2b", *keys, *lora)
    budget, model = token_budget(cfg), replace(cfg.model, freeze=[*PARTS] if lora else [])
    chunk = Chunk(model, cfg.parallel, cfg.model.language.num_layers, True, True, cfg.lora)
    visual, _ = chunk.cost.of_tiles(cfg.model, 100)
    tokens = round(100000 - 100 * budget.tile_tokens)
    sides = [SideShape(100000)], [SideShape(tokens, visual, 100)]
    batches = [MicroBatch.of(side) for side in sides]
    needed = [chunk.activations(batch, True) + temporary_bytes(chunk, batch, True) for batch in batches]
    assert needed[1] == pytest.approx(needed[0], rel=0.02)
