"""Files of a folder that came from elsewhere: a link in it is not followed to other places of this machine."""

from pathlib import Path

from hosl.errors import FolderError


def own_file(folder: Path, name: str) -> Path:
    """The path of `name` in a model's folder, there or not.

    A link may lead within the folder, and from a snapshot of the hub's cache to the same model's blobs.

    Raises:
        FolderError: if it is a link that leads out of the folder.
    """
    target, home = (folder / name).resolve(), folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(place) for place in allowed):
        raise FolderError(
            f"{folder / name} is a link to {target}, out of the model's folder, and is not followed; put the "
            "file itself there if it is meant"
        )
    return folder / name
