"""The argument RUN of the commands that take a run's folder: the folder, or the config that its runs were made from."""

import sys
from pathlib import Path

from hosl.config import load_config
from hosl.errors import FolderError
from hosl.system.run_folder import same_name_folders

RUN_HELP = "a run's folder, or its CONFIG.yaml: the newest run of that output_dir"

BEST_HELP = "the weights of the best evaluation on dev, of a run with save_best: true"


def named_run(word: str) -> Path:
    """The run's folder that `word` names; of a config, the newest run in its output_dir, which is said.

    Raises:
        ConfigError: if the config cannot be read.
        FolderError: if it has no run yet.
    """
    path = Path(word)
    if path.suffix not in (".yaml", ".yml") or path.is_dir():
        return path
    wanted = Path(load_config(path).output_dir)
    configs = [folder / "config.yaml" for folder in same_name_folders(wanted)]
    begun = [(file.stat().st_mtime_ns, number) for number, file in enumerate(configs) if file.is_file()]
    if not begun:
        raise FolderError(
            f"{word}: there is no run in its output_dir {wanted}; `hosl train {word}` makes one"
        )
    newest = configs[max(begun)[1]].parent
    sys.stderr.write(f"hosl: the newest run of {word} is {newest}\n")
    return newest
