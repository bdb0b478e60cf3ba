"""What a kill at any moment would leave: the folder copied before every call that changes a file system."""

import contextlib
import itertools
import json
import os
import pathlib
import random
import shutil
import threading

KILLS = int(os.environ.get("HESSJAX_KILLS", "20"))
"""How many moments are tried, spread at random over a run; `HESSJAX_KILLS=9999`: all."""

CALLS = ("open", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync")


class Moments:
    """Copies of a folder, one for each moment."""

    def __init__(self, folder, place):
        self.folder, self.place, self.copies = pathlib.Path(folder), pathlib.Path(place), []
        self._lock, self._copying = threading.RLock(), False

    @contextlib.contextmanager
    def watched(self):
        """Copy the folder before each of the calls that is made in the block, by whatever thread."""
        before = {name: getattr(os, name) for name in CALLS}
        for name, call in before.items():
            setattr(os, name, self._first_copying(call))
        try:
            yield self
        finally:
            for name, call in before.items():
                setattr(os, name, call)

    def _first_copying(self, call):
        def wrapped(*args, **options):
            with self._lock:
                if not self._copying and self.folder.exists():
                    self._copying = True
                    try:
                        self._copy()
                    finally:
                        self._copying = False
            return call(*args, **options)

        return wrapped

    def _copy(self):
        copy = self.place / str(len(self.copies))
        # What a thread of Orbax takes away meanwhile is not there: a kill might find it so.
        with contextlib.suppress(shutil.Error, OSError):
            shutil.copytree(self.folder, copy)
        self.copies.append(copy)

    def chosen(self, number, kind):
        """Some of the copies, at random but always the same; of every kind as many, as far as they go."""
        shuffled = random.Random(0).sample(self.copies, len(self.copies))
        by_kind = {}
        for copy in shuffled:
            by_kind.setdefault(kind(copy), []).append(copy)
        turns = itertools.chain.from_iterable(itertools.zip_longest(*by_kind.values()))
        return list(itertools.islice(filter(None, turns), number))


def stages(folder):
    """How many stages are done in a folder; -1 without a record."""
    try:
        return len(json.loads((folder / "report.json").read_text())["stages"])
    except FileNotFoundError:
        return -1
