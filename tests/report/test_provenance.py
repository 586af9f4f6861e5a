"""What a report says of its evaluation: no secret of the command line or of the configuration."""

import sys
from pathlib import Path
from types import SimpleNamespace

from megatron_llave.checkpoint import folders
from megatron_llave.config.load import config_from_dict, save_config
from megatron_llave.files import write_json
from megatron_llave.report.provenance import describe_evaluation


def test_secrets_are_left_out(groups, tmp_path: Path, monkeypatch) -> None:
    start = "https://me:SECRET@host/start"
    cfg = config_from_dict({"model": {"preset": "tiny"}, "train": {"steps": 8}, "checkpoint": {"init": start}})
    save_config(cfg, tmp_path / folders.CONFIG)
    write_json(tmp_path / folders.BACKEND, {"sharded_backend": "torch_dist"})
    folders.write_manifest(tmp_path, 6, {"tensor": 1})
    arguments = ["evaluate.py", "prepared", "--data", "sets", "data.path=pipe:get SECRET {file}", "train.seed=1"]
    monkeypatch.setattr(sys, "argv", arguments)
    model = SimpleNamespace(cfg=cfg, source=SimpleNamespace(folder=tmp_path, is_hf=False), average=False)
    about = describe_evaluation(model, [], "https://me:SECRET@host/sets?key=SECRET")
    assert about["command"] == "evaluate.py prepared --data sets 'data.path=a command' train.seed=1"
    assert about["data"] == "https://host/sets" and about["step"] == 6
    assert "started from https://host/start" in about["training"] and "SECRET" not in str(about)
