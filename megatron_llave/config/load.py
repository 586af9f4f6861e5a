"""Read a RunConfig from YAML plus `section.key=value` overrides, and write it back.

An unknown key, a value of the wrong type or an impossible combination is a ConfigError that names the key.
`save_config` writes the merged configuration beside the checkpoint, so that a checkpoint records how it was made.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_llave.config.checks import require_effects, validate
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.packaged import find_config
from megatron_llave.config.parse import TypedReader, read_overrides, read_yaml
from megatron_llave.config.presets import PRESETS
from megatron_llave.config.schema import EARLIER, RunConfig
from megatron_llave.errors import ConfigError, one_of, require


def load_config(path: str | Path, overrides: Sequence[str] = (), leave_out: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides, fill in the model preset, and check the result.

    Args:
        path: the YAML file, or the name of an example that comes with the package.
        overrides: they take precedence over the file.
        leave_out: given for the configuration of a checkpoint: its sections that are ignored, such as the parallel
            layout. Keys that an earlier version did not save then have the value that it worked with (schema.EARLIER),
            and settings without effect are not refused.

    Raises:
        ConfigError: the file is missing or is not a mapping, a key is unknown, or a value has the wrong type or is
            impossible.
    """
    path = find_config(path)
    from_file = TypedReader(str(path)).read(RunConfig, read_yaml(path))
    from_file = {name: section for name, section in from_file.items() if name not in leave_out}
    if leave_out:
        from_file = OmegaConf.to_container(OmegaConf.merge(EARLIER, from_file))
    cfg = config_from_dict(_merge(from_file, overrides))
    if not leave_out:
        require_effects(cfg)
    return cfg


def override_config(cfg: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Apply `section.key=value` overrides to `cfg`, and check the result again.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is impossible.
    """
    if not overrides:
        validate(cfg)
        return cfg
    return config_from_dict(_merge(asdict(cfg), overrides))


def _merge(given: dict, overrides: Sequence[str]) -> DictConfig:
    """The given values with the overrides, which first empty the mappings that they set to null or {}."""
    from_command_line, emptied = read_overrides(overrides)
    for key in emptied:
        *sections, name = key.split(".")
        section = given
        for part in sections:
            section = section.get(part, {})
        section.pop(name, None)
    return OmegaConf.merge(given, TypedReader("the command line").read(RunConfig, from_command_line))


def config_from_dict(given: dict | DictConfig) -> RunConfig:
    """Merge the defaults, the preset and the given values, in this order; the result is typed and checked.

    Unknown keys are not looked for here: `TypedReader` does that.

    Raises:
        ConfigError: a value has the wrong type or is impossible.
    """
    given = OmegaConf.create(given)
    preset = OmegaConf.select(given, "model.preset")
    if preset is not None:
        one_of("model.preset", str(preset), tuple(PRESETS))
        given = OmegaConf.merge({"model": PRESETS[str(preset)]}, given)
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(_defaults(), given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_key_of(error, given)}: {str(error).splitlines()[0]}") from error
    of_preset = PRESETS.get(str(preset), {}).get("family", ModelConfig.family)
    ok = preset is None or cfg.model.family == of_preset
    require(ok, f"model.preset={preset} is of model.family={of_preset}, not {cfg.model.family}")
    alone = [key for key in given.get("lora") or {} if "rank" not in given.lora]
    require(
        not alone, f"lora.{''.join(alone[:1])} has no effect without lora.rank; set that too, or to 0 for no adapters"
    )
    validate(cfg)
    return cfg


@cache
def _defaults() -> DictConfig:
    """The defaults with their types, which take long to make; a merge copies them."""
    return OmegaConf.structured(RunConfig)


def _key_of(error: OmegaConfBaseException, given: DictConfig) -> str:
    """The key at fault. Within a nested list omegaconf names only the index, so the keys are tried one after the
    other."""
    if "." in str(error.full_key):
        return str(error.full_key)
    for section, values in given.items():
        for key, value in values.items():
            try:
                OmegaConf.merge(_defaults(), {section: {key: value}})
            except OmegaConfBaseException:
                return f"{section}.{key}"
    return "configuration"


def save_config(cfg: RunConfig, path: str | Path) -> None:
    """Write the merged configuration as YAML; `load_config` reads it back to an equal RunConfig."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
