"""What of a configuration is shown to others: no word of a command, and nothing of a URL but its host and path."""

import pytest

from megatron_llave.config.redact import config_without_paths, config_without_secrets, own_name, without_secrets


@pytest.mark.parametrize(
    ("given", "shown", "name"),
    [
        ("pipe:/x/get.sh --token=SECRET123 {file}", "a command", "a command"),
        ("pipe:fetch --password hunter2 {file}", "a command", "a command"),
        ("pipe:curl -s https://h/get?token=SECRET&f={file}", "a command", "a command"),
        ("pipe:", "a command", "a command"),
        ("https://me:word@host/data/pairs", "https://host/data/pairs", "pairs"),
        ("https://host/get/?token=SECRET&f=/x#SECRET", "https://host/get/", "get"),
        ("https://host/get;key=SECRET", "https://host/get", "get"),
        ("https://me:w/o?rd@host:80/pairs", "https://...", "..."),
        ("HTTPS://me:wo/rd@host", "HTTPS://host", "host"),
        ("s3://key:secret@bucket/a,https://me:word@host/b", "s3://bucket/a,https://host/b", "b"),
        ("data.path=https://me:a b@host/pairs", "data.path=https://host/pairs", "pairs"),
        ("data={path: 'pipe:get SECRET {file}', cache: x}", "data={path: 'a command", "a command"),
        ("runs/start", "runs/start", "start"),
        ("/data/pipes: all/of a", "/data/pipes: all/of a", "of a"),
    ],
)
def test_secrets_are_left_out(given: str, shown: str, name: str) -> None:
    assert without_secrets(given) == shown and own_name(given) == name


def test_every_text_of_a_configuration_is_looked_at() -> None:
    config = {
        "data": {"path": "pipe:get SECRET {file}", "subsets": {"a/b": {"weight": 1.5}}},
        "evaluate": {"sets": ["images/of a", "/data/own", "https://me:SECRET@host/x/own2"]},
        "loss": {"stored_embeddings": "vectors/one.npy", "alpha": 9.0, "soft_labels": None},
        "log": {"wandb_project": "team/llave", "note": "see https://me:SECRET@host/x"},
    }
    of_texts = {"data": {"path": "a command", "subsets": {"a/b": {"weight": 1.5}}}}
    assert config_without_secrets(config) == config | of_texts | {
        "evaluate": {"sets": ["images/of a", "/data/own", "https://host/x/own2"]},
        "log": {"wandb_project": "team/llave", "note": "see https://host/x"},
    }
    assert config_without_paths(config) == of_texts | {
        "evaluate": {"sets": ["images/of a", "own", "own2"]},
        "loss": {"stored_embeddings": "one.npy", "alpha": 9.0, "soft_labels": None},
        "log": {"wandb_project": "team/llave", "note": "see https://host/x"},
    }
    for key in ("path", "negatives", "order", "tokenizer"):
        assert config_without_paths({"data": {key: "shared/own"}}) == {"data": {key: "own"}}
