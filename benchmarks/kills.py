"""Does a run that is killed, and started again, end with what it would have had, to the last bit?"""

import argparse
import collections
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import hessjax as hj

KEY = jax.random.key(0)
PAUSE = 0.01
"""Seconds to a product: of real networks, it is the products that take the time."""


# -- the runs --------------------------------------------------------------------------------------


def loss_fn(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch @ params["a"]) @ params["b"]) ** 2)


def network() -> Any:
    a, b = jax.random.split(KEY)
    return {"a": jax.random.normal(a, (5, 6)), "b": jax.random.normal(b, (6, 2))}


DATA = np.random.default_rng(0).normal(size=(11, 5)).astype(np.float32)


def slow(matvec: Any, vector: Any) -> Any:
    time.sleep(PAUSE)
    return matvec(vector)


def matvec() -> Any:
    return Partial(slow, hj.hessian(loss_fn, network(), jnp.asarray(DATA)))


def over_batches() -> Any:
    def make(batch: Any) -> Any:
        return Partial(slow, hj.hessian(loss_fn, network(), batch))

    return hj.over_batches(make, [jnp.asarray(DATA[i : i + 4]) for i in (0, 4, 8)])


def slow_metric(params: Any) -> dict[str, Any]:
    time.sleep(5 * PAUSE)
    return {
        "loss": loss_fn(params, jnp.asarray(DATA)),
        "zeros": sum(jnp.sum(x == 0) for x in params.values()),
    }


Run = Callable[..., Any]


def runs() -> dict[str, Run]:
    """Every function that takes a checkpoint, by name."""
    like, groups = network(), {"both": "*"}
    start = (KEY, like)
    damped = {"max_matvecs": 30, "tol": 1e-12}
    return {
        "eigenpairs": lambda **k: hj.eigenpairs(matvec(), *start, 2, max_matvecs=30, tol=1e-12, **k),
        "eigenpairs over batches": lambda **k: hj.eigenpairs(over_batches(), *start, 1, max_matvecs=12, **k),
        "spectral_density": lambda **k: hj.spectral_density(matvec(), *start, 3, 10, **k),
        "spectrum": lambda **k: hj.spectrum(matvec(), *start, 2, num_matvecs=30, **k),
        "trace": lambda **k: hj.trace(matvec(), *start, 30, **k),
        "trace, xtrace": lambda **k: hj.trace(matvec(), *start, 30, estimator=hj.estimators.xtrace, **k),
        "trace, hutchpp": lambda **k: hj.trace(matvec(), *start, 30, estimator=hj.estimators.hutchpp, **k),
        "trace over batches": lambda **k: hj.trace(over_batches(), *start, 15, **k),
        "trace_by_leaf": lambda **k: hj.trace_by_leaf(matvec(), *start, 30, groups=groups, **k),
        "trace_by_leaf over batches": lambda **k: hj.trace_by_leaf(
            over_batches(), *start, 15, groups=groups, **k
        ),
        "diagonal": lambda **k: hj.diagonal(matvec(), *start, 30, **k),
        "frobenius_norm": lambda **k: hj.frobenius_norm(matvec(), *start, 30, **k),
        "power_iteration": lambda **k: hj.run(
            hj.estimators.power_iteration(2), matvec(), *start, max_matvecs=30, **k
        ),
        "solve, cg": lambda **k: hj.solve(matvec(), like, 9.0, **damped, **k),
        "solve, minres": lambda **k: hj.solve(
            matvec(), like, 0.1, method=hj.estimators.minres, **damped, **k
        ),
    }  # fmt: skip


def sensitivity(path: Path | None) -> Any:
    levels = [i / 20 for i in range(0, 20, 2)]
    diagonal = jax.tree.map(jnp.abs, network())
    return hj.sensitivity(slow_metric, network(), levels, diagonal=diagonal, path=path)


def all_results(folder: Path | None) -> dict[str, Any]:
    """Every result; what is under way is printed, for the one who kills."""
    found = {}
    for name, run in runs().items():
        print(name, flush=True)
        extra = {} if folder is None else {"callbacks": [hj.checkpoint(folder / name, every=1)]}
        found[name] = run(**extra)
    print("sensitivity", flush=True)
    found["sensitivity"] = sensitivity(None if folder is None else folder / "levels.csv")
    return found


def exact(result: Any) -> Any:
    """A result as its structure, and dtype, shape and bytes of every field."""
    leaves, structure = jax.tree.flatten(result)
    arrays = [jax.random.key_data(x) if is_key(x) else x for x in leaves]
    return str(structure), [x if isinstance(x, str) else _bytes(np.asarray(x)) for x in arrays]


def is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def _bytes(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


def child(folder: str, out: str) -> None:
    results = all_results(Path(folder) if folder else None)
    content = pickle.dumps({name: exact(x) for name, x in results.items()})
    Path(out).write_bytes(content)
    print("done", flush=True)


# -- the kills -------------------------------------------------------------------------------------


class Life:
    """A process that makes all runs, and what it says it is at."""

    def __init__(self, folder: Path | None, out: Path) -> None:
        command = [sys.executable, __file__, "--child", str(folder or ""), str(out)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.at, self.began = "", threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.at = line.strip()
            self.began.set()

    def end(self) -> int:
        """Wait for it; its exit status."""
        code = self.process.wait()
        self._reader.join()
        return code


def round_of_kills(folder: Path, rng: random.Random, longest: float, kills: collections.Counter[str]) -> Path:
    """Start and kill until a process comes to its end; the file of its results."""
    while True:
        life = Life(folder, folder / "results")
        life.began.wait(300)
        try:
            life.process.wait(rng.uniform(0, longest))
        except subprocess.TimeoutExpired:
            life.process.send_signal(signal.SIGKILL)
        code = life.end()
        if code == 0:
            return folder / "results"
        if code != -signal.SIGKILL:
            raise RuntimeError(f"a run ended with {code} at {life.at}")
        kills[life.at] += 1


def measure(wanted: int, longest: float, seed: int) -> tuple[dict[str, int], set[str], int]:
    """Kills by run, the runs whose results differ, and how often everything was made."""
    kills: collections.Counter[str] = collections.Counter()
    rng, different, rounds = random.Random(seed), set(), 0
    with tempfile.TemporaryDirectory() as top:
        life = Life(None, Path(top) / "whole")
        if life.end():
            raise RuntimeError("the runs fail without kills")
        whole = pickle.loads((Path(top) / "whole").read_bytes())
        while kills.total() < wanted:
            rounds += 1
            folder = Path(top) / str(rounds)
            folder.mkdir()
            found = pickle.loads(round_of_kills(folder, rng, longest, kills).read_bytes())
            different |= {name for name, x in whole.items() if found[name] != x}
            print(f"{kills.total()} kills in {rounds} rounds", file=sys.stderr, flush=True)
    return {name: kills[name] for name in whole}, different, rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 kills instead of 80")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--longest", type=float, default=2.0, help="seconds a process lives at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return 0
    wanted = options.kills or (10 if options.quick else 80)
    kills, different, rounds = measure(wanted, options.longest, options.seed)
    print("| run | kills | every field of the result |\n|---|---:|---|")
    for name, count in kills.items():
        print(f"| {name} | {count} | {'DIFFERS' if name in different else 'identical'} |")
    print(f"| all, {rounds} times | {sum(kills.values())} | {len(different)} differ |")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
