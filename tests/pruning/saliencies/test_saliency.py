"""The contract of scores."""

import jax.numpy as jnp
import optax

import hessjax as hj


def test_magnitude_scores_selected_leaves_only():
    rule = hj.saliencies.magnitude()
    dense = {"a": jnp.array([[-2.0, 1.0]]), "b": optax.MaskedNode()}
    state = rule.init(dense)
    state = rule.update(state, dense, dense, None, loss=1.0)
    scores = rule.scores(state, dense, loss=1.0)
    assert scores["a"].tolist() == [[2.0, 1.0]]
    assert scores["b"] == optax.MaskedNode()


def test_magnitude_keeps_the_dtype():
    assert (
        hj.saliencies.magnitude().scores((), {"a": jnp.ones((1, 1), jnp.bfloat16)})["a"].dtype == jnp.bfloat16
    )
