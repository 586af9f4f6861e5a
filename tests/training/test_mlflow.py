"""MLflow gets the numbers of a run, its configuration and its montages, in a real store of files."""

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from megatron_llave.config.schema import LogConfig
from megatron_llave.errors import ConfigError
from megatron_llave.training import trackers as module
from megatron_llave.training.logger import RunLog
from megatron_llave.training.trackers import open_trackers

mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def uri(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return (tmp_path / "store").as_uri()


def train(uri: str, output: Path, first: int, last: int, config: dict, evaluated: tuple[int, ...] = ()) -> None:
    """Log the steps from `first` to `last`, and evaluate after some."""
    output.mkdir(exist_ok=True)
    cfg = LogConfig(mlflow_experiment="llave", mlflow_uri=uri)
    trackers = open_trackers(cfg, output, first, config)
    log = RunLog(output, 0, 9, True, trackers)
    for step in range(first, last + 1):
        values = {"loss": step / 4, "subset": "i2t", "seconds": 2.0, "pairs": 4, "skipped": 0}
        log.step({"step": step, **values, "positive_histogram": [1, 2], **({"mfu": 0.5} if step == 2 else {})})
        if step in evaluated:
            trackers[0].image(step, "evaluation/montage", Image.new("RGB", (3, 2)))
            log.evaluation(step, {"a set: 1": 10.0 * step}, seconds=1.0, candidates={})
    log.close()


def test_a_resumed_run_is_the_same_run_and_repeats_no_step(tmp_path, uri, caplog):
    caplog.set_level("INFO", "megatron_llave")
    output = tmp_path / "birds"
    config = {
        "train": {"steps": 9},
        "data": {"path": "https://me:SECRET@host/x", "subsets": {}},
        "loss": {"alpha": 9.0},
    }
    train(uri, output, 1, 4, config, evaluated=(2, 4))
    train(uri, output, 3, 6, config | {"loss": {"alpha": 1.0}}, evaluated=(4, 6))
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("llave")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "birds" and run.info.status == "FINISHED"
    assert (output / "mlflow_run_id").read_text() == f"{run.info.run_id}\n"
    expected = {"train.steps": "9", "data.path": "https://host/x", "data.subsets": "{}", "loss.alpha": "9.0"}
    assert run.data.params == expected
    assert run.data.tags["loss.alpha from step 3"] == "1.0"
    for key in ("loss/all", "loss/i2t", "performance/pairs_per_second"):
        history = client.get_metric_history(run.info.run_id, key)
        assert [one.step for one in history] == [1, 2, 3, 4, 5, 6]
    assert [one.value for one in client.get_metric_history(run.info.run_id, "loss/all")] == [n / 4 for n in range(1, 7)]
    assert [one.step for one in client.get_metric_history(run.info.run_id, "performance/mfu")] == [2]
    scores = client.get_metric_history(run.info.run_id, "precision_at_1/a set_ 1")
    assert [(one.step, one.value) for one in scores] == [(2, 20.0), (4, 40.0), (6, 60.0)]
    images = [one.path for one in client.list_artifacts(run.info.run_id, "images") if one.path.endswith(".png")]
    assert sorted(re.search(r"montage.step.(\d+).", name)[1] for name in images) == ["2", "4", "6"]
    stored = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert b"SECRET" not in stored and b"host/x" in stored
    assert [one.getMessage() for one in caplog.records] == [
        "MLflow has the steps 3 to 4 already and keeps them as they are"
    ]


def test_a_run_that_is_gone_and_a_store_that_refuses_are_one_line(tmp_path, uri, caplog):
    train(uri, tmp_path / "birds", 1, 2, {})
    (tmp_path / "birds" / "mlflow_run_id").write_text("0123456789abcdef0123456789abcdef\n")
    train(uri, tmp_path / "birds", 3, 4, {})
    [warning] = [one.getMessage() for one in caplog.records]
    assert warning.startswith(
        "log.mlflow_experiment: MlflowException: Run '0123456789abcdef0123456789abcdef' not found"
    )
    assert warning.endswith("; the run continues without what cannot be recorded") and "\n" not in warning


class Slow(BaseHTTPRequestHandler):
    """A server that answers the first requests and then nothing for a while."""

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        if "log-batch" in self.path:
            self.server.is_asked.set()
            self.server.is_over.wait(10)
        body = (
            b'{"experiment": {"experiment_id": "1"}, "run": {"info": {"run_id": "abc", "run_uuid": "abc"}, "data": {}}}'
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_: object) -> None:
        pass


def test_no_step_waits_for_a_server_and_the_end_not_for_ever(tmp_path, uri, caplog, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_TO_SEND", 0.2)
    server = HTTPServer(("127.0.0.1", 0), Slow)
    server.is_over, server.is_asked = threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        [tracker] = open_trackers(LogConfig(mlflow_experiment="x", mlflow_uri=address), tmp_path, 1, {})
        started = time.perf_counter()
        for step in range(1, 51):
            tracker.step(step, {"loss/all": 1.0}, {})
        assert server.is_asked.wait(10)
        tracker.close()
        assert time.perf_counter() - started < 5
    finally:
        server.is_over.set()
        server.shutdown()
    [warning] = [one.getMessage() for one in caplog.records]
    assert "DataError: the server has not taken everything within 0.2 s" in warning


def test_no_server_costs_its_numbers_alone(tmp_path, uri, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    train("http://me:SECRET@127.0.0.1:9", tmp_path / "birds", 1, 2, {})
    [warning] = [one.getMessage() for one in caplog.records]
    assert "MlflowException" in warning and "SECRET" not in warning


def test_an_address_without_an_experiment_is_refused():
    with pytest.raises(ConfigError, match="log.mlflow_uri is used by nothing without log.mlflow_experiment"):
        LogConfig(mlflow_uri="http://host")
