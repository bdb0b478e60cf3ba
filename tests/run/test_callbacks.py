import contextlib
import functools
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from etils import epath
from jax.tree_util import Partial

import hessjax as hj
from hessjax._core import _processes
from hessjax._run import _checkpoint_files, _identity, _store

KEY = jax.random.key(0)
ROLL = Partial(jnp.roll, shift=1)
D = 24


def problem():
    like = oracles.tree_like(D)
    matrix, _ = oracles.symmetric(np.linspace(0.5, 3, D))
    return oracles.matvec_of(matrix.astype(np.float32), like), like


def right_hand_side(like, seed=0):
    return jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(seed).normal(size=x.shape), x.dtype), like
    )


_, LIKE = problem()
ESTIMATORS = {
    "lanczos": lambda: hj.estimators.lanczos(2, basis_size=8),
    "slq": lambda: hj.estimators.slq(2, 12),
    "hutchinson": lambda: hj.estimators.hutchinson(),
    "conjugate_gradient": lambda: hj.estimators.conjugate_gradient(right_hand_side(LIKE), 0.1),
    "power_iteration": lambda: hj.estimators.power_iteration(2),
}


class KilledError(Exception):
    pass


def killed_after(matvec, count):
    """The matvec for so many products, and a list of how many are left."""
    left = [count]

    def product(matvec, vector):
        if not left[0]:
            raise KilledError
        left[0] -= 1
        return matvec(vector)

    return Partial(product, matvec), left


def immortal(matvec):
    """The same matvec, by name, without end."""
    return killed_after(matvec, -1)[0]


def identical(a, b):
    def same(x, y):
        x, y = (jax.random.key_data(z) if jnp.issubdtype(z.dtype, jax.dtypes.prng_key) else z for z in (x, y))
        np.testing.assert_array_equal(x, y, strict=True)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(same, a, b)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_killed_run_goes_on_from_disk_as_if_nothing_had_happened(tmp_path, name):
    """The state and the result to the last bit, and the early stop after the same product."""
    matvec, like = problem()
    arguments = {"key": KEY, "like": like, "max_matvecs": 24}
    estimator = ESTIMATORS[name]
    whole = hj.run(estimator(), immortal(matvec), **arguments)
    interrupted, _ = killed_after(matvec, 17)
    with pytest.raises(KilledError):
        hj.run(estimator(), interrupted, callbacks=[hj.checkpoint(tmp_path, every=5)], **arguments)
    rest, left = killed_after(matvec, 9)  # 24 − 15, or less than 2 looks more
    resumed = hj.run(estimator(), rest, callbacks=[hj.checkpoint(tmp_path, every=5)], **arguments)
    identical(whole, resumed)
    assert left[0] <= 1
    nothing, _ = killed_after(matvec, 0)
    again = hj.run(estimator(), nothing, callbacks=[hj.checkpoint(tmp_path)], **arguments)
    identical(whole, again)


def test_an_early_stop_falls_on_the_same_product(tmp_path):
    matvec, like = problem()
    trace = functools.partial(hj.trace, key=KEY, like=like, num_probes=200, tol=0.7)
    whole = trace(immortal(matvec))
    assert 20 < int(whole.num_samples) < 200
    for count in (7, 5, 12):
        interrupted, _ = killed_after(matvec, count)
        with pytest.raises(KilledError):
            trace(interrupted, callbacks=[hj.checkpoint(tmp_path, every=1)])
    heard = []
    resumed = trace(immortal(matvec), callbacks=[heard.append, hj.checkpoint(tmp_path)])
    identical(whole, resumed)
    nothing, _ = killed_after(matvec, 0)
    identical(whole, trace(nothing, callbacks=[hj.checkpoint(tmp_path), heard.append]))
    assert [progress.done for progress in heard[-2:]] == [True, True]


def test_one_liners_go_on_and_a_larger_budget_goes_further(tmp_path):
    matvec, like = problem()
    calls = {
        "eigenpairs": lambda a, **k: hj.eigenpairs(a, KEY, like, 1, max_matvecs=18, tol=1e-12, **k),
        "density": lambda a, **k: hj.spectral_density(a, KEY, like, 1, 14, **k),
        "solve": lambda a, **k: hj.solve(a, right_hand_side(like), 0.1, max_matvecs=14, tol=1e-12, **k),
    }
    for name, call in calls.items():
        whole = call(immortal(matvec))
        interrupted, _ = killed_after(matvec, 12)
        with pytest.raises(KilledError):
            call(interrupted, callbacks=[hj.checkpoint(tmp_path / name, every=5)])
        resumed = call(immortal(matvec), callbacks=[hj.checkpoint(tmp_path / name, every=5)])
        identical(whole, resumed)
    saved = hj.checkpoint(tmp_path / "trace")
    hj.trace(matvec, KEY, like, 7, callbacks=[saved])
    identical(hj.trace(matvec, KEY, like, 12), hj.trace(matvec, KEY, like, 12, callbacks=[saved]))
    with pytest.raises(ValueError, match="`max_matvecs` must be at least 12, the products that the restored"):
        hj.trace(matvec, KEY, like, 11, callbacks=[saved])


@pytest.mark.parametrize("key", [jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")], ids=["raw", "rbg"])
def test_keys_of_every_kind_come_back(tmp_path, key):
    like = jnp.zeros(6)
    A = Partial(jnp.roll, shift=1)
    whole = hj.run(hj.estimators.hutchinson(), A, key, like, max_matvecs=12)
    hj.run(hj.estimators.hutchinson(), A, key, like, max_matvecs=7, callbacks=[hj.checkpoint(tmp_path)])
    identical(
        whole,
        hj.run(hj.estimators.hutchinson(), A, key, like, max_matvecs=12, callbacks=[hj.checkpoint(tmp_path)]),
    )


def test_a_run_that_begins_with_a_state(tmp_path):
    matvec, like = problem()
    _, half = hj.run(hj.estimators.hutchinson(), matvec, KEY, like, max_matvecs=5)
    go_on = functools.partial(
        hj.run, hj.estimators.hutchinson(), key=KEY, like=like, max_matvecs=13, state=half
    )
    interrupted, _ = killed_after(matvec, 11)
    with pytest.raises(KilledError):
        go_on(interrupted, callbacks=[hj.checkpoint(tmp_path)])
    resumed = go_on(immortal(matvec), callbacks=[hj.checkpoint(tmp_path)])
    identical(go_on(immortal(matvec)), resumed)


def loss_fn(params, batch):
    return oracles.loss_fn(params, batch)


def other_loss_fn(params, batch):
    return 2 * oracles.loss_fn(params, batch)


def test_another_run_is_refused_and_named(tmp_path):
    params, batch = oracles.leaves(), oracles.batch()
    call = functools.partial(hj.trace, num_probes=5, callbacks=[hj.checkpoint(tmp_path)])
    first = call(hj.hessian(loss_fn, params, batch), KEY, params)
    on_disk = sorted(tmp_path.rglob("*"))
    nudged = {**params, "a_bias": params["a_bias"].at[1].mul(1 + 1e-6)}
    wide = {**params, "a_bias": params["a_bias"].astype(jnp.bfloat16)}
    A = hj.hessian(loss_fn, params, batch)
    others = {
        r"params a_bias: saved float32\[3\] \w+, now": lambda: call(A, KEY, nudged),
        r"params a_bias: saved float32\[3\] \w+, now bfloat16": lambda: call(A, KEY, wide),
        "key: saved": lambda: call(A, jax.random.key(1), params),
        r"estimator: saved Hutchinson\(probe=rademacher\), now .*probe=gaussian\)": lambda: call(
            A, KEY, params, probe=hj.probes.gaussian
        ),
        "matvec: .*loss_fn.*other_loss_fn": lambda: call(
            hj.hessian(other_loss_fn, params, batch), KEY, params
        ),
        "matvec 0/2/0/0, numbers in it: saved": lambda: call(
            hj.hessian(loss_fn, params, oracles.batch(7, 1)), KEY, params
        ),
        "matvec: .*mode='reverse": lambda: call(
            hj.hessian(loss_fn, params, batch, mode="reverse-over-reverse"), KEY, params
        ),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=r"(?s)must be of this run.*" + message):
            other()
    assert sorted(tmp_path.rglob("*")) == on_disk
    identical(first, call(A, KEY, params))


def test_another_right_hand_side_or_damping_is_refused(tmp_path):
    matvec, like = problem()
    rhs = right_hand_side(like)
    method = functools.partial(hj.run, matvec=matvec, key=KEY, like=like, max_matvecs=5)
    method(hj.estimators.conjugate_gradient(rhs, 0.1), callbacks=[hj.checkpoint(tmp_path)])
    for other in (
        hj.estimators.conjugate_gradient(rhs, 0.1001),
        hj.estimators.conjugate_gradient(right_hand_side(like, 1), 0.1),
    ):
        with pytest.raises(ValueError, match="must be of this run"):
            method(other, callbacks=[hj.checkpoint(tmp_path)])
    with pytest.raises(ValueError, match="estimator: saved ConjugateGradient.*, now Lanczos"):
        method(hj.estimators.lanczos(1), callbacks=[hj.checkpoint(tmp_path)])


def test_functions_are_told_apart_by_what_they_use(tmp_path):
    params, batches = oracles.leaves(), [oracles.batch()]
    full = hj.over_batches(lambda batch: hj.hessian(loss_fn, params, batch), batches)
    half = hj.over_batches(lambda batch: hj.hessian(other_loss_fn, params, batch), batches)
    hj.trace(full, KEY, params, 5, callbacks=[hj.checkpoint(tmp_path)])
    with pytest.raises(ValueError, match="matvec: .*lambda using hj hessian loss_fn.* other_loss_fn"):
        hj.trace(half, KEY, params, 5, callbacks=[hj.checkpoint(tmp_path)])


# Where one array of several fails, Orbax leaves the others to an event loop that it has closed.
fails_within_orbax = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@fails_within_orbax
def test_a_broken_checkpoint_gives_way_to_the_one_before(tmp_path):
    matvec, like = problem()
    whole = hj.trace(matvec, KEY, like, 20)
    hj.trace(matvec, KEY, like, 20, callbacks=[hj.checkpoint(tmp_path, every=5)])
    assert names(tmp_path) == {"15", "20"}  # two are kept
    for aside in ("20.unreadable", "20.unreadable-2"):
        damage(tmp_path, 20)
        with pytest.warns(UserWarning, match=rf"after 20 products .* is now `{aside}`.* the one after 15"):
            identical(whole, hj.trace(matvec, KEY, like, 20, callbacks=[hj.checkpoint(tmp_path, every=5)]))
        assert aside in names(tmp_path)
    damage(tmp_path, 15)
    damage(tmp_path, 20)
    with pytest.raises(ValueError, match="none of the checkpoints in .* can be read, the latest .after 20 "):
        hj.trace(matvec, KEY, like, 20, callbacks=[hj.checkpoint(tmp_path)])
    shutil.rmtree(ours(tmp_path))
    identical(whole, hj.trace(matvec, KEY, like, 20, callbacks=[hj.checkpoint(tmp_path)]))


def damage(folder, step):
    """Cut the longest file of a checkpoint in the middle."""
    file = max(
        (p for p in (ours(folder) / str(step)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def reworded(folder, step):
    """The header changed, and still JSON."""
    file = ours(folder) / str(step) / "about" / "metadata"
    text = file.read_text()
    assert "Hutchinson" in text
    file.write_text(text.replace("Hutchinson", "Hutchinsen"))


def without(part):
    return lambda folder, step: shutil.rmtree(ours(folder) / str(step) / part)


def renamed(folder, step):
    (ours(folder) / str(step)).rename(ours(folder) / "25")


@fails_within_orbax
@pytest.mark.parametrize(
    ("harm", "step"), [(reworded, 20), (without("about"), 20), (without("state/d"), 20), (renamed, 25)]
)
def test_damage_of_every_kind_is_noticed(tmp_path, harm, step):
    trace = functools.partial(hj.trace, ROLL, KEY, jnp.zeros(900), 20, probe=hj.probes.gaussian)
    whole = trace(callbacks=[hj.checkpoint(tmp_path, every=5)])
    harm(tmp_path, 20)
    with pytest.warns(UserWarning, match=rf"after {step} products .*read.* `{step}.unreadable`.* after 15"):
        identical(whole, trace(callbacks=[hj.checkpoint(tmp_path, every=5)]))
    identical(whole, trace(callbacks=[hj.checkpoint(tmp_path)]))  # whole again


def test_numbers_of_every_kind_come_back(tmp_path):
    kinds = ["bool", "int8", "uint32", "float16", "bfloat16", "float32", "complex64", "float8_e4m3fn", "int4"]
    arrays = [jnp.arange(6).reshape(2, 3).astype(kind) for kind in kinds]
    leaves = [*arrays, *(x[0, 1] for x in arrays), jnp.zeros((0, 3))]
    wide = np.arange(6.0)
    gathered = {"a/b": wide, "turned": wide.reshape(2, 3).T, "swapped": wide.astype(">f8"), "none": wide[:0]}
    alone = _processes.Group((0,))
    with contextlib.closing(_store.Store(tmp_path, alone)) as store:
        for kept in (leaves, leaves[-1:]):
            saved = _checkpoint_files.Saved(kept, gathered, len(kept))
            run = _checkpoint_files.Run({}, "", [jnp.zeros_like(x) for x in kept])
            _checkpoint_files.write(store, run, saved)
            found = _checkpoint_files.read(store, run)
            identical(saved.leaves, found.leaves)
            assert found.gathered.keys() == gathered.keys()
            for name, x in gathered.items():
                np.testing.assert_array_equal(found.gathered[name], x)
            shutil.rmtree(tmp_path / str(len(kept)))


def ours(folder):
    return folder / _store.FOLDER


def names(folder):
    return {p.name for p in ours(folder).iterdir()}


@fails_within_orbax
def test_a_full_disk_leaves_the_checkpoint_before_good(tmp_path):
    like = jnp.zeros(200_000)
    A = Partial(jnp.roll, shift=1)
    trace = functools.partial(hj.trace, A, KEY, like, callbacks=[hj.checkpoint(tmp_path)])
    whole = hj.trace(A, KEY, like, 12, probe=hj.probes.gaussian)
    trace(5, probe=hj.probes.gaussian)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match="after 12 products could not be written.*the one after 5 products is"
        ):
            trace(12, probe=hj.probes.gaussian)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    identical(whole, trace(12, probe=hj.probes.gaussian))
    assert names(tmp_path) == {"5", "12"}


def test_a_process_killed_while_it_writes(tmp_path):
    """SIGKILL after the data of the second checkpoint are on disk, before they count."""
    script = """
        import os, signal, sys
        import jax, jax.numpy as jnp
        import hessjax as hj

        def watch(event, arguments):
            if event == "os.rename" and str(arguments[1]).endswith("/10"):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        A = jax.tree_util.Partial(jnp.roll, shift=1)
        saved = hj.checkpoint(sys.argv[1], every=5)
        rule, key = hj.estimators.hutchinson(), jax.random.key(0)
        hj.run(rule, A, key, jnp.zeros(9), max_matvecs=15, callbacks=[saved])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    assert subprocess.run(command, env=dict(os.environ), check=False).returncode == -signal.SIGKILL
    left = names(tmp_path) - {"5", "lock"}
    assert len(left) == 1  # what was half written
    assert ".orbax-checkpoint-tmp" in left.pop()
    A, like = Partial(jnp.roll, shift=1), jnp.zeros(9)
    heard = []
    callbacks = [hj.checkpoint(tmp_path, every=5), heard.append]
    resumed = hj.run(hj.estimators.hutchinson(), A, KEY, like, max_matvecs=15, callbacks=callbacks)
    assert heard[0].num_matvecs == 5
    identical(hj.run(hj.estimators.hutchinson(), A, KEY, like, max_matvecs=15), resumed)
    assert names(tmp_path) == {"10", "15"}


def test_a_product_that_is_not_finite_does_not_spoil_the_checkpoint(tmp_path):
    matvec, like = problem()
    count = [0]

    def sometimes(matvec, vector):
        count[0] += 1
        return jax.tree.map(lambda x: x * (jnp.nan if count[0] == 8 else 1), matvec(vector))

    mended = Partial(sometimes, matvec)
    with pytest.raises(hj.NonFiniteProductError):
        hj.trace(mended, KEY, like, 12, callbacks=[hj.checkpoint(tmp_path)])
    resumed = hj.trace(mended, KEY, like, 12, callbacks=[hj.checkpoint(tmp_path)])
    identical(hj.trace(matvec, KEY, like, 12), resumed)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        hj.checkpoint(tmp_path, every=0)
    (tmp_path / "file").write_text("")
    (tmp_path / "hessjax-checkpoints").write_text("")

    def never(vector):
        raise AssertionError("multiplied")

    for path in (tmp_path / "file", tmp_path / "file" / "folder", tmp_path):
        with pytest.raises(OSError, match="`path` of `checkpoint` must be a folder to write to, got"):
            hj.trace(never, KEY, jnp.zeros(3), 5, callbacks=[hj.checkpoint(path)])


def over_two_batches(params):
    x, y = oracles.batch(9)
    return hj.over_batches(lambda b: hj.hessian(oracles.loss_fn, params, b), [(x[:5], y[:5]), (x[5:], y[5:])])


@pytest.mark.parametrize("count", [3, 5, 12, 17])
def test_traces_over_batches_keep_every_field(tmp_path, count):
    """The sampling error, too, of the total, the leaves and the groups; and with a larger budget."""
    params = oracles.leaves()
    matvec = over_two_batches(params)
    call = functools.partial(hj.trace_by_leaf, key=KEY, like=params, groups={"b": "*bias"})
    make, left = matvec.make_matvec, [2 * count]

    def mortal(batch):
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        return make(batch)

    def saved():
        return [hj.checkpoint(tmp_path, every=1)]

    whole = call(matvec, num_probes=20)
    object.__setattr__(matvec, "make_matvec", mortal)
    with pytest.raises(KilledError):
        call(matvec, num_probes=20, callbacks=saved())
    left[0] = 100
    resumed, again = (call(matvec, num_probes=20, callbacks=saved()) for _ in range(2))
    assert whole.total.data_stderr is not None
    identical(whole, resumed)
    identical(whole, again)
    identical(call(matvec, num_probes=25), call(matvec, num_probes=25, callbacks=saved()))


def test_a_failed_product_leaves_no_trace_in_the_sampling_error(tmp_path):
    params, count = oracles.leaves(), [0]
    matvec = over_two_batches(params)
    make = matvec.make_matvec

    def sometimes(batch):
        count[0] += 1
        factor = jnp.nan if count[0] == 13 else 1.0
        return lambda v: jax.tree.map(lambda x: x * factor, make(batch)(v))

    whole = hj.trace(matvec, KEY, params, 10)
    object.__setattr__(matvec, "make_matvec", sometimes)
    with pytest.raises(hj.NonFiniteProductError):
        hj.trace(matvec, KEY, params, 10, callbacks=[hj.checkpoint(tmp_path)])
    identical(whole, hj.trace(matvec, KEY, params, 10, callbacks=[hj.checkpoint(tmp_path)]))


# -- whose folder it is ------------------------------------------------------------------------------


def rolled(path, num_probes=5, **kwargs):
    return hj.trace(ROLL, KEY, jnp.zeros(9), num_probes, callbacks=[hj.checkpoint(path, **kwargs)])


@pytest.mark.parametrize("name", ["hessjax", "jax", "jaxlib"])
def test_other_software_is_named(tmp_path, monkeypatch, name):
    rolled(tmp_path)
    whole = hj.trace(ROLL, KEY, jnp.zeros(9), 10)
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[name], "__version__", "0.0.1")
        with pytest.warns(
            UserWarning,
            match=rf"made by other software or on other devices: {name} .*, now 0.0.1. The run goes",
        ):
            rolled(tmp_path, 7)
    with pytest.warns(UserWarning, match=f"{name} 0.0.1, now "):
        identical(whole, rolled(tmp_path, 10))
    rolled(tmp_path, 10)  # written by this software again


def test_another_state_is_refused_whatever_the_versions(tmp_path, monkeypatch):
    rolled(tmp_path)
    on_disk = contents(tmp_path)
    named = _identity._leaves
    monkeypatch.setattr(_identity, "_leaves", lambda tree: [(f"new/{path}", x) for path, x in named(tree)])
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    with pytest.raises(ValueError, match=r"(?s)another one.*state .*saved .*now \(none\).*by jax .*0.0.1"):
        rolled(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(_checkpoint_files, "_FORMAT", 3)
    with pytest.raises(ValueError, match="must be of format 3, but it is of format 2, by hessjax "):
        rolled(tmp_path)
    assert on_disk == contents(tmp_path)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_other_peoples_files_are_left_alone(tmp_path):
    foreign = ["20.orbax-checkpoint-tmp-1/x", "7/state", "default.orbax-checkpoint-tmp/y", "15.npz", "lock",
               "hessjax/__init__.py", "hessjax-checkpoints/notes", "hessjax-checkpoints/x.partial",
               "hessjax-checkpoints/5.bak/z"]  # fmt: skip
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for num_probes in (5, 12, 20):
        rolled(tmp_path, num_probes)
    assert all((tmp_path / name).read_text() == name for name in foreign)
    for name in foreign:
        (tmp_path / name).unlink()
    left = {p.relative_to(ours(tmp_path)).parts[0] for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"12", "20"}


def test_one_run_at_a_time(tmp_path):
    """Another process is named by its number; a killed one keeps nobody out; nor does one that failed."""
    script = """
        import sys, time
        import jax, jax.numpy as jnp
        import hessjax as hj

        def wait(progress):
            print("begun", flush=True)
            time.sleep(60)

        A = jax.tree_util.Partial(jnp.roll, shift=1)
        hj.trace(A, jax.random.key(0), jnp.zeros(9), 20, callbacks=[hj.checkpoint(sys.argv[1]), wait])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"begun\n"
        with pytest.raises(BlockingIOError, match=rf"at a time, but process {other.pid} on .*lock`. Wait"):
            rolled(tmp_path)
        other.kill()
    rolled(tmp_path, 7)
    assert names(tmp_path) == {"7"}
    saved = hj.checkpoint(tmp_path, every=1)

    def nested(progress):
        rolled(tmp_path, 20)

    for callbacks in ([saved, nested], [saved, saved]):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on "):
            hj.trace(ROLL, KEY, jnp.zeros(9), 15, callbacks=callbacks)
    with pytest.raises(ValueError, match="`max_matvecs` must be at least"):
        rolled(tmp_path, 3)
    rolled(tmp_path, 20)
    assert "lock" not in names(tmp_path)


def test_paths(tmp_path, monkeypatch):
    for path, message in (
        ("", "an empty string"),
        ("gs://bucket/run", "a path of this machine, got the URL"),
        ("s3://bucket", "got the URL"),
        (pathlib.Path("gs://bucket/run"), "got the URL"),
        ("file:///run", "got the URL"),
        ("~nobody-of-this-name/run", "begin with a `~` that has a home"),
        ("a\0b", "without NUL"),
    ):
        with pytest.raises(ValueError, match=f"`path` must .*{message}"):
            hj.checkpoint(path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    saved = hj.checkpoint("here/run", every=1)
    away = lambda progress: os.chdir(tmp_path.parent)
    hj.trace(ROLL, KEY, jnp.zeros(9), 12, callbacks=[away, saved])
    assert names(tmp_path / "here" / "run") == {"10", "12"}
    rolled("~/run")
    rolled(epath.Path(tmp_path / "home" / "run"), 7)
    rolled(tmp_path / "x" / ".." / "home" / "run", 9)
    assert names(tmp_path / "home" / "run") == {"7", "9"}
    (tmp_path / "link").symlink_to(tmp_path / "home" / "run")
    rolled(tmp_path / "link", 11)
    assert names(tmp_path / "home" / "run") == {"9", "11"}


def test_densities_by_leaf_are_several_runs(tmp_path):
    with pytest.raises(ValueError, match="`callbacks` must not hold a `checkpoint`"):
        hj.spectral_density_by_leaf(
            lambda v: v, KEY, oracles.leaves(), 1, 2, callbacks=[hj.checkpoint(tmp_path)]
        )
