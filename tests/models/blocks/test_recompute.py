"""Activations computed again in the backward: the same gradients, bit by bit."""

import pytest
import torch
from reference import pack_pair_batch, random_pairs

from megatron_llave.config.load import config_from_dict
from megatron_llave.models import build_model
from megatron_llave.train import train_step
from megatron_llave.training.optimizer import build_trainable


def gradients(groups, recompute: str) -> dict[str, torch.Tensor]:
    given = {"model": {"preset": "tiny", "recompute": recompute}, "train": {"steps": 1}}
    cfg = config_from_dict(given)
    chunks = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed=0)
    trainable = build_trainable(cfg, chunks, groups)
    batches = [pack_pair_batch(pairs, cfg.model, 1) for pairs in (random_pairs(cfg.model, 8)[i::2] for i in (0, 1))]
    train_step(trainable, batches, cfg.loss, 0, groups)
    return {name: value.main_grad.clone() for name, value in trainable.chunks[0].named_parameters()}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_gradients_are_those_without(groups, recompute: str) -> None:
    expected = gradients(groups, "none")
    assert max(value.abs().max() for value in expected.values()) > 0
    for name, value in gradients(groups, recompute).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_less_is_kept(groups) -> None:
    kept = {}
    for recompute in ("none", "selective", "full"):
        cfg = config_from_dict({"model": {"preset": "tiny", "recompute": recompute}})
        (model,) = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed=0)
        storages = {}  # held, so that no address is used twice

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(pack_pair_batch(random_pairs(cfg.model, 4), cfg.model, 1).sequences)
        kept[recompute] = sum(storage.nbytes() for storage in storages.values())
    assert kept["full"] < 0.8 * kept["selective"] < 0.64 * kept["none"], kept
