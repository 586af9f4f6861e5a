"""Mined lists of random vectors: each rule against a plain numpy reference, at any number of ranks."""

import pickle
from pathlib import Path

import check_mining
import numpy as np
import pytest
from reference_mining import exact, mine
from run_ranks import run_ranks

from megatron_llave.config.mining import MiningConfig, Rules
from megatron_llave.data.stored_vectors import open_vectors
from megatron_llave.errors import ConfigError
from megatron_llave.mining.rules import Positives, below_ratio, choose, elect
from megatron_llave.options import mine as options

CHECK = Path(check_mining.__file__)


def lists(negatives: np.ndarray) -> list[list[int]]:
    return [[target for target in row if target >= 0] for row in negatives.tolist()]


def mined(folder: Path, n: int, models: int, world: int) -> dict[str, tuple]:
    """What all ranks have found, which is the same."""
    run_ranks(world, CHECK, str(folder), str(n), str(models))
    found = [(folder / f"{world}-{rank}.pickle").read_bytes() for rank in range(world)]
    assert len(set(found)) == 1
    return pickle.loads(found[0])


def require_reference(folder: Path, n: int, models: int, found: dict[str, tuple]) -> None:
    """Compare the lists of every rule with those of the reference."""
    names = [*(f"random/query/q{i}" for i in range(n)), *(f"random/target/t{i}" for i in range(n))]
    similarities = []
    for seed in (0, 1)[:models]:
        rows = open_vectors(folder / f"{seed}.npy").rows(names).numpy()
        similarities.append(exact(rows[:n], rows[n:]))
    positives = [[i] for i in range(n)]
    for i in range(0, n, 5):
        positives[i] += [(i + 1) % n, (i + 7) % n]
    alike = [[i // 1000 * 1000 + j for j in (100, 101, 102) if i % 1000 in (100, 101, 102)] or [i] for i in range(n)]
    taken = [own + ([(i + 3) % n] if i % 11 == 0 else []) for i, own in enumerate(positives)]
    hidden = [{other for target in own for other in alike[target]} for own in taken]
    for name, rules in {**check_mining.RULES, **(check_mining.OF_TWO if models > 1 else {})}.items():
        of_rule = similarities if name in check_mining.OF_TWO else similarities[:1]
        negatives, values, _, report = found[name]
        assert lists(negatives) == mine(of_rule, positives, hidden, rules), name
        assert report["kept"] == (negatives >= 0).sum() and report["queries"] == n, name
        row, column = (negatives >= 0).nonzero()
        known = np.stack([of_model[row, negatives[row, column]] for of_model in of_rule])
        assert (values[row, column] == known).any(0).all(), name


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    for seed in (0, 1):
        check_mining.write_vectors(folder, seed, 1200, 8)
    return folder


def test_every_rule_and_the_vote_are_those_of_the_reference(vectors: Path) -> None:
    found = mined(vectors, 1200, 2, 1)
    require_reference(vectors, 1200, 2, found)
    for name in ("skip", "ratio", "margin", "mean_margin", "floor", "ceiling", "min_positive"):
        assert found[name][3]["models"][0][name] > 0, f"the rule {name} has left nothing out"
    together = {name: found[name][3]["left_out_together"] for name in ("max_uses", "two of two")}
    assert together["max_uses"]["max_uses"] > 0 and together["two of two"]["votes"] > 0
    assert (
        found["min_positive"][2].any() and found["min_positive"][3]["queries_dropped"] == found["min_positive"][2].sum()
    )
    assert sum(found["nothing"][3]["similarity"]["candidates"]) == 1200 * 40


def test_the_same_at_four_ranks(vectors: Path) -> None:
    one, four = ((vectors / f"{world}-0.pickle") for world in (1, 4))
    assert mined(vectors, 1200, 2, 4) and one.read_bytes() == four.read_bytes()


def test_an_approximate_search_misses_some_and_says_how_many(vectors: Path) -> None:
    pytest.importorskip("faiss")
    found = mined(vectors, 1200, 1, 1)
    exactly = found["nothing"]
    assert found["all lists"][3] == exactly[3] | {"recall": [1.0]}
    for number in range(3):
        assert np.array_equal(found["all lists"][number], exactly[number])
    few, recall = found["few lists"], found["few lists"][3]["recall"]
    shares = [np.isin(right, of).mean() for of, right in zip(few[0][::2], exactly[0][::2])]  # up to 1000 queries
    assert recall == [pytest.approx(np.mean(shares), abs=1e-4)] and 0.2 < recall[0] < 0.95
    for right, of, values, expected in zip(exactly[0], few[0], few[1], exactly[1]):
        known = dict(zip(right.tolist(), expected.tolist()))
        assert all(known.get(target, value) == value for target, value in zip(of.tolist(), values.tolist()))
        assert (np.diff(values[of >= 0]) <= 0).all()


@pytest.mark.slow
def test_ten_thousand_vectors_at_one_two_and_four_ranks(tmp_path: Path) -> None:
    check_mining.write_vectors(tmp_path, 0, 10_000, 8)
    found = mined(tmp_path, 10_000, 1, 1)
    require_reference(tmp_path, 10_000, 1, found)
    for world in (2, 4):
        mined(tmp_path, 10_000, 1, world)
        assert (tmp_path / "1-0.pickle").read_bytes() == (tmp_path / f"{world}-0.pickle").read_bytes()


def test_a_ratio_of_a_negative_similarity_stays_below_the_positive() -> None:
    least = np.array([0.5, -0.5, 0.0])
    similarity = np.array([[0.46, 0.48], [-0.51, -0.54], [0.0, -0.1]])
    expected = [[True, False], [False, True], [False, True]]
    assert below_ratio(similarity, Positives(least, least, least), 0.95).tolist() == expected


def test_votes_order_before_ranks() -> None:
    first, second = np.array([[7, 3, 5, 9]]), np.array([[5, 2, 3, -1]])
    kept = [np.array([[True, True, True, False]]), np.array([[True, True, True, False]])]
    assert lists(elect([first, second], kept, 1)) == [[5, 3, 7, 2]]
    assert lists(elect([first, second], kept, 2)) == [[5, 3]]


def test_uses_are_counted_in_the_order_of_the_queries() -> None:
    uses = np.zeros(5, np.int64)
    chosen, used_up = choose(np.array([[1, 2, 3], [1, 2, -1], [1, 4, -1]]), 2, 2, uses)
    assert lists(chosen) == [[1, 2], [1, 2], [4]] and used_up == 1 and uses.tolist() == [0, 2, 2, 0, 1]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"depth": 4}, "--depth=4, --skip=0, --negatives=5: the candidates that are left are fewer than the negatives"),
        ({"floor": 0.5, "ceiling": 0.4}, "--floor=0.5 is above --ceiling=0.4"),
        ({"pick": "best"}, "--pick='best' is not one of hardest, random"),
        ({"max_uses": 0}, "--max-uses=0 must be a finite number of at least 1"),
        ({"ratio": float("nan")}, "--ratio=nan must be a finite number"),
    ],
)
def test_impossible_rules_are_one_line(rules: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        Rules(**rules)


def test_the_section_of_a_configuration_names_keys() -> None:
    with pytest.raises(ConfigError, match="^mining.max_uses=0 must be a finite number of at least 1"):
        MiningConfig(max_uses=0)
    with pytest.raises(ConfigError, match="^mining.depth=4, mining.skip=0, mining.negatives=5: .* raise mining.depth$"):
        MiningConfig(depth=4)


def test_overrides_may_stand_behind_a_list() -> None:
    words = "negatives --data d --out o --checkpoint a b parallel.tensor=2 --subsets x y model.precision=bf16"
    args = options.parse(words.split())
    assert (args.checkpoint, args.subsets) == (["a", "b"], ["x", "y"])
    assert args.overrides == ["model.precision=bf16", "parallel.tensor=2"]
    with pytest.raises(SystemExit):
        options.parse("negatives --data d --out o --checkpoint a --subsets parallel.tensor=2".split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--negatives none", "argument --negatives: invalid int value: 'none'"),
        ("--max-uses 1.5", "argument --max-uses: '1.5' must be a whole number, or none"),
        ("--ratio high", "argument --ratio: 'high' must be a number, or none"),
    ],
)
def test_a_mistyped_rule_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["negatives", "--checkpoint", "c", "--data", "d", "--out", "o"]
    with pytest.raises(SystemExit, match="2"):
        options.parse([*given, *words.split()])
    assert message in capsys.readouterr().err
    rules = options.rules_of(options.parse([*given, "--max-uses", "3", "--ratio", "none"]))
    assert rules == Rules(max_uses=3, ratio=None)
