"""Files of a folder that came from elsewhere: a link in it is not followed to other places of this machine."""

from pathlib import Path

from hosl.errors import FolderError


def is_own(folder: Path, path: Path) -> bool:
    """Whether what `path` leads to belongs to the model in `folder`: it, or the hub's blobs of the same model."""
    target, home = path.resolve(), folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return any(target.is_relative_to(place) for place in allowed)


def own_file(folder: Path, name: str) -> Path:
    """The path of `name` in a model's folder, there or not.

    A link may lead within the folder, and from a snapshot of the hub's cache to the same model's blobs.

    Raises:
        FolderError: if it is a link that leads out of the folder.
    """
    path = folder / name
    if not is_own(folder, path):
        raise FolderError(
            f"{path} is a link to {path.resolve()}, out of the model's folder, and is not followed; put the file "
            "itself there if it is meant"
        )
    return path
