"""The README's table: for each question, the fastest right answer of each peer over our fastest right one."""

from typing import Any

from peers.report import NAMES, Row, grid

QUESTIONS = {
    "digits_in_conv_net: top-10": "ten largest eigenvalues, small conv net, ragged batches",
    "digits_in_mlp: top-10": "the same, MLP of 85 thousand weights",
    "digits_in_conv_net: trace": "trace to 5 %, conv net",
    "digits_in_deep_mlp: layer traces": "traces of all nine layers to 10 %, MLP",
    "digits_in_conv_net: density": "spectral density as near to the true one, conv net",
    "mlp: Hessian, batches": "Hessian product over batches, MLP of 1.9 million",
    "encoder: Hessian, batches": "the same, encoder of 12.6 million",
    "resnet: Hessian, batches": "the same, ResNet-20",
    "encoder: Gauss–Newton": "Gauss–Newton product, encoder",
    "digits_in_conv_net: factors, exact": "K-FAC's factors, conv net",
    "inverse Fisher: build": "inverse Fisher in blocks of 512, 1024 gradients",
    "mlp: mask step": "training step with new masks, MLP of 1.9 million",
    "compact: after": "ResNet-20 forward, half of the blocks' channels cut",
    "start: first eigenvalue": "from the interpreter's start to the first eigenvalue",
}
PEERS = ("pyhessian", "curvlinops", "eigenthings", "matfree", "traceax")
OTHERS = {"torch": "PyTorch by hand", "jax": "JAX by hand", "torch_pruning": "torch-pruning"}
"""Of these the last column has what there is."""


def markdown(result: dict[str, Any]) -> str:
    """Questions down, peers across: above one we are faster; a number in bold says where we lose."""
    rows = [line for section in result["sections"].values() for line in section]
    lines = []
    for question, words in QUESTIONS.items():
        found = {peer: [x for x in rows if (x["question"], x["peer"]) == (question, peer)] for peer in NAMES}
        if ours := best(found["hessjax"]):
            cells = {peer: cell(found[peer], ours) for peer in NAMES}
            others = ", ".join(f"{name} {cells[peer]}" for peer, name in OTHERS.items() if cells[peer])
            lines.append([words, *(cells[peer] for peer in PEERS), others])
    return grid(["time of the peer over ours", *(NAMES[peer] for peer in PEERS), "others"], lines)


def cell(rows: list[Row], ours: float) -> str:
    """Of one peer: the ratio, or how far off it was if never right; nothing where it has no such thing."""
    theirs = best(rows)
    if theirs is None:
        errors = [line["error"] for line in rows if "error" in line]
        return f"off by {100 * min(errors):.2g} %" if errors else ""
    ratio = theirs / ours
    words = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
    return words if ratio >= 1 else f"**{words}**"


def best(rows: list[Row]) -> float | None:
    """Seconds of the fastest right answer; a slow one that was asked only once counts with that."""
    times = [line.get("later", line.get("first")) for line in rows if line.get("right", True)]
    return min((seconds for seconds in times if seconds is not None), default=None)
