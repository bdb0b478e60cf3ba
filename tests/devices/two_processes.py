"""What is public, in two processes that share a mesh: started twice by `test_processes.py`."""

import os
import pickle
import signal
import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hessjax as hj
from hessjax._run import _store

SPECS = {"w": P("data", None), "v": P("data", None)}
MOST = 12
"""Products of the run that is killed; one process is after the seventh."""


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


def key():
    return jax.random.key(0)  # not one for all: nothing may wake jax before its processes know each other


def numbers():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {"w": normal(4, 4), "v": normal(4, 4)}, (normal(8, 4), normal(8, 4))


def hessian(params, batch):
    return hj.hessian(loss_fn, params, batch)


def over_batches(params, batch):
    return hj.over_batches(lambda b: hessian(params, b), [batch, jax.jit(_halved)(batch)])


def _halved(batch):
    return jax.tree.map(lambda x: x / 2, batch)


def trained(params, batch):
    tx = hj.prune(optax.adam(1e-2), hj.saliencies.magnitude(), 0.5, every=1, start=0)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(2):
        params, state = step(params, state, batch)
    return params, hj.mask_of(state)


def solved(params, batch):
    return hj.solve(hj.weighted_sum([hj.ggn(model_fn, output_loss, params, batch)], shift=1.0), params).x


def model_fn(params, batch):
    return jnp.tanh(batch[0] @ params["w"]) @ params["v"]


def output_loss(outputs, batch):
    return jnp.mean((outputs - batch[1]) ** 2)


CALLS = {
    "eigenpairs": lambda p, b: hj.eigenpairs(hessian(p, b), key(), p, k=1, max_matvecs=12).values,
    "trace": lambda p, b: hj.trace(hessian(p, b), key(), p, 4)[:2],
    "over_batches": lambda p, b: hj.trace(over_batches(p, b), key(), p, 4),
    "spectral_density": lambda p, b: hj.spectral_density(hessian(p, b), key(), p, 1, 4).nodes,
    "solve": solved,
    "prune": trained,
}


CHEAP = ("trace", "over_batches", "prune")
"""Of each kind of thing one: what compiles is what costs."""


# -- the run that is killed ------------------------------------------------------------------------


def run(params, batch, *callbacks):
    """The exact mean over batches, whose trace has an uncertainty of its own to be saved."""
    return hj.trace(over_batches(params, batch), key(), params, MOST, callbacks=callbacks)


def krylov(params, batch, *callbacks):
    """A run whose state holds vectors like the params, over both processes."""
    method = hj.estimators.lanczos(1, basis_size=6)
    return hj.run(method, hessian(params, batch), key(), params, max_matvecs=MOST, callbacks=callbacks)


RUNS = {"trace": run, "krylov": krylov}


def deadly(progress):
    """Before the checkpoint of the same products is written, which is that of the next callback."""
    if progress.num_matvecs >= 10 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def exact(tree):
    """Every field, as dtype, shape and bytes."""
    found = [np.asarray(on_host(x)) for x in jax.tree.leaves(tree)]
    return [(x.dtype.name, x.shape, x.tobytes()) for x in found]


def on_host(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    spans = isinstance(x, jax.Array) and not x.is_fully_addressable
    return multihost_utils.process_allgather(x, tiled=True) if spans else np.asarray(x)


# -- what the processes do -------------------------------------------------------------------------


def globally(mesh, spec, array):
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), array.__getitem__)


def shard_of(mesh, array):
    """The examples of this process, made into an array of all of them."""
    mine = np.split(array, jax.process_count())[jax.process_index()]
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), mine)


def placed(kind):
    """The mesh, the params over it and the data, a shard from each process."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(getattr(AxisType, kind),))
    params, batch = numbers()
    params = {name: globally(mesh, SPECS[name], x) for name, x in params.items()}
    return mesh, params, tuple(shard_of(mesh, x) for x in batch)


def message(function, *kinds):
    """What a call is refused with; every process must be."""
    try:
        function()
    except kinds as error:
        return str(error)
    raise AssertionError("it was not refused")


def refusals(folder, params, batch):
    """What cannot be done, each in its words."""
    A, index = hessian(params, batch), jax.process_index()
    trace = lambda seed, like, path, A=A: hj.trace(
        A, jax.random.key(seed), like, 5, callbacks=[hj.checkpoint(path)]
    )
    local = jax.tree.map(jnp.asarray, numbers()[0])
    inner = lambda _: trace(0, params, folder / "busy")
    nested = lambda: hj.trace(A, key(), params, 5, callbacks=[hj.checkpoint(folder / "busy"), inner])
    others = lambda: trace(index, params, folder / "keys")
    found = {
        "to_sparse": message(lambda: hj.to_sparse(params), ValueError),
        "compact": message(lambda: hj.compact(model_fn, params, batch), ValueError),
        "args": message(lambda: hessian(params, np.full((2, 8, 4), index, np.float32)), ValueError),
        "busy": message(nested, BlockingIOError),
        "keys": message(others, ValueError),
        "unseen": message(lambda: trace(0, params, folder / f"of-{index}"), ValueError),
        "no folder": message(lambda: trace(0, params, folder / "file"), OSError),
    }
    if index == 1:
        alone = lambda: trace(0, local, folder / "alone", lambda v: v)
        found["alone"] = message(alone, ValueError)
    return found


def files(folder, mesh, params):
    """Whether a file that one process writes brings every number back, to where it lay."""
    hj.save_npz(folder / "params.npz", params)
    back = hj.load_npz(folder / "params.npz", params)
    assert all(back[name].sharding == params[name].sharding for name in params)
    return exact(back) == exact(params)


def parts(rows):
    """What this process has of the data, 4 examples or 3, two at a time."""
    mine = [x[:4] if jax.process_index() == 0 else x[4:7] for x in numbers()[1]]
    return hj.batches(
        [tuple(x[place] for x in mine) for place in (slice(2), slice(2, 4))],
        with_weights=lambda batch, weights: (*batch, weights),
        sharding=rows,
    )


def weighted_loss(params, batch):
    *batch, weights = batch
    losses = jnp.mean((model_fn(params, batch) - batch[1]) ** 2, axis=1)
    return jnp.sum(weights * losses) / jnp.sum(weights)


def over_parts(mesh, params):
    """A product over data that every process reads its own part of, and what too few are refused with."""
    rows = NamedSharding(mesh, P("data"))
    over = lambda data: hj.over_batches(lambda b: hj.hessian(weighted_loss, params, b), data)
    fewer = hj.batches([x[:2] for x in [numbers()[1][0]] * (1 + jax.process_index())], sharding=rows)
    refused = message(
        lambda: hj.over_batches(lambda b: jax.tree_util.Partial(_same), fewer)(params), ValueError
    )
    return over(parts(rows))(params), refused


def _same(vector):
    return vector


def first(folder):
    """All there is; at the end one of the two is killed."""
    found = {}
    mesh, params, batch = placed("Explicit")
    with jax.set_mesh(mesh):
        found["Explicit, spanning"] = {name: CALLS[name](params, batch) for name in CHEAP}
    mesh, params, batch = placed("Auto")
    found["Auto, spanning"] = {name: call(params, batch) for name, call in CALLS.items()}
    local = jax.tree.map(jnp.asarray, numbers()[0])
    found["local"] = {name: CALLS[name](local, batch) for name in CHEAP}
    found = jax.tree.map(on_host, found)
    product, found["fewer"] = over_parts(mesh, params)
    found["parts"] = jax.tree.map(on_host, product)
    found["files"] = files(folder, mesh, params)
    found["messages"] = refusals(folder, params, batch)
    restored = hj.checkpoint(folder / "of-one")
    found["of one process"] = jax.tree.map(on_host, krylov(params, batch, restored)[0].values)
    found["whole"] = {name: exact(call(params, batch)) for name, call in RUNS.items()}
    write(folder, "first", found)
    for name, call in RUNS.items():
        saved = hj.checkpoint(folder / name, every=5)
        call(params, batch, *([deadly] if name == "krylov" else []), saved)


def second(folder):
    """The runs gone on from where they were."""
    _, params, batch = placed("Auto")
    heard = []
    found = {}
    for name, call in RUNS.items():
        heard.clear()
        found[name] = exact(call(params, batch, hj.checkpoint(folder / name, every=5), heard.append))
        found[f"{name}, first heard"] = heard[0].num_matvecs
    write(folder, "second", found)


def write(folder, name, found):
    path = folder / f"{name}-{jax.process_index()}"
    path.write_bytes(pickle.dumps(found))


def main(part, folder):
    """Report an error at once: at its end a process waits for the other, which may wait for this one."""
    try:
        {"first": first, "second": second}[part](folder)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    jax.distributed.initialize(
        f"localhost:{sys.argv[3]}",
        num_processes=2,
        process_id=int(sys.argv[2]),
        initialization_timeout=60,
        heartbeat_timeout_seconds=10,
    )
    _store.PATIENCE = 1
    main(sys.argv[1], Path(sys.argv[4]))
