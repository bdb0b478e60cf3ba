"""Does a built site ask another host for anything? `python offline.py FOLDER` fails if it does."""

import re
import sys
from pathlib import Path

# Links that a reader follows are fine; what a browser loads on its own must come with the site.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["']((?:https?:)?//[^"']+)"""
    r"""|<link\b(?=[^>]*\brel=["'](?:stylesheet|icon|preload|preconnect)[^>]*)[^>]*\bhref=["']((?:https?:)?//[^"']+)"""
    r"""|url\(["']?((?:https?:)?//[^"')]+)|@import\s+["']((?:https?:)?//[^"']+)""",
    re.IGNORECASE,
)


def loaded_from_elsewhere(folder: Path) -> list[str]:
    """`file: address` of everything that a page or a style sheet would fetch from another host."""
    files = [path for path in folder.rglob("*") if path.suffix in (".html", ".css")]
    return [
        f"{path.relative_to(folder)}: {next(filter(None, match.groups()))}"
        for path in sorted(files)
        for match in _LOADED.finditer(path.read_text(errors="replace"))
    ]


if __name__ == "__main__":
    found = loaded_from_elsewhere(Path(sys.argv[1]))
    sys.exit("The site must not load from other hosts, but:\n" + "\n".join(found) if found else 0)
