"""The schema of a run: sections (`sections`), the whole with what holds between them (`schema`), YAML (`files`).

Names follow TRL and axolotl where they have one. Reading a config imports neither torch nor transformers.
"""

from hosl.config.files import dump_config, load_config, parse_config, read_yaml
from hosl.config.schema import WITHOUT_DIRECTIONS, Config, Method
from hosl.config.sections import ClientConfig, ClientsConfig, ModelConfig, ServerConfig, WireConfig, ZOConfig

__all__ = [
    "WITHOUT_DIRECTIONS",
    "ClientConfig",
    "ClientsConfig",
    "Config",
    "Method",
    "ModelConfig",
    "ServerConfig",
    "WireConfig",
    "ZOConfig",
    "dump_config",
    "load_config",
    "parse_config",
    "read_yaml",
]
