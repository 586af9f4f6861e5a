"""What a card says of a run: its loss, whether the weights are merged, and no more of a path than its own name."""

from pathlib import Path

import pytest

from megatron_llave.checkpoint import folders
from megatron_llave.config.load import config_from_dict, save_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.convert.training_record import last_evaluation, shared_config, training_record
from megatron_llave.files import write_json

RUN = {"model": {"preset": "tiny"}, "train": {"steps": 8, "global_batch_size": 4}}


def saved(folder: Path, layout: dict[str, int] | None, **sections: dict) -> tuple[Path, RunConfig]:
    """A checkpoint without tensors, and its configuration."""
    cfg = config_from_dict(RUN | sections)
    folder.mkdir(exist_ok=True)
    save_config(cfg, folder / folders.CONFIG)
    write_json(folder / folders.BACKEND, {"sharded_backend": "torch_dist"})
    folders.write_manifest(folder, 6 if layout else 0, layout)
    return folder, cfg


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"loss": {"negatives": "own", "alpha": 9}, "data": {"hard_negatives": 2}},
            ["| loss | hardness-weighted contrastive, temperature 0.02, alpha 9 ", "negatives own, 2 hard ones"],
        ),
        (
            {"loss": {"temperature_learning": "subset"}},
            ["temperature learned from 0.02 on (one for each subset), alpha"],
        ),
        (
            {"loss": {"objective": "cosent", "temperature": 0.05}},
            ["| loss | CoSENT, temperature 0.05, negatives global_batch |"],
        ),
        (
            {
                "loss": {"soft_labels": "scores", "soft_label_temperature": 0.2, "contrastive_weight": 0.5},
                "data": {"hard_negatives": 1, "subsets": {"pairs": {"objective": "cosent"}, "other": {}}},
            },
            [
                "| loss | 0.5 x hardness-weighted contrastive, ",
                "; plus 1 x cross_entropy against soft labels (scores, temperature 0.2) |",
                "| loss of pairs | CoSENT, temperature 0.02, negatives global_batch |",
            ],
        ),
    ],
)
def test_the_loss_is_the_one_of_the_run(tmp_path: Path, sections: dict, said: list[str]) -> None:
    checkpoint = saved(tmp_path, {"tensor": 2}, **sections)
    record, config = training_record(*checkpoint), shared_config(*checkpoint)
    trained = "Trained by megatron_llave; the configuration:"
    assert record.startswith(f"\n## Training\n\n{trained}\n\n```yaml\n{config}```\n\n## Recipe\n")
    assert not config.startswith("#") and "not trained" not in record and "Merged" not in record
    assert all(text in record for text in said), record
    assert "| steps | 6 of 8, 4 pairs each |" in record and "tensor 2" in record
    assert record.count("| loss of ") == ("subsets" in sections.get("data", {}))


def test_merged_and_imported_weights_claim_no_training_of_their_own(tmp_path: Path) -> None:
    merged = saved(tmp_path / "merged", None)
    first = "Merged from several checkpoints; what follows is the configuration of the first"
    record, config = training_record(*merged), shared_config(*merged)
    assert "\nMerged: the weights are the weighted mean of those of several checkpoints.\n" in record
    assert f"| weights | {first} |" in record and "| steps |" not in record and config.startswith(f"# {first}.\n")
    imported = saved(tmp_path / "imported", None, train={"steps": 0})
    converted = "Converted, not trained: the weights are those the conversion started from."
    assert training_record(*imported) == f"\n## Training\n\n{converted}\n" and shared_config(*imported) is None


def test_paths_are_shortened_and_other_values_are_not(tmp_path: Path) -> None:
    sections = {
        "data": {"path": "pipe:curl -H 'Key: 12' https://me:word@host/{file} -", "subsets": {"a/b": {}}},
        "checkpoint": {"init": "team/runs/start"},
        "log": {"wandb_project": "team/llave"},
        "evaluate": {"path": "pipe:aws s3 cp s3://company/sets/{file} -", "sets": ["images/of a", "/data/own"]},
    }
    write_json(tmp_path / folders.POSITION, {"subsets": {"a/b": {"pairs": 30}}})
    folder, cfg = saved(tmp_path, {"tensor": 1}, **sections)
    config = shared_config(folder, cfg)
    assert "path: a command\n" in config and "init: start\n" in config
    assert "wandb_project: team/llave\n" in config and "  a/b:\n" in config
    assert config.count("path: a command\n") == 2 and "- images/of a\n" in config and "- own\n" in config
    record = training_record(folder, cfg)
    assert "| started from | start |" in record and "\nShards that a command fetches:\n" in record
    assert not any(secret in record for secret in ("word", "Key", "curl", "company"))
    assert last_evaluation(Path("/checkpoint"), 1) is None
