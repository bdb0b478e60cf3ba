import jax
import jax.numpy as jnp
import pytest

import hessjax as hj

A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 11.0))


def test_the_bar_shows_products_error_and_goal(capsys):
    bar = hj.progress_bar("the trace")
    hj.trace(
        jax.tree_util.Partial(jnp.roll, shift=1),
        jax.random.key(0),
        jnp.zeros(9),
        20,
        tol=0.1,
        callbacks=[bar],
    )
    shown = capsys.readouterr().out
    assert "the trace" in shown
    assert "20/20 products" in shown
    assert "(goal 0.1)" in shown


def test_the_description_is_shown_as_it_is(capsys):
    bar = hj.progress_bar("trace [of a] [/b]", unit="products [c]")
    hj.trace(A, jax.random.key(0), jnp.zeros(10), 2, callbacks=[bar])
    shown = capsys.readouterr().out
    assert "trace [of a] [/b]" in shown
    assert "products [c]" in shown


def test_one_bar_serves_several_runs_and_an_early_stop_fills_it(capsys):
    bar = hj.progress_bar()
    for _ in range(2):
        hj.trace(A, jax.random.key(0), jnp.zeros(10), 100, tol=1.0, callbacks=[bar])
    assert capsys.readouterr().out.count("20/20 products") == 2


def test_the_bar_stops_when_the_run_fails():
    bar = hj.progress_bar()
    with pytest.raises(hj.NonFiniteProductError):
        hj.trace(lambda v: v * jnp.nan, jax.random.key(0), jnp.zeros(10), 9, callbacks=[bar])
    hj.trace(A, jax.random.key(0), jnp.zeros(10), 2, callbacks=[bar])
