"""Does a run that is killed, and started again, end with what it would have had, to the last bit?"""

import argparse
import itertools
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import hessjax as hj

PAUSE = 0.01
"""Seconds to a product: of real networks, it is the products that take the time."""


# -- the runs --------------------------------------------------------------------------------------


def loss_fn(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch @ params["a"]) @ params["b"]) ** 2)


def network() -> Any:
    a, b = jax.random.split(jax.random.key(0))
    return {"a": jax.random.normal(a, (5, 6)), "b": jax.random.normal(b, (6, 2))}


DATA = np.random.default_rng(0).normal(size=(11, 5)).astype(np.float32)


def slow(matvec: Any, vector: Any) -> Any:
    print("product", flush=True)  # heard by the one who kills
    time.sleep(PAUSE)
    return matvec(vector)


def matvec() -> Any:
    return Partial(slow, hj.hessian(loss_fn, network(), jnp.asarray(DATA)))


def over_batches() -> Any:
    def make(batch: Any) -> Any:
        return Partial(slow, hj.hessian(loss_fn, network(), batch))

    return hj.over_batches(make, [jnp.asarray(DATA[i : i + 4]) for i in (0, 4, 8)])


def slow_metric(params: Any) -> dict[str, Any]:
    print("evaluation", flush=True)
    time.sleep(PAUSE)
    return {
        "loss": loss_fn(params, jnp.asarray(DATA)),
        "zeros": sum(jnp.sum(x == 0) for x in params.values()),
    }


NAMES = (
    "eigenpairs", "eigenpairs over batches", "spectral_density", "spectrum", "trace", "trace, xtrace",
    "trace, hutchpp", "trace over batches", "trace_by_leaf", "trace_by_leaf over batches", "diagonal",
    "frobenius_norm", "power_iteration", "solve, cg", "solve, minres", "sensitivity",
)  # fmt: skip


Run = Callable[..., Any]


def runs() -> dict[str, Run]:
    """Every function that takes a checkpoint, by name."""
    like, groups = network(), {"both": "*"}
    start = (jax.random.key(0), like)
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


def result(name: str, folder: Path | None) -> Any:
    """The result of a run, with its checkpoints in a folder."""
    if name == "sensitivity":
        return sensitivity(None if folder is None else folder / "levels.csv")
    extra = {} if folder is None else {"callbacks": [hj.checkpoint(folder, every=1)]}
    return runs()[name](**extra)


def exact(result: Any) -> Any:
    """A result as its structure, and dtype, shape and bytes of every field."""
    leaves, structure = jax.tree.flatten(result)
    arrays = [jax.random.key_data(x) if is_key(x) else x for x in leaves]
    return str(structure), [x if isinstance(x, str) else _bytes(np.asarray(x)) for x in arrays]


def is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def _bytes(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


def child(name: str, folder: Path | None, out: Path) -> None:
    out.write_bytes(pickle.dumps(exact(result(name, folder))))


# -- the kills -------------------------------------------------------------------------------------


class Life:
    """A process that makes one run, and how many products it says it has made."""

    def __init__(self, name: str, folder: Path | None, out: Path) -> None:
        read, write = os.pipe()
        # Forked before jax has begun: what takes seconds, the imports, is done once.
        self.pid = os.fork()
        if not self.pid:
            _be_child(write, name, folder, out)
        os.close(write)
        self._lines = os.fdopen(read)

    def products(self, most: int) -> int:
        """Wait for so many products; how many it made, fewer if it has come to its end."""
        return sum(1 for _ in itertools.islice(self._lines, most))

    def end(self) -> int:
        """Wait for it; its exit status, below 0 for a signal."""
        self._lines.close()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def _be_child(write: int, name: str, folder: Path | None, out: Path) -> None:
    os.dup2(write, 1)
    os.close(write)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        child(name, folder, out)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def undisturbed(name: str, folder: Path | None, out: Path) -> bytes:
    """The result of a run that nobody kills."""
    life = Life(name, folder, out)
    life.products(10**9)
    if code := life.end():
        raise RuntimeError(f"{name} ended with {code}")
    return out.read_bytes()


def killed(name: str, folder: Path, most: int, rng: random.Random) -> int:
    """Start a run and kill it, at any time from its first product on, so many times or until it ends."""
    for count in range(most):
        life = Life(name, folder, folder / "result")
        wanted = rng.randint(1, 12)
        if life.products(wanted) == wanted:
            time.sleep(rng.uniform(0, 2 * PAUSE))  # in a product, or while it writes
            os.kill(life.pid, signal.SIGKILL)
        if (code := life.end()) == 0:
            return count
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{name} ended with {code}")
    return most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one kill of every run instead of five")
    parser.add_argument("--kills", type=int, help="of every run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    most, rng = options.kills or (1 if options.quick else 5), random.Random(options.seed)
    kills = different = 0
    print("| run | kills | every field of the result |\n|---|---:|---|")
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            count = killed(name, Path(folder), most, rng)
            resumed = undisturbed(name, Path(folder), Path(folder) / "result")
            same = resumed == undisturbed(name, None, Path(folder) / "whole")
        print(f"| {name} | {count} | {'identical' if same else 'DIFFERS'} |", flush=True)
        kills, different = kills + count, different + (not same)
    print(f"| all | {kills} | {different} differ |")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
