"""The variants of each study: what they change, that their configurations are valid, and in which order runs come."""

import json
from pathlib import Path

import pytest

from megatron_llave.config.load import load_config, override_config
from megatron_llave.data.mined_negatives import FORMAT, MANIFEST_FILE
from megatron_llave.errors import ConfigError
from megatron_llave.files import VERSION
from megatron_llave.report.paper_results import ABLATIONS
from megatron_llave.study.variants import ALPHAS, START, STUDIES, UNTRAINED, plan, run_name

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "studies"
FILES = {
    "freezing": "tiny_freezing.yaml",
    "reward": "tiny_reward.yaml",
    "lora": "../tiny_lora.yaml",
    "mining": "tiny_mining.yaml",
}
NEEDED = {
    "negatives": ["train.micro_batch_size=16"],
    "hardness": [],
    "hardness_modes": ["data.hard_negatives=2"],
    "reward": [],
    "mining": [],
    "freezing": [],
    "lora": [],
}


def load(name: str, *overrides: str):
    """A base configuration of the study."""
    judges = Path("runs", "judges")  # those that tiny_reward.yaml names; each test has a folder of its own
    judges.mkdir(parents=True, exist_ok=True)
    for judge in ("untrained.npy", "larger.npy", "larger.ids"):
        (judges / judge).touch()
    for mined in ("random", "filtered"):  # likewise those of tiny_mining.yaml
        Path("runs", "mined", mined).mkdir(parents=True, exist_ok=True)
        manifest = {"format": FORMAT, "version": VERSION, "complete": True}
        Path("runs", "mined", mined, MANIFEST_FILE).write_text(json.dumps(manifest))
    return load_config(EXAMPLES / FILES.get(name, "tiny.yaml"), [*NEEDED[name], *overrides])


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_is_a_valid_configuration_and_no_two_are_equal(name: str) -> None:
    cfg = load(name)
    study = STUDIES[name](cfg, 2)
    assert {study.reference_of(variant.name) for variant in study.variants} <= {
        variant.name for variant in study.variants
    }
    trained = [variant for variant in study.variants if not variant.merge]
    cfgs = [override_config(cfg, variant.overrides) for variant in trained]
    assert all(one != other for index, one in enumerate(cfgs) for other in cfgs[:index])
    assert len({run_name(variant.name, 0) for variant in study.variants}) == len(study.variants)
    for variant in study.variants:
        for other, share in variant.merge:
            assert other in {one.name for one in trained} and 0 < share < 1


@pytest.mark.parametrize("name", ABLATIONS)
def test_variants_of_the_paper_are_variants_here(name: str) -> None:
    assert ABLATIONS[name].keys() <= {variant.name for variant in STUDIES[name](load(name), 2).variants}


def test_batch_sizes_see_equal_pairs_or_make_equal_updates() -> None:
    cfg = load("negatives")
    for variant in STUDIES["negatives"](cfg, 2).variants[3:]:
        one = override_config(cfg, variant.overrides)
        pairs = one.train.steps * one.train.global_batch_size
        if "equal pairs" in variant.name:
            assert pairs == cfg.train.steps * cfg.train.global_batch_size
            warmup = cfg.loss.temperature_warmup_steps / cfg.train.steps
            assert one.loss.temperature_warmup_steps == pytest.approx(warmup * one.train.steps)
        else:
            assert one.train.steps == cfg.train.steps and pairs < cfg.train.steps * cfg.train.global_batch_size
        assert one.train.micro_batch_size <= one.train.global_batch_size // 2
    sizes = {
        override_config(cfg, variant.overrides).train.global_batch_size
        for variant in STUDIES["negatives"](cfg, 2).variants
    }
    assert sizes == {16, 32, 64, 128}


def test_batch_sizes_differ_from_what_they_are_compared_with_in_nothing_else() -> None:
    cfg = load("negatives", "loss.negatives=micro_batch")
    study = STUDIES["negatives"](cfg, 2)
    for variant in study.variants[3:]:
        assert study.reference_of(variant.name) == "global batch"
        assert override_config(cfg, variant.overrides).loss.negatives == "global_batch"
    assert study.reference_of("gathered") == "own micro batch"
    wanted = {run.variant.name for run in plan(study, cfg, [1], ["batch 16, equal pairs"])} - {UNTRAINED}
    assert wanted == {"own micro batch", "global batch", "batch 16, equal pairs"}


@pytest.mark.parametrize(
    ("total", "micro", "batches"), [(40, 4, {10, 20, 80}), (24, 4, {6, 12, 48}), (20, 2, {10, 40})]
)
def test_batch_sizes_are_whole_and_can_be_dealt(total: int, micro: int, batches: set[int]) -> None:
    cfg = load("negatives", f"train.global_batch_size={total}", f"train.micro_batch_size={micro}")
    for variant in STUDIES["negatives"](cfg, 2).variants[3:]:
        train = override_config(cfg, variant.overrides).train
        assert train.global_batch_size % (2 * train.micro_batch_size) == 0
        batches = batches - {train.global_batch_size}
        if "equal pairs" in variant.name:
            assert train.steps * train.global_batch_size == pytest.approx(cfg.train.steps * total, rel=0.002)
    assert batches == set()


def test_late_and_slow_towers() -> None:
    cfg = load("freezing")
    variants = {variant.name: variant for variant in STUDIES["freezing"](cfg, 1).variants}
    late = override_config(cfg, variants["vision from the middle"].overrides)
    assert late.optimizer.part_start_steps == {"vision": 200} and late.model.freeze == []
    slow = override_config(cfg, variants["vision at a tenth"].overrides)
    assert slow.optimizer.part_learning_rates == {"vision": pytest.approx(5e-5)}


def test_runs_come_after_those_they_need() -> None:
    cfg = load("freezing")
    study = STUDIES["freezing"](cfg, 1)
    runs = plan(study, cfg, [0, 1], trained_start=True)
    assert len(runs) == 2 * (1 + len(study.variants))
    for index, run in enumerate(runs):
        assert set(run.needs) <= {one.name for one in runs[:index]}
        assert (run.start == f"start-seed{run.seed}") == (run.variant.name != START and not run.variant.merge)
    some = plan(study, cfg, [3], ["merged, 25 % of frozen"], trained_start=True)
    names = {"start-seed3", "nothing-frozen-seed3", "vision-frozen-seed3", "merged-25-of-frozen-seed3"}
    assert {run.name for run in some} == names


def test_one_run_shows_the_weights_before_training() -> None:
    cfg = load("hardness", "optimizer.part_learning_rates={vision: 0.0001}", "optimizer.min_learning_rate=1e-5")
    runs = plan(STUDIES["hardness"](cfg, 1), cfg, [4, 5], ["alpha 9"])
    assert [run.name for run in runs] == [
        *("before-training-seed4", "alpha-0-seed4", "alpha-9-seed4"),
        *("alpha-0-seed5", "alpha-9-seed5"),
    ]
    untrained = override_config(cfg, runs[0].variant.overrides)
    assert runs[0].variant.name == UNTRAINED and untrained.train.steps == 1
    assert untrained.optimizer.learning_rate == untrained.optimizer.min_learning_rate == 0
    assert set(untrained.optimizer.part_learning_rates.values()) == {0}
    assert len(STUDIES["hardness"](cfg, 1).variants) == len(ALPHAS)


@pytest.mark.parametrize(
    ("name", "ranks", "overrides", "message"),
    [
        ("negatives", 1, [], "1 data-parallel ranks"),
        ("negatives", 2, ["train.micro_batch_size=32"], "and several micro batches"),
        ("negatives", 2, ["train.micro_batch_size=null"], "train.micro_batch_size=None"),
        ("negatives", 2, ["train.global_batch_size=18", "train.micro_batch_size=4"], "and several micro batches"),
        ("freezing", 1, ["optimizer.part_start_steps.vision=3"], "its variants set them"),
        ("hardness_modes", 1, ["data.hard_negatives=0"], "data.hard_negatives=0"),
        ("hardness_modes", 1, ["loss.alpha=0"], "loss.alpha=0"),
        ("reward", 1, ["loss.reward=self", "loss.stored_embeddings=null"], "They are self and None"),
        ("reward", 1, ["loss.stored_embeddings=runs/judges"], "every such file in FOLDER is a variant"),
        ("reward", 1, ["loss.stored_embeddings=runs/judges/none.npy"], "none.npy does not exist"),
        ("mining", 1, ["data.negatives=runs/mined"], "set data.negatives=FOLDER/NAME .* It is runs/mined"),
        ("mining", 1, ["data.order=null"], "set data.order to an order"),
        ("mining", 1, ["loss.alpha=0"], "loss.alpha=0 weights nothing"),
        ("freezing", 1, ["train.steps=0", "train.epochs=1"], "train.steps=0"),
        ("lora", 1, ["lora.rank=0"], "lora.rank=0"),
        ("lora", 1, ["optimizer.part_learning_rates.vision=1e-4"], "one rate"),
    ],
)
def test_base_that_cannot_tell_the_variants_apart_is_refused(name, ranks, overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        STUDIES[name](load(name, *overrides), ranks)


def test_each_file_of_embeddings_is_a_judge() -> None:
    cfg = load("reward")
    variants = {variant.name: variant for variant in STUDIES["reward"](cfg, 1).variants}
    assert list(variants) == ["self", "ema", "stored, larger", "stored, untrained"]
    losses = [override_config(cfg, variant.overrides).loss for variant in variants.values()]
    assert [loss.reward for loss in losses] == ["self", "ema", "stored", "stored"]
    files = [None, None, "runs/judges/larger.npy", "runs/judges/untrained.npy"]
    assert [loss.stored_embeddings for loss in losses] == files


def test_mining_has_each_folder_of_negatives_and_the_order_without_and_with_weighting() -> None:
    cfg = load("mining")
    study = STUDIES["mining"](cfg, 1)
    settings = {
        variant.name: (one.data.negatives, one.data.order, one.loss.alpha)
        for variant in study.variants
        for one in [override_config(cfg, variant.overrides)]
    }
    filtered, random, order = "runs/mined/filtered", "runs/mined/random", "runs/mined-order"
    kinds = {
        "no mining": (None, None),
        "filtered negatives": (filtered, None),
        "random negatives": (random, None),
        "hard batches": (None, order),
        "hard batches, filtered negatives": (filtered, order),
    }
    assert settings == {f"{kind}, alpha {alpha}": (*of, alpha) for kind, of in kinds.items() for alpha in (0, 9)}
    assert study.reference_of("hard batches, alpha 9") == "no mining, alpha 9" and study.needs_weights
    assert study.reference_of("no mining, alpha 9") == study.reference == "no mining, alpha 0"
    assert {one.name: one.terms for one in study.contrasts if "random" in one.name} == {
        "weighting with random negatives": (("random negatives, alpha 9", 1), ("random negatives, alpha 0", -1)),
        "weighting with random negatives, minus weighting with no mining": (
            *(("random negatives, alpha 9", 1), ("random negatives, alpha 0", -1)),
            *(("no mining, alpha 9", -1), ("no mining, alpha 0", 1)),
        ),
    }


def test_mining_that_has_not_ended_is_no_variant() -> None:
    cfg = load("mining")
    manifest = Path("runs", "mined", "random", MANIFEST_FILE)
    manifest.write_text(manifest.read_text().replace("true", "false"))
    with pytest.raises(ConfigError, match="the mining of runs/mined/random has not ended"):
        STUDIES["mining"](cfg, 1)


def test_adapters_and_all_weights_are_trained_in_the_same_way() -> None:
    cfg = load("lora")
    study = STUDIES["lora"](cfg, 1)
    assert study.reference == "all weights, rate 0.0005" and study.needs_weights
    trained = {variant.name: override_config(cfg, variant.overrides) for variant in study.variants}
    assert [one.lora.rank for one in trained.values()] == [0] * 3 + [8] * 6
    parts = [set(one.lora.targets) for one in list(trained.values())[3::3]]
    assert parts == [{"language"}, {"language", "projector", "vision"}]
    assert all((one.data, one.loss, one.train) == (cfg.data, cfg.loss, cfg.train) for one in trained.values())


def test_freezing_needs_something_to_freeze() -> None:
    cfg = load("freezing")
    with pytest.raises(ConfigError, match="study freezing needs trained weights"):
        plan(STUDIES["freezing"](cfg, 1), cfg, [0])
    cfg.checkpoint.init = "somewhere"
    assert plan(STUDIES["freezing"](cfg, 1), cfg, [0])[0].variant.name == UNTRAINED


def test_unknown_variant_is_named() -> None:
    cfg = load("hardness")
    with pytest.raises(ConfigError, match="'alpha 3' is none of study hardness's: 'alpha 0', 'alpha 0.5'"):
        plan(STUDIES["hardness"](cfg, 1), cfg, [0], ["alpha 3"])
