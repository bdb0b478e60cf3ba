"""What are the peers asked? Trained networks with their data and the truth, in one file that all can read."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class Problem(NamedTuple):
    """One question's numbers, nothing of a framework in them.

    Attributes:
        kind: the network, a key of `in_jax.MODULES` and `in_torch.TWINS`; or what else the numbers are.
        options: what the network is made with.
        arrays: `params/...`, `state/...`, `vector/...` by the path of the leaf, as Flax has it; `x`, `y`;
            what is known of the answer as `truth/...`.
        cuts: where the data is cut into batches.
    """

    kind: str
    options: dict[str, Any]
    arrays: Arrays
    cuts: list[int]

    def tree(self, name: str) -> dict[str, Any]:
        """The nested dictionaries of arrays under a name."""
        nested: dict[str, Any] = {}
        for path, array in self.part(name).items():
            *folders, leaf = path.split("/")
            place = nested
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = array
        return nested

    def part(self, name: str) -> Arrays:
        """The arrays whose path begins with the name, by the rest of it."""
        return {k.removeprefix(f"{name}/"): a for k, a in self.arrays.items() if k.startswith(f"{name}/")}

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The data as a loader gives it."""
        ends = [*self.cuts, len(self.arrays["x"])]
        for start, end in zip([0, *self.cuts], ends, strict=True):
            yield self.arrays["x"][start:end], self.arrays["y"][start:end]


def write(path: Path, problem: Problem) -> None:
    head = json.dumps([problem.kind, problem.options, problem.cuts])
    np.savez(path, head=np.array(head), **problem.arrays)


def read(path: Path) -> Problem:
    with np.load(path) as stored:
        kind, options, cuts = json.loads(str(stored["head"]))
        return Problem(kind, options, {name: stored[name] for name in stored.files if name != "head"}, cuts)


def digits_in_conv_net(quick: bool) -> Problem:
    """A small convolutional net with BatchNorm, trained; 1030 digits in ragged batches, the last one of 6."""
    from peers import in_jax

    channels, examples = ((4, 8), 134) if quick else ((8, 12), 1030)
    cuts = list(range(128 if quick else 256, examples, 128 if quick else 256))
    problem = in_jax.trained_conv_net(channels, examples, steps=60 if quick else 300)
    problem = problem._replace(cuts=cuts)
    spectrum = in_jax.all_eigenvalues(problem)
    truth = {"truth/spectrum": spectrum, "truth/top": spectrum[::-1][:20], "truth/trace": spectrum.sum()}
    return _with(problem, truth)


def digits_in_mlp(quick: bool) -> Problem:
    """64-256-256-10 after 60 steps of Adam on all digits of scikit-learn, which are one batch."""
    from peers import in_jax

    problem = in_jax.trained_mlp((16,) if quick else (256, 256), steps=60)
    truth = {"truth/top": in_jax.largest_eigenvalues(problem, 12), "truth/trace": in_jax.exact_trace(problem)}
    return _with(problem, truth)


def digits_in_deep_mlp(quick: bool) -> Problem:
    """Eight hidden layers of 64 after 120 steps of Adam on all digits of scikit-learn, one batch."""
    from peers import in_jax

    problem = in_jax.trained_mlp((16, 16) if quick else (64,) * 8, steps=30 if quick else 120)
    traces = in_jax.exact_traces(problem)
    return _with(problem, {"truth/layers": [x for path, x in traces.items() if path.endswith("kernel")]})


def digits_to_prune(quick: bool) -> Problem:
    """64-40-20-10 without biases, trained on 1437 digits from three seeds; the other 360 to test on."""
    import one_shot_pruning

    seeds, options = (1, QUICK_TO_PRUNE) if quick else (3, TO_PRUNE)
    nets = [one_shot_pruning.trained(seed, 5 if quick else 80) for seed in range(seeds)]
    named = {f"net/{seed}/{i}": kernel for seed, net in enumerate(nets) for i, kernel in enumerate(net)}
    named |= {
        f"{name}/{what}": array
        for name, data in zip(("train", "test"), one_shot_pruning.data(), strict=True)
        for what, array in zip("xy", data, strict=True)
    }
    return Problem("digits to prune", options, {name: np.asarray(array) for name, array in named.items()}, [])


SPARSITY, EVERY = 0.9, {"between": 1000, "mask step": 1}
"""Of a training loop that prunes, and how many steps lie between two masks."""

TO_PRUNE = {"sparsities": [0.8, 0.9, 0.95], "grads": 400, "damping": 1e-5, "recomputes": 10}
QUICK_TO_PRUNE = {**TO_PRUNE, "sparsities": [0.8], "grads": 32, "recomputes": 2}


def mlp(quick: bool) -> Problem:
    """784-1024-1024-10 on 512 images, 1.9 million weights."""
    return _untrained("MLP", quick)


def encoder(quick: bool) -> Problem:
    """6 layers × 384 wide on 16 sentences of 32 tokens, 12.6 million weights."""
    return _untrained("encoder", quick)


def resnet(quick: bool) -> Problem:
    """ResNet-20 with BatchNorm on 128 images of CIFAR's shape, 0.27 million weights."""
    return _untrained("ResNet", quick)


def spectra(quick: bool) -> Problem:
    """The XTrace paper's six problems: matrices of known trace (arXiv 2301.07825, section 4)."""
    from trace_accuracy import spectra as eigenvalues

    d = 100 if quick else 1000
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))
    found = eigenvalues(d)
    matrices = {f"matrix/{name}": (rotation * values) @ rotation.T for name, values in found.items()}
    return Problem("spectra", {}, matrices, [])


def gradients(quick: bool) -> Problem:
    """Gradients of weights in blocks, for an inverse Fisher."""
    blocks, width, count = (2, 32, 64) if quick else (64, 512, 1024)
    rows = np.random.default_rng(0).standard_normal((count, blocks * width), np.float32)
    return Problem(
        "gradients", {"block_size": width, "damping": 1e-7}, {"grads": np.float32(1e-3) * rows}, []
    )


PACKAGES = [
    "jax",
    "torch",
    "PyHessian",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
    "matfree",
    "traceax",
    "torch-pruning",
]

MAKERS: dict[str, Callable[[bool], Problem]] = {
    maker.__name__: maker
    for maker in (
        digits_in_conv_net,
        digits_in_mlp,
        digits_in_deep_mlp,
        digits_to_prune,
        mlp,
        encoder,
        resnet,
        spectra,
        gradients,
    )
}


def _untrained(kind: str, quick: bool) -> Problem:
    from peers import in_jax

    problem = in_jax.untrained(kind, quick)
    size = len(problem.arrays["x"])
    return problem._replace(cuts=[size // 4 * i for i in (1, 2, 3)])


def _with(problem: Problem, truth: dict[str, Any]) -> Problem:
    return problem._replace(arrays={**problem.arrays, **{k: np.asarray(v) for k, v in truth.items()}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MAKERS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    write(given.path, MAKERS[given.name](given.quick))
