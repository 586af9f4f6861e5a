"""Read a RunConfig from YAML plus `section.key=value` overrides, and write it back.

An unknown key, a value of the wrong type or an impossible combination is a ConfigError that names the key.
`save_config` writes the merged configuration beside the checkpoint, so that a checkpoint records how it was made.
"""

import difflib
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_llave.config.checks import validate
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.presets import PRESETS
from megatron_llave.config.schema import EARLIER, RunConfig
from megatron_llave.errors import ConfigError, one_of, require


def load_config(path: str | Path, overrides: Sequence[str] = (), leave_out: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides, fill in the model preset, and check the result.

    Args:
        path: the YAML file.
        overrides: they take precedence over the file.
        leave_out: given for the configuration of a checkpoint: its sections that are ignored, such as the parallel
            layout. Keys that an earlier version did not save then have the value that it worked with (schema.EARLIER).

    Raises:
        ConfigError: the file is missing or is not a mapping, a key is unknown, or a value has the wrong type or is
            impossible.
    """
    path = Path(path)
    require(path.is_file(), f"configuration file {path} does not exist")
    try:
        from_file = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # yaml has many kinds of errors, which mean the same to the user
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    require(isinstance(from_file, dict), f"{path} must hold sections such as `model:` and `train:`")
    from_command_line = _read_overrides(overrides)
    _check_keys(RunConfig, from_file, str(path))
    _check_keys(RunConfig, from_command_line, "the command line")
    from_file = {name: section for name, section in from_file.items() if name not in leave_out}
    if leave_out:
        from_file = OmegaConf.merge(EARLIER, from_file)
    return config_from_dict(OmegaConf.merge(from_file, from_command_line))


def override_config(cfg: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Apply `section.key=value` overrides to `cfg`, and check the result again.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is impossible.
    """
    given = _read_overrides(overrides)
    _check_keys(RunConfig, given, "the command line")
    return config_from_dict(OmegaConf.merge(OmegaConf.structured(cfg), given))


def _read_overrides(overrides: Sequence[str]) -> dict:
    tree = OmegaConf.create({})
    for override_config in overrides:
        require(override_config.find("=") > 0, f"override {override_config!r} must look like section.key=value")
        try:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([override_config]))
        except Exception as error:  # yaml has many kinds of errors, which mean the same to the user
            raise ConfigError(f"override {override_config!r} has a value that is not valid YAML") from error
    return OmegaConf.to_container(tree)


def config_from_dict(given: dict | DictConfig) -> RunConfig:
    """Merge the defaults, the preset and the given values, in this order; the result is typed and checked.

    Unknown keys are not looked for here: `_check_keys` does that.

    Raises:
        ConfigError: a value has the wrong type or is impossible.
    """
    given = OmegaConf.create(given)
    preset = OmegaConf.select(given, "model.preset")
    if preset is not None:
        one_of("model.preset", str(preset), tuple(PRESETS))
        given = OmegaConf.merge({"model": PRESETS[str(preset)]}, given)
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_key_of(error, given)}: {str(error).splitlines()[0]}") from error
    of_preset = PRESETS.get(str(preset), {}).get("family", ModelConfig.family)
    ok = preset is None or cfg.model.family == of_preset
    require(ok, f"model.preset={preset} is of model.family={of_preset}, not {cfg.model.family}")
    validate(cfg)
    return cfg


def _key_of(error: OmegaConfBaseException, given: DictConfig) -> str:
    """The key at fault. Within a nested list omegaconf names only the index, so the keys are tried one after the
    other."""
    if "." in str(error.full_key):
        return str(error.full_key)
    for section, values in given.items():
        for key, value in values.items():
            try:
                OmegaConf.merge(OmegaConf.structured(RunConfig), {section: {key: value}})
            except OmegaConfBaseException:
                return f"{section}.{key}"
    return "configuration"


def _check_keys(section: Any, given: dict, source: str, prefix: str = "") -> None:
    """Refuse a key that the dataclass does not have, and name the closest one that it has."""
    hints = get_type_hints(section)
    for key, value in given.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(hints)}"
            raise ConfigError(f"unknown key {prefix}{key} in {source}; {hint}")
        inner = hints[key]
        if is_dataclass(inner):
            require(isinstance(value, dict), f"{prefix}{key} in {source} must be a section with keys, not {value!r}")
            _check_keys(inner, value, source, f"{prefix}{key}.")
        elif isinstance(value, dict) and get_args(inner) and is_dataclass(get_args(inner)[-1]):
            for name, item in value.items():
                what = f"{prefix}{key}.{name} in {source}"
                require(isinstance(item, dict), f"{what} must be a section ({{}} for its defaults)")
                _check_keys(get_args(inner)[-1], item, source, f"{prefix}{key}.{name}.")


def save_config(cfg: RunConfig, path: str | Path) -> None:
    """Write the merged configuration as YAML; `load_config` reads it back to an equal RunConfig."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
