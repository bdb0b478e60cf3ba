"""Ask peers in turn: each in a process of its own, all there at once, one at work at a time."""

import functools
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
LIMIT = 240.0
"""Seconds that one answer may take; a peer that takes longer is stopped, and its row says so."""


class Worker:
    """A peer's process, begun at `started`."""

    def __init__(self, name: str, path: Path, limit: float = LIMIT) -> None:
        command = [sys.executable, "-m", "peers.worker", name, str(path)]
        places = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
        known = [p for p in [os.environ.get("PYTHONPATH")] if p]
        # A first call compiles: nothing may be left from an earlier run.
        environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([*places, *known])
        self.name, self.limit, self.started = name, limit, time.perf_counter()
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @functools.cached_property
    def hello(self) -> Answer:
        """What it says when it has loaded the problem."""
        return self._answer(max(self.limit, LIMIT))

    def ask(self, task: str, **given: Any) -> Answer:
        """What it answers, or `{"failed": reason}`."""
        if self.process.poll() is not None:
            return {"failed": "stopped before"}
        line = json.dumps({"task": task, "given": given}) + "\n"
        self.process.stdin.write(line.encode())
        self.process.stdin.flush()
        return self._answer(self.limit)

    def _answer(self, limit: float) -> Answer:
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        if not ready:
            self.close()
            return {"failed": f"not done after {limit:.0f} s"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": f"its process ended ({self.process.wait()})"}

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


class Group:
    """The peers of one question, ours first."""

    def __init__(self, names: list[str], path: Path, limit: float = LIMIT) -> None:
        # All are compared with ours, which is waited for.
        limits = {name: 4 * limit if name == "hessjax" else limit for name in names}
        self.workers = {name: Worker(name, path, limits[name]) for name in names}
        if "loss" not in self.workers["hessjax"].hello:
            raise RuntimeError(f"hessjax itself: {self.workers['hessjax'].hello}")
        self.problems = {
            name: _trouble(worker, self.workers["hessjax"]) for name, worker in self.workers.items()
        }

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers.values():
            worker.close()

    @property
    def usable(self) -> list[str]:
        """Those that are installed and have the same loss."""
        return [name for name, trouble in self.problems.items() if trouble is None]

    def ways(self, name: str, task: str) -> list[str]:
        """How a peer can be asked; none where it does not have the task."""
        return self.workers[name].hello["ways"].get(task, [])


def rounds(calls: Mapping[Any, Callable[[], Answer]], count: int) -> dict[Any, list[float]]:
    """Seconds of A, B, C, A, B, C, ...; a call that fails is not made again."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(count):
        for key in list(calls):
            answer = calls[key]()
            if "seconds" in answer:
                times[key].append(answer["seconds"])
            else:
                calls = {k: call for k, call in calls.items() if k != key}
    return times


def _trouble(worker: Worker, ours: Worker) -> str | None:
    """Why it cannot be compared."""
    hello, reference = worker.hello, ours.hello.get("loss")
    if "missing" in hello:
        return f"{hello['missing']} is not installed"
    if "failed" in hello:
        return hello["failed"]
    if hello["loss"] is not None and abs(hello["loss"] - reference) > 1e-5 * max(1, abs(reference)):
        return f"loss {hello['loss']:.6g} where ours is {reference:.6g}"
    return None
