"""Reading, overriding and checking the configuration: what is wrong is refused, and the message says where."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

from megatron_llave.config import data, lora, loss, mining, model, optimizer, schema
from megatron_llave.config.checks import validate
from megatron_llave.config.load import config_from_dict, load_config, override_config, save_config
from megatron_llave.config.parse import Plain, TypedReader
from megatron_llave.config.presets import PRESETS
from megatron_llave.config.schema import RunConfig, loss_of_subset
from megatron_llave.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml")) + sorted((ROOT / "examples" / "studies").glob("*.yaml"))
TINY = "model: {preset: tiny}\n"
STEPS = "train: {steps: 3}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value), "the message must be one line"
    return str(error.value)


def test_file_then_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, TINY + "train: {steps: 5, seed: 3}\noptimizer: {learning_rate: 1e-3}\n")
    subsets = ["data.subsets.vqa.start_step=4", "data.subsets.x={}"]
    cfg = load_config(path, ["train.steps=7", "optimizer.warmup_steps=2", *subsets])
    assert (cfg.train.steps, cfg.train.seed) == (7, 3)
    assert (cfg.optimizer.learning_rate, cfg.optimizer.warmup_steps) == (0.001, 2)
    assert {name: subset.start_step for name, subset in cfg.data.subsets.items()} == {"vqa": 4, "x": 0}
    assert cfg.loss == RunConfig().loss


def test_unknown_key_in_file_names_key_file_and_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path, TINY + "train: {global_batchsize: 5}\n")
    assert message(path) == f"unknown key train.global_batchsize in {path}; did you mean train.global_batch_size?"
    path = write(tmp_path, TINY + "qqq: 1\n")
    assert message(path).startswith(f"unknown key qqq in {path}; known keys: model, parallel, data")


NO_FLOATS = ("1_0.5", "1e-1_0", "٣", "1e-400", "1e400", "0x1p-3", "1e")


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("train.step=3", "train.steps"),
        ("trian.steps=3", "train"),
        ("model.vision.hidden=3", "model.vision.hidden_size"),
        ("data.subsets.vqa.wieght=3", "data.subsets.vqa.weight"),
    ],
)
def test_unknown_key_on_the_command_line(tmp_path: Path, override: str, suggestion: str) -> None:
    text = message(write(tmp_path, TINY), override)
    assert "unknown key" in text and "the command line" in text
    assert text.endswith(f"did you mean {suggestion}?")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps=many", ["train.steps", "many"]),
        ("train.steps=1.5", ["train.steps", "1.5"]),
        ("lora.rank=-1", ["lora.rank=-1 must be a finite number of at least 0"]),
        ("lora.rank=8", ["lora.rank=8 needs checkpoint.init"]),
        ("optimizer.min_learning_rate=1", ["optimizer.min_learning_rate=1.0 is above learning_rate="]),
        ("lora.alpha=0", ["lora.alpha=0.0 must be a finite number above 0"]),
        ("lora.alpha=64", ["lora.alpha has no effect without lora.rank; set that too, or to 0 for no adapters"]),
        ("lora.dropout=1", ["lora.dropout=1.0 must be at least 0 and below 1"]),
        ("lora.init=pissa", ["lora.init='pissa' is not one of kaiming, gaussian"]),
        ("lora.targets=[]", ["lora.targets=[] gives no layer an adapter"]),
        ("lora.targets=[q_proj, q_proj]", ["names a layer twice"]),
        ("train.steps=-1", ["train.steps", "-1"]),
        ("train=3", ["train", "section", "3"]),
        ("train.steps=12:30:45", ["train.steps=12:30:45 must be a whole number"]),
        *((f"optimizer.learning_rate={x}", [f"optimizer.learning_rate={x} must be a number"]) for x in NO_FLOATS),
        ("optimizer.learning_rate=inf", ["optimizer.learning_rate=inf must be a finite number of at least 0"]),
        ("data.image_background=#ffffff", ["must be a list such as [a, b], not '#ffffff'"]),
        ("checkpoint.init=", ["override 'checkpoint.init=' has no value; null is none, and '' an empty text"]),
        ("train.output=a\udcff", ["train.output='a\\udcff' holds a NUL or a byte that is not UTF-8"]),
        ("train.steps=1e3", ["train.steps=1e3 must be a whole number"]),
        ("train.steps=0x10", ["train.steps=0x10 must be a whole number"]),
        ("train.steps=true", ["train.steps=true must be a whole number"]),
        (f"train.steps={'9' * 5000}", ["must be a whole number"]),
        ("optimizer.learning_rate=12:30", ["optimizer.learning_rate=12:30 must be a number"]),
        (f"parallel.sequence={10**26}", ["parallel.sequence=1", "must be true or false"]),
        ("parallel.sequence=1", ["parallel.sequence=1 must be true or false"]),
        ("train.steps=???", ["train.steps=??? is no value"]),
        ("train.output=???", ["train.output=??? is no value"]),
        ("train.output=a\0b", ["train.output=", "holds a NUL"]),
        ("train.output=${oc.env:HOME}", ["train.output=${oc.env:HOME}", "is not resolved"]),
        ("model.preset=${oc.env:NOPE}", ["model.preset=${oc.env:NOPE}", "is not resolved"]),
        ("data.subsets={a: {weight: '${train.seed}'}}", ["data.subsets=", "is not resolved"]),
        ("optimizer.part_start_steps=- 1", ["optimizer.part_start_steps", "must be a mapping"]),
        ("optimizer.part_start_steps=[1]", ["optimizer.part_start_steps", "must be a mapping"]),
        ("optimizer.moments=fp8", ["optimizer.moments='fp8' is not one of fp32, bf16"]),
        ("optimizer.moments=bf16", ["optimizer.moments=bf16", "model.precision=fp32", "use bf16 or fp8"]),
        ("optimizer.offload_fraction=2", ["optimizer.offload_fraction=2.0 must be in 0 to 1"]),
        ("optimizer.offload_overlap=true", ["optimizer.offload_overlap=true has nothing to overlap"]),
        ("optimizer={moments: bf16, offload_fraction: 0.5}", ["needs optimizer.moments=fp32"]),
        ("optimizer.vision_layer_decay=0", ["optimizer.vision_layer_decay=0.0 must be above 0 and at most 1"]),
        ("model.freeze=vision", ["model.freeze", "must be a list such as [a, b]"]),
        ("model.freeze={vision: 1}", ["model.freeze", "must be a list such as [a, b]"]),
        ("data.subsets.a=3", ["data.subsets.a", "section", "3"]),
        ("data.subsets={a: 1, a: 2}", ["data.subsets", "the key a is given twice"]),
        ("data.subsets={[1]: 2}", ["data.subsets", "a key must be a word"]),
        (f"data.subsets={'[' * 100_000}", ["data.subsets=", "not valid YAML"]),
        ("train.steps=null", ["train.steps", "null"]),
        ("model.preset=3b", ["model.preset", "3b", "tiny, 0.5b, 2b, 7b"]),
        ("model.freeze=[vison]", ["model.freeze", "vison", "vision, projector, language"]),
        ("model.image_grids=[[1,1],3]", ["model.image_grids[1]", "must be a list", "3"]),
        ("model.image_grids=[[1,2,3]]", ["model.image_grids", "[1, 2, 3]"]),
        ("model.language.num_heads=3", ["model.language.hidden_size=128", "num_heads=3"]),
        ("parallel.tensor=0", ["parallel.tensor=0", "at least 1"]),
        ("loss.temperature=0", ["loss.temperature=0", "positive"]),
        ("loss={temperature_learning: one, temperature: 2}", ["loss.temperature=2", "temperature_bounds=[0.01, 1.0]"]),
        ("loss.temperature_learning=all", ["loss.temperature_learning", "none, one, subset"]),
        ("data.subsets.a.weight=0", ["data.subsets.a.weight=0", "positive"]),
        ("data.subsets.a.start_step=9", ["data.subsets", "a", "step 0"]),
        ("train.global_batch_size=0", ["train.global_batch_size=0", "at least 2"]),
        ("train.steps", ["train.steps", "section.key=value"]),
        ("data.subsets=[unclosed", ["data.subsets=[unclosed"]),
    ],
)
def test_values_that_cannot_work(tmp_path: Path, override: str, parts: list[str]) -> None:
    text = message(write(tmp_path, TINY + STEPS), override)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a b",
            " a",
            "a # b",
            "a: b",
            "'",
            "~x",
            "yes",
            "no",
            "@a",
            "%a",
            "*a",
            "&a",
            "!a",
            "1e3",
            "010",
            "12:30:45",
            "1_0",
        ),
        *("[a", "{a", "-", "- a", "> a", "| a", "a,b", "true", "0", "2026-11-26", "=a", "a=b", "\u00e4\u2028b"),
    ],
)
def test_a_text_arrives_as_it_was_written(tmp_path: Path, text: str) -> None:
    """On the command line as it stands, also in quotes of YAML; and saved and loaded again."""
    path = write(tmp_path, TINY + STEPS)
    for given in (text, json.dumps(text)):
        cfg = load_config(path, [f"train.output={given}"])
        assert cfg.train.output == text
        save_config(cfg, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == cfg
    if text == text.strip() and re.fullmatch(r"[\w:-]+", text) and text != "-":
        assert load_config(write(tmp_path, TINY + f"train: {{steps: 3, output: {text}}}\n")).train.output == text


def test_a_mapping_of_the_file_is_emptied_or_replaced_from_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, TINY + STEPS + "data: {subsets: {a: {weight: 2}, b: {}}}\n")
    assert set(load_config(path).data.subsets) == {"a", "b"}
    for nothing in ("null", "{}", "~"):
        assert load_config(path, [f"data.subsets={nothing}"]).data.subsets == {}
        cfg = load_config(path, [f"data.subsets={nothing}", "data.subsets.c.weight=3"])
        assert {name: subset.weight for name, subset in cfg.data.subsets.items()} == {"c": 3}
    assert set(load_config(path, ["data.subsets.c={}"]).data.subsets) == {"a", "b", "c"}
    assert override_config(load_config(path), ["data.subsets=null"]).data.subsets == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: 3, steps: 4}", "the key steps is given twice"),
        ("train: {steps: 12:30:45}", "train.steps=12:30:45 must be a whole number"),
        ("train: {steps: 3, output: '${oc.env:HOME}'}", "is not resolved"),
        ("train: {steps: '3'}", "train.steps=3 must be a whole number"),
        ("train: {output: !!python/object:os.system {}}", "not valid YAML"),
        *((f"train: {{output: !!{tag}}}", "not valid YAML") for tag in ("int 3", "int ''", "bool x", "timestamp x")),
        ("train: [1]", "train in .* must be a section with keys"),
        ("optimizer: {part_start_steps: [1]}", "must be a mapping of names"),
        ("? [1]\n: 2", "a key must be a word"),
        ("[" * 100_000, "not valid YAML: nested deeper than 100"),
        ("{" * 100_000, "not valid YAML: nested deeper than 100"),
        ("x" * (2**20 + 1), "more than the 1048576 that are read"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]", "unknown key a"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path: Path, text: str, said: str) -> None:
    assert re.search(said, message(write(tmp_path, text)))


def test_aliases_that_stand_for_too_much_are_refused(tmp_path: Path) -> None:
    row = "[" + ",".join(["[1, 1]"] * 300) + "]"
    wide = f"model: {{preset: tiny, image_grids: &g {row}}}\n" + STEPS + "data: {subsets: {"
    text = wide + ", ".join(f"s{i}: {{weight: 1}}" for i in range(3)) + "}}\n"
    assert len(load_config(write(tmp_path, text)).data.subsets) == 3
    nested = "a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{x: *{'a' if i == 0 else f'b{i - 1}'}}}\n" for i in range(20))
    assert "unknown key" in message(write(tmp_path, nested))
    names = "abcdefghi"
    bomb = [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip(names, names[1:])]
    levels = ["a: &a [x, x]", *bomb]
    assert "more than 100000 values" in message(write(tmp_path, "\n".join(levels)))
    overrides = ["data.subsets={" + ", ".join(levels) + "}"]
    with pytest.raises(ConfigError, match="more than 100000 values"):
        load_config(write(tmp_path, STEPS), overrides)
    assert "part of" in message(write(tmp_path, "data: &a [*a]"))
    reader = TypedReader("a.yaml")
    with pytest.raises(ConfigError, match="a.yaml has more than 100000 values"):
        reader.read(list[int], [Plain("1")] * 100_001, "k")


def test_a_device_in_place_of_a_file_is_refused() -> None:
    assert message(Path("/dev/zero")).startswith("/dev/zero cannot be read: it is not a regular file")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.yaml"
    assert message(missing) == f"configuration file {missing} does not exist"
    path = write(tmp_path, "model: [unclosed\n")
    assert message(path).startswith(f"{path} is not valid YAML")
    path = write(tmp_path, "- a\n- b\n")
    assert message(path).startswith(f"{path} must hold sections")
    path = write(tmp_path, TINY + "train: 5\n")
    assert message(path) == f"train in {path} must be a section with keys, not 5"


def test_a_single_pair_has_no_negatives_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, TINY + "loss: {negatives: own_micro_batch}\ntrain: {steps: 5, micro_batch_size: 1}\n")
    assert "train.micro_batch_size=1 a pair has no negative" in message(path)


def test_no_sizes_at_all_is_refused(tmp_path: Path) -> None:
    assert "model.preset" in message(write(tmp_path, "train: {steps: 5}\n"))


def test_preset_fills_and_given_keys_win(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {preset: tiny, language: {num_layers: 5}}\n" + STEPS)
    cfg = load_config(path, ["model.vision.num_layers=1"])
    expected = PRESETS["tiny"]
    assert (cfg.model.language.num_layers, cfg.model.vision.num_layers) == (5, 1)
    assert cfg.model.language.hidden_size == expected["language"]["hidden_size"]
    assert cfg.model.vision.image_size == expected["vision"]["image_size"]
    other = load_config(write(tmp_path, TINY + STEPS), ["model.preset=0.5b"])
    assert other.model.language.hidden_size == PRESETS["0.5b"]["language"]["hidden_size"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_a_valid_config(tmp_path: Path, preset: str) -> None:
    cfg = load_config(write(tmp_path, f"model: {{preset: {preset}}}\n{STEPS}"))
    validate(cfg)
    assert cfg.model.language.num_heads % cfg.model.language.num_kv_heads == 0
    assert cfg.model.image_grids == PRESETS[preset].get("image_grids", [])


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    subsets = ["data.subsets.vqa.weight=2.5", "data.subsets.a={}"]
    path = write(tmp_path, "model: {preset: 2b}\n" + STEPS)
    cfg = load_config(path, ["model.freeze=[vision]", "train.micro_batch_size=4", *subsets])
    save_config(cfg, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == cfg
    assert load_config(tmp_path / "saved.yaml", ["train.seed=1"]) != cfg


def test_sections_left_out_are_not_taken_from_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, TINY + STEPS + "parallel: {tensor: 4, sequence: true}\n")
    assert load_config(path).parallel.tensor == 4
    cfg = load_config(path, ["parallel.pipeline=2"], leave_out=["parallel"])
    assert (cfg.parallel.tensor, cfg.parallel.pipeline, cfg.parallel.sequence) == (1, 2, False)


SECTIONS = (data, lora, loss, mining, model, optimizer, schema)


def test_every_field_has_a_docstring_under_it() -> None:
    bare, documented = [], 0
    source = "\n".join(Path(module.__file__).read_text() for module in SECTIONS)
    for cls in ast.parse(source).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for statement, following in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                value = following.value if isinstance(following, ast.Expr) else None
                is_text = isinstance(value, ast.Constant) and isinstance(value.value, str) and bool(value.value.strip())
                documented += is_text
                bare += [] if is_text else [f"{cls.name}.{statement.target.id}"]
    assert bare == []
    classes = {v for module in SECTIONS for v in vars(module).values() if dataclasses.is_dataclass(v)}
    assert documented == sum(len(cls.__annotations__) for cls in classes) > 0


def test_number_of_keys_stays_small() -> None:
    """The sizes of a model do not count: a preset gives them, or the weights that are imported. Nor do the rules and
    the search of mining, which a command has as its options too."""

    def count(cls: type) -> int:
        nested = [field.default_factory for field in dataclasses.fields(cls)]
        return sum(count(inner) if dataclasses.is_dataclass(inner) else 1 for inner in nested)

    sizes = count(model.VisionConfig) + count(model.LanguageConfig)
    assert 40 < count(RunConfig) - sizes - count(mining.Rules) - count(mining.Search) <= 120


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_loads(path: Path) -> None:
    cfg = load_config(path)
    assert (cfg.train.steps > 0) != (cfg.train.epochs > 0) and cfg.model.preset in PRESETS


def test_there_are_examples() -> None:
    assert (ROOT / "examples" / "tiny.yaml") in EXAMPLES


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "seed", -1),
        ("train", "global_batch_size", 1),
        ("optimizer", "learning_rate", -1.0),
        ("optimizer", "learning_rate", float("nan")),
        ("optimizer", "beta1", 1.5),
        ("optimizer", "warmup_steps", -5),
        ("loss", "temperature", float("inf")),
        ("loss", "temperature_warmup_steps", -3),
        ("loss", "negatives", "all"),
        ("loss", "hardness", "everything"),
        ("loss", "hardness", "hard_negatives"),  # of which there are none
        ("loss", "reward", "teacher"),
        ("loss", "reward", "stored"),  # of which it is not said where they are
        ("loss", "temperature_bounds", [0.1, 0.01]),
        ("loss", "temperature_learning_rate", 0.0),
        ("loss", "ema_decay", 1.0),
        ("loss", "mask_margin", float("nan")),
        ("loss", "mask_margin", -3.0),
        ("loss", "matryoshka_dims", [64, 32]),
        ("loss", "matryoshka_dims", [0, 32]),
        ("loss", "matryoshka_dims", [64, 129]),
        ("model", "dropout", 1.0),
        ("log", "histogram_interval", -1),
        ("log", "montage_queries", -1),
        ("log", "montage_queries", 3),  # of which no evaluation tells the best candidates
        ("checkpoint", "interval", -1),
        ("evaluate", "tokens_per_batch", 0),
        ("parallel", "timeout_seconds", 0),
        ("data", "hard_negatives", -1),
        ("data", "subsets", {"a": {"weight": float("inf")}}),
        ("data", "subsets", {"a": {"mask_margin": float("nan")}}),
        ("data", "subsets", {"a": {"alpha": -1.0}}),
        ("data", "subsets", {"a": {"negatives": "global_batch"}}),
        ("data", "subsets", {"a": {"objective": "own"}}),
        ("data", "positives", 0),
        ("loss", "objective", "infonce"),
        ("loss", "soft_labels", "stored_scores"),
        ("loss", "soft_label_loss", "kl"),
        ("loss", "soft_label_weight", 0.0),
        ("loss", "soft_label_temperature", 0.0),
        ("loss", "contrastive_weight", 0.5),
        ("data", "subsets", {"a": {"temperature": 0.0}}),
    ],
)
def test_value_out_of_range_is_named(section: str, key: str, value: object) -> None:
    given = {"model": {"preset": "tiny"}, "train": {"steps": 1}}
    given[section] = given.get(section, {}) | {key: value}
    with pytest.raises(ConfigError, match=rf"{section}\.{key}.*") as error:
        config_from_dict(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vision": {"image_size": 10}}, "model.vision.image_size=10"),
        ({"language": {"num_kv_heads": 3}}, "model.language.num_kv_heads=3"),
        ({"language": {"hidden_size": 132, "num_heads": 44, "num_kv_heads": 44}}, "must be even"),
        ({"freeze": ["vision", "projector", "language"]}, "leaves nothing to train"),
    ],
)
def test_model_that_cannot_work_is_named(changes: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config_from_dict({"model": {"preset": "tiny"} | changes, "train": {"steps": 1}})


def test_a_subset_has_rules_of_its_own_or_those_of_the_loss() -> None:
    subsets = {"a": {"mask_same_target": False, "mask_margin": float("inf")}, "b": {}, "c": {"mask_margin": 0.0}}
    subsets["b"] |= {"negatives": "own"}
    subsets["c"] |= {"alpha": 0.0, "temperature": 0.5, "objective": "cosent"}
    cfg = config_from_dict(
        {
            "model": {"preset": "tiny"},
            "train": {"steps": 1},
            "loss": {"mask_same_target": True, "mask_margin": 0.1, "alpha": 3, "soft_labels": "scores"},
            "data": {"subsets": subsets, "hard_negatives": 1},
        }
    )
    rules = {name: loss_of_subset(cfg, name) for name in ("a", "b", "c", "elsewhere")}
    assert [rule.mask_same_target for rule in rules.values()] == [False, True, True, True]
    assert [rule.mask_margin for rule in rules.values()] == [float("inf"), 0.1, 0.0, 0.1]
    assert [rule.alpha for rule in rules.values()] == [3, 3, 0, 3]
    assert [rule.negatives for rule in rules.values()] == ["global_batch", "own", "global_batch", "global_batch"]
    assert [rule.objective for rule in rules.values()] == ["contrastive", "contrastive", "cosent", "contrastive"]
    assert [rule.soft_labels for rule in rules.values()] == ["scores", "scores", None, "scores"]
    assert [rule.temperature for rule in rules.values()] == [0.02, 0.02, 0.5, 0.02]


def test_rules_of_subsets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, mixed = write(tmp_path, TINY + STEPS), "data.sub_batches=2 mixes subsets in one loss"
    said = message(path, "data.subsets.a={alpha: 0, mask_margin: 1}", "data.sub_batches=2")
    assert said == f"{mixed}: data.subsets.a.mask_margin cannot be set"
    learned = message(path, "loss.temperature_learning=subset", "data.sub_batches=2")
    assert learned == f"{mixed}, which has one temperature: use loss.temperature_learning=one, or data.sub_batches=1"
    own = message(path, "data.subsets.a.negatives=own")
    assert own == "data.subsets.a.negatives=own leaves no negatives while data.hard_negatives=0; set it to at least 1"
    soft = message(path, "loss.soft_labels=scores", "data.positives=1")
    assert soft == "loss.soft_labels weighs targets and hard negatives: with data.positives=1 set data.hard_negatives"
    order = message(path, "loss.objective=cosent", "loss.soft_labels=scores")
    assert order.startswith("loss.objective=cosent has no negatives and no soft labels")
    one = message(path, "loss.temperature_learning=one", "data.subsets.a.temperature=0.1")
    assert one == "data.subsets.a.temperature has no effect with loss.temperature_learning=one; use subset"
    beyond = message(path, "loss.temperature_learning=subset", "data.subsets.a.temperature=3")
    assert beyond.startswith("data.subsets.a.temperature=3.0, where learning starts, is not within")
    no_judge = "loss.reward=ema judges hardness, which no contrastive loss here gives a weight"
    judged, order = ["loss.reward=ema", "loss.alpha=0"], "data.subsets.a.objective=cosent"
    assert message(path, *judged).startswith(no_judge)
    assert load_config(path, [*judged, "data.subsets.a.alpha=2"]).loss.alpha == 0
    assert message(path, "loss.reward=ema", "data.subsets.a.alpha=0").startswith(no_judge)
    assert message(path, "loss.reward=ema", order).startswith(no_judge)
    soft_alone = ["loss.reward=ema", "loss.soft_labels=scores", "loss.contrastive_weight=0", "data.hard_negatives=1"]
    own_alone = ["loss.reward=ema", "loss.negatives=own", "loss.hardness=in_batch", "data.hard_negatives=1"]
    for unused in (soft_alone, own_alone):
        assert message(path, *unused).startswith(no_judge)
    assert load_config(path, own_alone[:2] + own_alone[3:]).loss.weighs_hardness
    for key in ("alpha=2", "mask_same_target=true", "mask_margin=0.1"):
        said = message(path, order, f"data.subsets.a.{key}")
        assert said == f"data.subsets.a.{key.split('=')[0]} has no effect with objective=cosent; leave it out"
    assert message(path, "loss.stored_embeddings=a.npy").startswith("loss.stored_embeddings=a.npy is used by")
    assert message(path, "loss.soft_labels=scores", "data.hard_negatives=1", order).endswith("has objective=cosent")
    beside_own = load_config(path, ["loss.negatives=own", "data.hard_negatives=1", order])
    assert loss_of_subset(beside_own, "a").negatives == "global_batch"
    both = message(path, order, "data.subsets.a.negatives=own")
    assert both.startswith("loss.objective=cosent has no negatives")


def test_saved_settings_without_effect_are_read(tmp_path: Path) -> None:
    """A checkpoint of a run to which they were not refused yet can still be used."""
    base = "checkpoint: {init: base}\n"
    for text in (
        "loss: {temperature_learning: one}\ndata: {subsets: {a: {temperature: 0.1}}}\n",
        "loss: {reward: ema, alpha: 0}\n",
        f"{base}lora: {{rank: 8, targets: [language]}}\noptimizer: {{part_learning_rates: {{vision: 1e-5}}}}\n",
        f"{base}lora: {{rank: 8, targets: [language]}}\noptimizer: {{vision_layer_decay: 0.9}}\n",
    ):
        path = write(tmp_path, TINY + text)
        saved = load_config(path, leave_out=["parallel"])
        assert override_config(saved, ["data.workers=0"]).data.workers == 0
        assert message(path)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (["model.freeze=[vision]", "lora.targets=[language, vision.fc1]"], "lora.targets: vision.fc1 is of a part"),
        (["optimizer.vision_layer_decay=0.9"], "vision_layer_decay=0.9 has nothing to slow down: lora.targets has no"),
        (
            ["optimizer.part_learning_rates.vision=1e-5"],
            "part_learning_rates.vision has nothing to train: lora.targets",
        ),
        (["optimizer.part_start_steps.projector=9"], "part_start_steps.projector has nothing to train: lora.targets"),
    ],
)
def test_keys_that_adapters_do_not_go_with(tmp_path: Path, others: list[str], said: str) -> None:
    given = ["checkpoint.init=base", "lora.rank=8"]
    assert load_config(write(tmp_path, TINY), given).lora.scale == 4
    assert load_config(write(tmp_path, TINY), ["lora.rank=0", "lora.alpha=64"]).lora.alpha == 64
    assert said in message(write(tmp_path, TINY), *given, *others)
