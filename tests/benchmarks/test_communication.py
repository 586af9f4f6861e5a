"""benchmarks/communication: the limits of the model, what the ranks measure, and that nothing is measured twice."""

import csv
import itertools
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.communication import __main__ as command
from benchmarks.communication import ranks, study
from benchmarks.communication.model import (
    CLUSTERS,
    H100_NODES,
    MODELS,
    PAIRS_PER_GPU,
    ROUNDS,
    Channel,
    Collective,
    cluster_seconds,
    cluster_steps,
    fit_channels,
    local_seconds,
    loss_collectives,
    one_ring_seconds,
    oversubscription,
    received_bytes,
    reduction_collectives,
    ring_seconds,
)
from benchmarks.communication.study import plan_launches, run_communication, run_ranks
from megatron_llave.config.load import load_config
from megatron_llave.errors import ConfigError, UserError
from megatron_llave.planning.plan import gather_bytes

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny.yaml"
PAIRS = 4
WIDTH = 128
CHANNEL = Channel(latency=2e-6, bandwidth=1e9)


@pytest.mark.parametrize("ranks", [1, 2, 8, 1024])
def test_bytes_are_those_of_the_plan(ranks: int) -> None:
    cfg = load_config(TINY)
    found = received_bytes(loss_collectives(PAIRS, WIDTH, ranks), ranks)
    assert found == gather_bytes(cfg, PAIRS, ranks) == (ranks - 1) * (8 * PAIRS * WIDTH + 20 * PAIRS + 24)


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_ring_takes_its_hops_and_bytes(kind: str) -> None:
    one = Collective(kind, 4000)
    assert ring_seconds(one, 1, CHANNEL) == 0 == one.received(1)
    assert ring_seconds(one, 4, CHANNEL) == pytest.approx(ROUNDS[kind] * 3 * (2e-6 + 1000 / 1e9))
    assert ring_seconds(Collective(kind, 8000), 4, CHANNEL) > ring_seconds(one, 4, CHANNEL)
    assert ring_seconds(one, 4, CHANNEL, slowdown=2) == 2 * ring_seconds(one, 4, CHANNEL)


def test_ranks_that_share_cores_take_turns() -> None:
    assert [oversubscription(ranks, 2) for ranks in (1, 2, 4, 8)] == [1, 1, 2, 4]


@pytest.mark.parametrize("kind", ROUNDS)
def test_clusters_of_one_node_are_flat_and_more_nodes_are_slower(kind: str) -> None:
    one = Collective(kind, 2**24)
    for size in (1, 2, 8):
        flat = ring_seconds(one, size, H100_NODES.inside)
        assert cluster_seconds(one, size, H100_NODES) == pytest.approx(flat)
        assert one_ring_seconds(one, size, H100_NODES) == pytest.approx(flat)
    for seconds in (cluster_seconds, one_ring_seconds):
        growing = [seconds(one, ranks, H100_NODES) for ranks in (1, *CLUSTERS)]
        assert growing[0] == 0 and growing == sorted(growing)
        # No ring is faster than its adapters, each of which an eighth of the bytes of the other nodes goes through.
        assert growing[-1] > ROUNDS[kind] * one.whole / 8 * 127 / 128 / H100_NODES.between.bandwidth
    with pytest.raises(ValueError, match="12 GPUs are not a multiple"):
        cluster_seconds(one, 12, H100_NODES)


def test_every_cluster_is_modelled() -> None:
    steps = {(one.model, one.gpus, one.pairs): one for one in cluster_steps()}
    assert len(steps) == len(MODELS) * len(CLUSTERS) * len(PAIRS_PER_GPU)
    one = steps["7b", 8, 4]
    assert one.gather_bytes == pytest.approx(7 * 2 * 4 * 4 * 3584, rel=0.01)  # targets of 7 ranks, and their gradients
    trained = received_bytes(reduction_collectives(7_086_000_000, 8), 8)
    assert one.reduction_bytes == pytest.approx(trained, rel=0.01)
    assert one.compute_seconds == pytest.approx(steps["7b", 8, 32].compute_seconds / 8, rel=0.01)
    assert all(0 < share < 1 for one in steps.values() for share in (one.share, one.one_ring_share))
    shares = [steps["0.5b", gpus, 4].share for gpus in CLUSTERS]
    assert shares == sorted(shares) and shares[0] > steps["7b", 8, 4].share
    faster = cluster_steps(utilisation=0.8)[0]
    assert faster.compute_seconds == pytest.approx(cluster_steps()[0].compute_seconds / 2)


@pytest.mark.parametrize(("ranks", "slowdown"), [(2, 1.0), (8, 4.0)])
def test_a_made_up_fit_gives_its_links_back(ranks: int, slowdown: float) -> None:
    true = {kind: Channel(1e-4 * (1 + place), 1e9 / (1 + place)) for place, kind in enumerate(ROUNDS)}
    sizes = [Collective(kind, whole) for kind in ROUNDS for whole in (400, 60_000, 800_000)]
    samples = [(one, ring_seconds(one, ranks, true[one.kind], slowdown)) for one in sizes]
    found = fit_channels(samples, ranks, slowdown)
    for kind, channel in true.items():
        assert found[kind].latency == pytest.approx(channel.latency)
        assert found[kind].bandwidth == pytest.approx(channel.bandwidth)
    one = loss_collectives(32, WIDTH, 4)
    assert local_seconds(one, 4, found, 2.0) == pytest.approx(local_seconds(one, 4, true, 2.0))
    assert local_seconds([], 1, {}, 1.0) == 0


def test_sizes_that_make_no_difference_have_latency_alone() -> None:
    noise = np.random.default_rng(0).uniform(0.98, 1.02, 4)
    samples = [(Collective("all_gather", 10 * 2**n), 1e-3 * one / (1 + n / 10)) for n, one in enumerate(noise)]
    found = fit_channels(samples, 2, 1.0)["all_gather"]
    assert found.bandwidth == float("inf") and 0.7e-3 < found.latency < 1e-3


def run(out: Path, data: Path, processes: list[int], steps: int = 1, **settings: object) -> list[str]:
    """What it reports."""
    lines: list[str] = []
    settings = {"pairs": PAIRS, "checkpoint": None} | settings
    config = out.with_suffix(".yaml")  # with two subsets, of which each costs a batch
    text = TINY.read_text()
    mixture = text[text.index("  subsets:") : text.index("\nloss:")]
    config.write_text(text.replace(mixture, "  subsets: {name_to_image: {weight: 1}, composed: {weight: 1}}\n"))
    launches = plan_launches(config, [f"data.path={data}"], out, processes, steps=steps, **settings)
    run_communication(launches, out, lines.append)
    return lines


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_measures_once_and_reports(openmoji_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(tmp_path, openmoji_data, [2, 1])
    assert lines[:2] == ["1 processes: measuring", "2 processes: measuring"]
    single, double = (json.loads((tmp_path / f"processes-{n}.json").read_text()) for n in (1, 2))
    assert single["collectives"] == single["calibration"] == [] and single["received"] == 0 == single["waiting"]
    calls = loss_collectives(PAIRS, WIDTH, 2)
    assert [(kind, whole) for kind, whole, _ in double["collectives"]] == [(one.kind, one.whole) for one in calls]
    assert double["received"] == received_bytes(calls, 2)
    own_sizes = {(kind, whole) for kind, whole, _ in double["collectives"]}
    assert own_sizes.isdisjoint((kind, whole) for kind, whole, _ in double["calibration"])
    assert min(seconds for *_, seconds in double["collectives"] + double["calibration"]) > 0
    assert 1 <= single["effective_alone"] == single["effective"] <= PAIRS - 1
    assert double["effective_alone"] < double["effective"] <= 2 * PAIRS - 1
    assert 1 / (2 * PAIRS - 1) - 1e-6 < double["hardest_share"] <= 1  # the largest of as many shares

    with (tmp_path / "communication.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["part"] == "measured"]
    assert [row["processes"] for row in measured] == ["1", "2"]
    assert float(measured[0]["share"]) == float(measured[0]["modelled_share"]) == 0 and measured[0]["ratio"] == ""
    assert float(measured[1]["ratio"]) == pytest.approx(float(measured[1]["modelled"]) / float(measured[1]["moving"]))
    assert len(rows) - 2 == len(MODELS) * len(CLUSTERS) * len(PAIRS_PER_GPU)
    text = (tmp_path / "communication.md").read_text()
    assert "random weights" in text and "| 2 | 8 |" in text and "LLaVE-7b: GPUs" in text
    assert (tmp_path / "communication.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "communication.md").unlink()
    monkeypatch.setattr(study, "run_ranks", lambda launch: pytest.fail(f"measures {launch.processes} again"))
    assert run(tmp_path, openmoji_data, [1, 2])[:2] == ["1 processes: measured before", "2 processes: measured before"]
    assert (tmp_path / "communication.md").read_text() == text
    with pytest.raises(pytest.fail.Exception, match="measures 1 again"):
        run(tmp_path, openmoji_data, [1], steps=2)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_failing_rank_is_told_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 processes: .*nowhere"):
        run(tmp_path, tmp_path / "nowhere", [1])
    assert "nowhere" in (tmp_path / "processes-1.log").read_text()
    assert not (tmp_path / "communication.md").exists()


@pytest.mark.timeout(60)
def test_a_hanging_rank_ends_it(tmp_path: Path) -> None:
    [launch] = plan_launches(TINY, [], tmp_path, [1], PAIRS, 1, None)
    with pytest.raises(UserError, match=r"1 processes: no end after 0.2 s, see .*processes-1\.log"):
        run_ranks(launch, timeout=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 1}, "1 pairs per process"),
        ({"steps": 0}, "0 steps"),
        ({"processes": []}, "no numbers of processes"),
        ({"processes": [0, 2]}, "no numbers of processes"),
    ],
)
def test_impossible_numbers_are_refused(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "out", tmp_path, **{"processes": [1], **settings})
    assert not (tmp_path / "out").exists()


def test_ranks_are_data_parallel(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be 1"):
        plan_launches(TINY, ["parallel.tensor=2"], tmp_path, [2], PAIRS, 1, None)
    launches = plan_launches(TINY, ["loss.matryoshka_dims=[64]"], tmp_path, [4, 2, 4], PAIRS, 1, None)
    assert [launch.cfg.train.global_batch_size for launch in launches] == [2 * PAIRS, 4 * PAIRS]
    assert all(subset.start_step == 0 for launch in launches for subset in launch.cfg.data.subsets.values())
    assert launches[0].cfg.optimizer.learning_rate == 0 and launches[0].cfg.loss.matryoshka_dims == []


@pytest.mark.parametrize(("steps", "each"), [(1, 1), (3, 1), (8, 3)])
def test_numbers_of_processes_are_compared_on_the_same_kinds_of_pairs(monkeypatch, steps: int, each: int) -> None:
    drawn = itertools.cycle(["b", "a", "a", "c", "a", "b"])
    monkeypatch.setattr(ranks, "unpack_step", lambda step: SimpleNamespace(batches=[step]))
    stream = (SimpleNamespace(subset=name) for name in drawn)
    taken = [batch.subset for batch in ranks.take_evenly(stream, ["a", "b", "c"], steps)]
    assert taken[0] == "b" and sorted(taken[1:]) == sorted("abc" * each)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--arm", "alpha 1"], "unrecognized arguments: --arm"),
        (["--processes", "0"], "error: --processes 0 must be at least 1\n"),
        (["--out", ""], "error: --out '' is no name for a folder of results\n"),
        (
            ["--out", "/proc/nope/x"],
            "error: --out /proc/nope/x: /proc/nope cannot be written: No such file or directory\n",
        ),
        (["parallel.tensor=2"], "error: parallel.tensor, pipeline and context must be 1, as in tiny.yaml\n"),
    ],
)
def test_mistakes_are_named(given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            command.main(["--config", str(TINY), "--out", str(tmp_path / "out"), *given])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
