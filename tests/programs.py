"""What compiled programs send between devices: read from their text, and held against the leaves' sizes."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax._src import compiler
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_KINDS = ["Auto", "Explicit"]

KINDS = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute")
"""Instructions that send data between devices."""

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}

ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")


class Collective(NamedTuple):
    """One instruction that sends data between devices.

    Attributes:
        kind: of `KINDS`.
        bytes: of what one device holds after it.
        line: as the compiler writes it.
        program: the name of the module that holds it.
    """

    kind: str
    bytes: int
    line: str
    program: str


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program, from its text (`compiled.as_text()`)."""
    name = text.split(",", 1)[0].removeprefix("HloModule ")
    found = []
    for line in text.splitlines():
        if match := INSTRUCTION.search(line):
            found.append(Collective(match[2], _bytes(match[1]), line.strip(), name))
    return found


def gathers(programs: list[str], leaf_bytes: int) -> list[Collective]:
    """What moves whole leaves: gathers and exchanges of at least so many bytes."""
    kinds = ("all-gather", "all-to-all", "collective-permute")
    found = [c for text in programs for c in collectives(text)]
    return [c for c in found if c.kind in kinds and c.bytes >= leaf_bytes]


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Inside, the text of every program that is compiled, eager operations included, goes to this list."""
    texts: list[str] = []
    original = compiler.compile_or_get_cached

    def compile_and_read(*args: Any, **kwargs: Any) -> Any:
        executable = original(*args, **kwargs)
        texts.extend(module.to_string() for module in executable.hlo_modules())
        return executable

    jax.clear_caches()  # what was compiled before would not be compiled again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compile_or_get_cached", compile_and_read)
        yield texts


def mesh_of(kind: str, shape: tuple[int, ...] = (4, 2), names: tuple[str, ...] = ("data", "model")) -> Mesh:
    """The suite's simulated devices as a mesh, its axes `Auto` or `Explicit`; skips where there are fewer."""
    if jax.device_count() < math.prod(shape):
        pytest.skip(f"needs {math.prod(shape)} devices, there is {jax.device_count()}")
    return jax.make_mesh(
        shape,
        names,
        axis_types=(getattr(AxisType, kind),) * len(shape),
        devices=jax.devices()[: math.prod(shape)],
    )


def placed(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """The tree on the mesh; `specs` is a prefix of it, of `PartitionSpec`s."""
    is_spec = lambda node: isinstance(node, PartitionSpec)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
    return jax.device_put(tree, shardings)


def apart(tree: Any, like: Any) -> list[str]:
    """The leaves that do not lie as those of `like` in their place do."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    pairs = zip(leaves, jax.tree.leaves(like), strict=True)
    return [
        f"{jax.tree_util.keystr(path)}: {x.sharding}, not {y.sharding}"
        for (path, x), y in pairs
        if not x.sharding.is_equivalent_to(y.sharding, x.ndim)
    ]


def difference(ours: Any, theirs: Any) -> float:
    """The largest over all leaves, beside the largest finite entry of each; where both agree, 0."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = (np.asarray(z, np.float64) for z in (x, y))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        scale = np.max(np.abs(b), where=np.isfinite(b), initial=1e-30)
        worst = max(worst, float(np.max(np.abs(a[~same] - b[~same]), initial=0.0) / scale))
    return worst


def nbytes(tree: Any) -> int:
    """Of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _bytes(shapes: str) -> int:
    return sum(
        BYTES.get(kind, 4) * math.prod(int(length) for length in lengths.split(",") if length)
        for kind, lengths in ARRAY.findall(shapes)
    )
