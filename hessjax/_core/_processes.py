"""Several processes of `jax.distributed`: who holds which arrays, what they agree on, arrays read whole."""

import collections
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from hessjax._core import _tree

PATIENCE = 600
"""Seconds that a process waits for what another one has to say: one that has died ends all of them sooner."""

_COUNTS: collections.Counter[tuple[int, ...]] = collections.Counter()
"""How often each group has spoken: a key may be set once only. All its processes count alike."""


def spans(leaf: Any) -> bool:
    """Whether parts of an array lie where this process cannot read them."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return False  # of a traced array nobody knows yet
    return not leaf.is_fully_addressable


def on_host(leaf: Any) -> np.ndarray:
    """An array read whole; every process that holds a part of it must ask."""
    if not spans(leaf) or leaf.is_fully_replicated:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils  # here, as few need it

    return multihost_utils.process_allgather(leaf, tiled=True)


def check_here(tree: Any, argument: str) -> None:
    """Raise a ValueError naming the first leaf that spans processes: for what is done in one of them."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if spans(leaf):
            raise ValueError(
                f"`{argument}` must lie in one process, but {_tree.path_name(path)} spans several: bring it "
                f"into each, `jax.experimental.multihost_utils.process_allgather({argument}, tiled=True)`."
            )


def by_devices(function: Callable[[list[Any]], list[Any]], leaves: Sequence[Any]) -> list[Any]:
    """`function(leaves)`, called once for the leaves of each mesh: no program takes arrays of two."""
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(_mesh(leaf), []).append(i)
    found: dict[int, Any] = {}
    for at in groups.values():
        found |= zip(at, function([leaves[i] for i in at]), strict=True)
    return [found[i] for i in range(len(leaves))]


def _mesh(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    return (
        sharding.mesh if isinstance(sharding, NamedSharding) else sharding and frozenset(sharding.device_set)
    )


class Group(NamedTuple):
    """The processes that work on one thing together, each of them making the same calls.

    Attributes:
        members: their indices.
    """

    members: tuple[int, ...]

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that acts for all: it makes folders, takes locks and cleans up."""
        return jax.process_index() == self.members[0]

    def exchanged(self, word: str) -> list[str]:
        """The words of all, in their order; whoever asks waits for the last.

        Raises:
            TimeoutError: one of them says nothing.
        """
        if len(self.members) == 1:
            return [word]
        from jax._src import distributed  # jax shows its store of words nowhere else

        client: Any = distributed.global_state.client
        mine = jax.process_index()
        _COUNTS[self.members] += 1
        place, before = (f"hessjax/{self.members}/{_COUNTS[self.members] - back}" for back in (0, 1))
        client.key_value_set(f"{place}/{mine}", word)
        words = [self._heard(client, place, member) for member in self.members]
        # Whoever has spoken now has heard what was said before.
        client.key_value_delete(f"{before}/{mine}")
        return words

    @staticmethod
    def _heard(client: Any, place: str, member: int) -> str:
        try:
            return client.blocking_key_value_get(f"{place}/{member}", PATIENCE * 1000)
        except Exception as error:  # the kind of it differs between versions of jax
            raise TimeoutError(
                f"process {member} must take part in what process {jax.process_index()} does, but has said "
                f"nothing for {PATIENCE} s: do all processes make the same calls? ({error})"
            ) from error

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What `work` gives in the first process, JSON, in all of them; an OSError of it is raised in all."""
        found, caught = None, None
        if self.is_first:
            try:
                found = work()
            except OSError as error:
                caught = error
        failure = caught and ["busy" if isinstance(caught, BlockingIOError) else "", str(caught)]
        failure, found = json.loads(self.exchanged(json.dumps([failure, found]))[0])
        if caught is not None:
            raise caught
        if failure:
            raise (BlockingIOError if failure[0] else OSError)(failure[1])
        return found


def holders(tree: Any) -> Group:
    """The processes that hold the arrays of a tree; this one alone where none spans several."""
    spanning = [leaf for leaf in jax.tree.leaves(tree) if spans(leaf)]
    found = {device.process_index for leaf in spanning for device in leaf.sharding.device_set}
    return Group(tuple(sorted(found | {jax.process_index()})))
