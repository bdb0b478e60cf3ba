"""`hessjax init`: a commented problem to start from."""

from importlib import resources
from pathlib import Path
from typing import Literal

from hessjax._core import _files

Library = Literal["linen", "nnx", "equinox"]


def write_template(path: Path, library: Library, force: bool) -> None:
    """Write the problem for a library.

    Raises:
        FileExistsError: there is a file, and no `force`.
        ValueError: the name does not end in `.py`.
        OSError: it cannot be written.
    """
    if path.suffix != ".py":
        raise ValueError(f"`{path}` must end in `.py`: it will be imported.")
    if path.exists() and not force:
        raise ValueError(f"`{path}` is there already: `--force` replaces it, or give another name.")
    text = resources.files("hessjax.cli").joinpath("templates", f"{library}.py.txt").read_text("utf-8")
    text = text.replace("FILE.py", path.name)
    _files.write_whole(path, lambda file: file.write(text.encode()))
