"""Fixtures for the whole suite, and what makes it compile fast."""

import os
import pathlib
import sys
import time

# Compiling is nearly all that the suite does. What runs for milliseconds need not be optimised, and what one
# worker has compiled neither the other nor the next run compiles again. All this before jax is imported; what
# the environment asks for itself comes last, and counts.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Programs for one device run on the first as ever; tests of meshes find eight.
        "--xla_force_host_platform_device_count=8",
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("COLUMNS", None)  # tables are as wide as it says

import jax
import jaxtyping
import pytest

PROGRAMS = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "programs"
MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 25_000
DAY = 86_400


def pytest_sessionstart():
    """Programs a week old are no longer kept: nobody else takes them away."""
    if "PYTEST_XDIST_WORKER" not in os.environ and PROGRAMS.is_dir():
        for program in PROGRAMS.iterdir():
            if program.stat().st_mtime < time.time() - 7 * DAY:
                program.unlink(missing_ok=True)


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Every compiled program takes some of the 65,530 memory maps that Linux grants to a process."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


PROMOTING = frozenset(["benchmarks", "docs", "flax", "test_readme.py"])
"""Where tests run networks of others, or other libraries, that promote dtypes or ranks themselves."""


@pytest.fixture(autouse=True)
def _no_open_figures():
    """pyplot keeps every figure until it is closed, and warns at the twenty-first."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture(autouse=True)
def _no_silent_promotion(request):
    """The library is written for people who forbid it."""
    folder = pathlib.Path(request.path).relative_to(pathlib.Path(__file__).parent).parts[0]
    if folder in PROMOTING or request.node.get_closest_marker("promotes"):
        yield
        return
    # Training loops call optax, whose Adam raises a float to an int32.
    dtypes = "standard" if folder == "pruning" else "strict"
    with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """Float64 for the time of a test: what oracles need."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def untyped(monkeypatch):
    """As people run the package: types are not checked at every call, so that its own checks answer."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def compilations():
    """A list that grows by one at every compilation while the test runs."""
    seen: list[str] = []

    def listen(event: str, *_: object, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)
