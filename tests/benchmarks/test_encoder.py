"""The encoder of the transfer study against its formulas, on random weights: no download."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import encoder

WIDTH, HIDDEN, HEADS, WORDS, LENGTH = 8, 12, 2, 20, 6


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    shapes = {
        "attention.self.query": (WIDTH, WIDTH),
        "attention.self.key": (WIDTH, WIDTH),
        "attention.self.value": (WIDTH, WIDTH),
        "attention.output.dense": (WIDTH, WIDTH),
        "attention.output.LayerNorm": (WIDTH,),
        "intermediate.dense": (HIDDEN, WIDTH),
        "output.dense": (WIDTH, HIDDEN),
        "output.LayerNorm": (WIDTH,),
    }
    found = {
        "embeddings.word_embeddings.weight": normal(WORDS, WIDTH),
        "embeddings.position_embeddings.weight": normal(LENGTH, WIDTH),
        "embeddings.token_type_embeddings.weight": normal(2, WIDTH),
        "embeddings.LayerNorm.weight": normal(WIDTH),
        "embeddings.LayerNorm.bias": normal(WIDTH),
    }
    for name, shape in shapes.items():
        found[f"encoder.layer.0.{name}.weight"] = normal(*shape)
        found[f"encoder.layer.0.{name}.bias"] = normal(shape[0])
    return found


def norm(x, t, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return scaled * t[f"{name}.weight"] + t[f"{name}.bias"]


def reference(t, tokens):
    """One sentence without padding through BERT's first layer, head by head, in NumPy."""
    t = {name: x.astype(np.float64) for name, x in t.items()}
    x = t["embeddings.word_embeddings.weight"][tokens]
    x = x + t["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + t["embeddings.token_type_embeddings.weight"][0], t, "embeddings.LayerNorm")

    def linear(x, name):
        return x @ t[f"encoder.layer.0.{name}.weight"].T + t[f"encoder.layer.0.{name}.bias"]

    query, key, value = (linear(x, f"attention.self.{name}") for name in ("query", "key", "value"))
    heads, size = [], WIDTH // HEADS
    for part in (slice(i * size, (i + 1) * size) for i in range(HEADS)):
        scores = np.exp(query[:, part] @ key[:, part].T / np.sqrt(size))
        heads.append(scores / scores.sum(-1, keepdims=True) @ value[:, part])
    attended = linear(np.concatenate(heads, axis=-1), "attention.output.dense")
    x = norm(x + attended, t, "encoder.layer.0.attention.output.LayerNorm")
    wide = linear(x, "intermediate.dense")
    y = linear(wide * 0.5 * (1 + np.asarray(erf(wide / np.sqrt(2)))), "output.dense")
    return norm(x + y, t, "encoder.layer.0.output.LayerNorm").mean(0)


def test_one_layer_is_berts_and_padding_changes_nothing(tensors):
    embeddings, params = encoder.embeddings_of(tensors), encoder.params_of(tensors, 1)
    module = encoder.Encoder(1, HEADS, HIDDEN)
    sentences = [[3, 1, 4, 1, 5, 9], [2, 6, 5]]
    tokens = jnp.array([row + [0] * (LENGTH - len(row)) for row in sentences])
    found = module.apply({"params": params}, embeddings(tokens), tokens > 0)
    np.testing.assert_allclose(found, [reference(tensors, row) for row in sentences], rtol=2e-4, atol=2e-5)


def test_safetensors_gives_back_what_was_written():
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([7, 8]), "c": np.float32(2)}
    header, data, names = {"__metadata__": {"format": "pt"}}, b"", {"float32": "F32", "int64": "I64"}
    for name, x in arrays.items():
        end = len(data) + x.nbytes
        shape = list(np.shape(x))
        header[name] = {"dtype": names[str(x.dtype)], "shape": shape, "data_offsets": [len(data), end]}
        data += x.tobytes()
    head = json.dumps(header).encode()
    found = encoder.read_safetensors(len(head).to_bytes(8, "little") + head + data)
    assert set(found) == set(arrays)
    for name, x in arrays.items():
        np.testing.assert_array_equal(found[name], x)
