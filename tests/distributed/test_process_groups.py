"""Layouts that cannot work are refused with the numbers; the groups that do work are tested under tests/distributed."""

from dataclasses import replace

import pytest

from megatron_llave.config.load import config_from_dict
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig, RunConfig, TrainConfig
from megatron_llave.distributed.layout import validate_batch, validate_layout
from megatron_llave.errors import ConfigError


def tiny() -> ModelConfig:
    return config_from_dict({"model": {"preset": "tiny"}, "train": {"steps": 1}}).model


@pytest.mark.parametrize(
    ("layout", "world", "named"),
    [
        (dict(tensor=2, pipeline=2), 6, ["6 processes", "parallel.tensor=2", "parallel.pipeline=2", "multiple of 4"]),
        (dict(tensor=3), 3, ["model.vision.num_heads=4", "parallel.tensor=3"]),
        (dict(tensor=4), 4, ["model.language.num_kv_heads=2", "parallel.tensor=4"]),
        (dict(pipeline=4), 4, ["model.language.num_layers=2", "4 pipeline stages"]),
        (dict(pipeline=2, first_stage_layers=2), 2, ["parallel.first_stage_layers=2", "1 to 1"]),
        (dict(first_stage_layers=1), 1, ["parallel.first_stage_layers=1", "parallel.pipeline of at least 2"]),
        (dict(virtual_pipeline=2), 1, ["parallel.virtual_pipeline=2", "parallel.pipeline of at least 2"]),
        (dict(pipeline=2, virtual_pipeline=2), 2, ["model.language.num_layers=2", "2 chunks"]),
        (dict(sequence=True), 1, ["parallel.sequence=true", "parallel.tensor of at least 2"]),
        (dict(context=2), 3, ["3 processes", "parallel.context=2", "multiple of 2"]),
    ],
)
def test_impossible_layout_is_named(layout: dict, world: int, named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        validate_layout(tiny(), ParallelConfig(**layout), world)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in named), message


def test_transformer_engine_shares_attention_in_bf16_alone() -> None:
    model, layout = replace(tiny(), kernels="transformer_engine"), ParallelConfig(context=2)
    with pytest.raises(ConfigError, match="parallel.context=2: .*model.precision=fp32; use bf16, or model.kernels=loc"):
        validate_layout(model, layout, 2)
    assert validate_layout(replace(model, precision="bf16"), layout, 2) == 1


def test_possible_layouts_leave_the_rest_to_data_parallel() -> None:
    assert validate_layout(tiny(), ParallelConfig(tensor=2, pipeline=2, sequence=True), 8) == 2
    assert validate_layout(tiny(), ParallelConfig(tensor=2, context=2), 8) == 2
    assert validate_layout(tiny(), ParallelConfig(), 3) == 3


@pytest.mark.parametrize(
    ("batch", "layout", "data_parallel", "named"),
    [
        ((64, None), {}, 3, ["train.global_batch_size=64", "3 data-parallel ranks"]),
        ((64, 24), {}, 2, ["train.global_batch_size=64", "train.micro_batch_size=24", "2 data-parallel ranks"]),
        ((2, None), {}, 4, ["train.global_batch_size=2", "4 data-parallel ranks"]),
        ((6, 2), dict(pipeline=2, virtual_pipeline=2), 1, ["parallel.virtual_pipeline=2", "gives 3"]),
    ],
)
def test_impossible_batch_is_named(batch: tuple, layout: dict, data_parallel: int, named: list[str]) -> None:
    train = TrainConfig(global_batch_size=batch[0], micro_batch_size=batch[1])
    with pytest.raises(ConfigError) as error:
        validate_batch(RunConfig(parallel=ParallelConfig(**layout), train=train), data_parallel)
    assert all(part in str(error.value) for part in named), str(error.value)
