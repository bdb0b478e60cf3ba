"""What a pruning leaves in its folder: checkpoint, masks, sparse file, smaller network, tables."""

import contextlib
import shutil
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _files, _tree
from hessjax._report._folder import PRUNED
from hessjax._report._plan import LEVELS
from hessjax._report._problem import Problem, first_batch
from hessjax._report._pruning import Curvature, Pruned
from hessjax._report._record import disk_errors
from hessjax.analysis._sensitivity import sensitivity
from hessjax.analysis._summary import summary
from hessjax.compaction._compact import compact
from hessjax.compaction._sparse import save_npz


def write_all(problem: Problem, pruned: Pruned, curvature: Curvature, out: Path) -> dict[str, Any]:
    """Everything but the page.

    Args:
        problem: whose network.
        pruned: the network.
        curvature: the mean eigenvalue of the block of every leaf; empty where it was not needed.
        out: the folder.

    Returns:
        Zeros by leaf, the smaller network or why there is none, and the names of the files.
    """
    _save(out / "checkpoint", pruned.params)
    _files.write_whole(out / "masks.npz", lambda file: _write_masks(file, pruned))
    with contextlib.suppress(ValueError):  # nothing sparse enough to be worth it
        save_npz(out / "sparse.npz", pruned.params)
    text = f"{summary(pruned.params).to_text(120)}\n".encode()
    _files.write_whole(out / "summary.txt", lambda file: file.write(text))
    if curvature:
        _sensitivity(problem, curvature, out / "sensitivity.csv")
    return {
        "zeros": _zeros(pruned),
        "compacted": _compacted(problem, pruned, out),
        "files": sorted(name for name in PRUNED if (out / name).exists()),
    }


def _save(path: Path, tree: Any) -> None:
    import orbax.checkpoint as ocp  # here, because it takes half a second to import

    for left in path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*"):  # by a kill in the middle of this
        shutil.rmtree(left)
    with disk_errors(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, force=True)


def _write_masks(file: BinaryIO, pruned: Pruned) -> None:
    """As `numpy.savez_compressed` does, whose arguments have names that a leaf may have too."""
    named = zip(_tree.leaf_paths(pruned.mask), jax.tree.leaves(pruned.mask), strict=True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, mask in named:
            if jnp.ndim(mask):
                with archive.open(f"{path}.npy", "w") as entry:
                    np.lib.format.write_array(entry, np.asarray(mask), allow_pickle=False)


def _zeros(pruned: Pruned) -> list[dict[str, Any]]:
    named = zip(_tree.leaf_paths(pruned.params), jax.tree.leaves(pruned.params), strict=True)
    kept = [bool(jnp.ndim(mask)) for mask in jax.tree.leaves(pruned.mask)]
    return [
        {"path": path, "number": x.size, "zeros": int(jnp.sum(x == 0)), "pruned": where}
        for (path, x), where in zip(named, kept, strict=True)
    ]


def _sensitivity(problem: Problem, curvature: Curvature, path: Path) -> None:
    leaves = [
        jnp.full_like(leaf, curvature.get(name, 0.0))
        for name, leaf in zip(_tree.leaf_paths(problem.params), jax.tree.leaves(problem.params), strict=True)
    ]
    diagonal = jax.tree.unflatten(jax.tree.structure(problem.params), leaves)
    sensitivity(None, problem.params, LEVELS, diagonal=diagonal).to_csv(path)


def _compacted(problem: Problem, pruned: Pruned, out: Path) -> dict[str, Any] | None:
    """The smaller network, where whole channels went; what is smaller, or why it is not."""
    if problem.model_fn is None:
        return None
    try:
        small = compact(problem.model_fn, pruned.params, first_batch(problem))
    except Exception as error:  # whatever it has against this network, the pruned one is there
        return {"why_not": str(error) or type(error).__name__}
    changed = {path: [list(x) for x in pair] for path, pair in small.shapes.items() if pair[0] != pair[1]}
    if not changed:
        return {"why_not": "no whole channel went"}
    _save(out / "compacted", small.params)
    return {"shapes": changed, "parameters": _tree.size(small.params), "difference": float(small.difference)}
