"""The config of a run: its sections (`sections`), the whole with the checks across sections (`schema`), YAML (`files`).

Names follow TRL and axolotl where they have one. Reading a config imports neither torch nor transformers.
"""

from hosl.config.begun import flat, load_begun_config
from hosl.config.files import dump_config, load_config, parse_config, read_yaml, with_absolute_paths
from hosl.config.schema import Config
from hosl.config.sections import (
    ClientConfig,
    ClientsConfig,
    ModelConfig,
    ResidualConfig,
    ServerConfig,
    WireConfig,
    ZOConfig,
)

__all__ = [
    "ClientConfig",
    "ClientsConfig",
    "Config",
    "ModelConfig",
    "ResidualConfig",
    "ServerConfig",
    "WireConfig",
    "ZOConfig",
    "dump_config",
    "flat",
    "load_begun_config",
    "load_config",
    "parse_config",
    "read_yaml",
    "with_absolute_paths",
]
