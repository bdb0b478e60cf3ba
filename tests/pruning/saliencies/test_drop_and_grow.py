"""Masks that move at a constant size, against a mask step written out in NumPy; and one that rests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(5)
RULES = {"set": lambda f: hj.saliencies.sparse_evolution(f, KEY), "rigl": hj.saliencies.rigl}
EVERYWHERE = lambda path, leaf: True


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (6, 5), "b_empty": (0, 2), "c_scalar": (), "d_half": (4, 6)}
    params = {k: jnp.asarray(rng.normal(size=shape), jnp.float32) for k, shape in shapes.items()}
    return params | {"d_half": params["d_half"].astype(jnp.bfloat16)}


def make_grads(t, like):
    rng = np.random.default_rng(100 + t)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like)


def train(tx, params, steps, jit=True):
    """The states before and after every update, and its gradient."""
    update, state = jax.jit(tx.update) if jit else tx.update, tx.init(params)
    for t in range(1, steps + 1):
        grads, before = make_grads(t, params), state
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield t, grads, before, state, params


def seen(weights, mask, grads=None, step=1):
    return hj.saliencies.Context(weights, mask, jnp.int32(step), grads)


def order(rule, context):
    """What is ranked at a mask step."""
    return rule.change.order(rule.scores((), context), context)


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def masks(state):
    return np.concatenate([np.asarray(m).ravel() for m in jax.tree.leaves(state.mask)])


def chances(t, size):
    return np.asarray(jax.random.uniform(jax.random.fold_in(KEY, t), (size,)), np.float64)


def test_what_comes_back_is_drawn_evenly():
    weights = {"a": jnp.ones((200, 100)), "b": jnp.ones((20_000,))}
    rule = hj.saliencies.sparse_evolution(0.5, KEY).change
    first, second = (rule.growth(seen(weights, None, step=t)) for t in (1, 2))
    columns = np.stack([np.ravel(x) for draw in (first, second) for x in jax.tree.leaves(draw)])
    counts = np.stack([np.histogram(x, 20, (0, 1))[0] for x in columns])
    assert abs(counts - 1000).max() < 5 * 31  # five standard deviations of a bin
    # No pair of leaves or steps, and no neighbours, go together.
    pairs = np.corrcoef(np.concatenate([columns[:, :-1], columns[:1, 1:]]))
    assert abs(pairs - np.eye(5)).max() < 0.04


def oracle(mask, worth, fresh, leaf, fraction, zeros):
    """The next mask, weight by weight: `zeros` in all, or by leaf."""
    rank = np.empty(mask.size, int)  # 3 stays, 2 comes back, 1 stays away, 0 has just gone
    for k in np.unique(leaf):
        kept, out = np.flatnonzero(mask & (leaf == k)), np.flatnonzero(~mask & (leaf == k))
        number = min(round(fraction * kept.size), out.size)
        rank[kept], rank[out] = 3, 1
        rank[kept[np.argsort(worth[kept], kind="stable")[:number]]] = 0
        rank[out[np.argsort(-fresh[out], kind="stable")[:number]]] = 2
    within = np.where((rank == 3) | (rank == 0), worth, fresh)
    order = np.lexsort((np.arange(mask.size), within, rank))
    result = np.ones(mask.size, bool)
    if np.ndim(zeros) == 0:
        result[order[:zeros]] = False
    else:
        for k, number in enumerate(zeros):
            result[order[leaf[order] == k][:number]] = False
    return result


@pytest.mark.parametrize(("rule", "allocation"), [("set", "global"), ("rigl", "global"), ("rigl", "uniform")])
def test_every_mask_step_is_the_oracle(rule, allocation):
    """At a constant sparsity, a rising and a falling one, and under a schedule of fractions."""
    fraction = lambda t: jnp.where(t < 8, 0.4, 0.15)
    levels = np.array([0.5, 0.5, 0.5, 0.6, 0.8, 0.8, 0.3], np.float32)
    schedule = lambda t: jnp.asarray(levels)[jnp.minimum(t // 2, 6)]
    chosen = {"uniform": hj.allocations.uniform(), "global": hj.allocations.global_threshold(floor=0)}[
        allocation
    ]
    tx = hj.prune(
        optax.sgd(0.3, momentum=0.5), RULES[rule](fraction), schedule, allocation=chosen, every=2, where="*"
    )
    params = make_params()
    leaf = np.repeat(np.arange(4), [x.size for x in jax.tree.leaves(params)])
    moved = []
    for t, grads, before, after, now in train(tx, params, 13):
        old, new = masks(before), masks(after)
        np.testing.assert_array_equal(flat(now) != 0, new)
        if t % 2:
            np.testing.assert_array_equal(new, old)
            continue
        level = float(levels[t // 2])
        zeros = round(level * old.size)
        if allocation == "uniform":
            zeros = [min(round(level * n), max(n - 1, 0)) for n in np.bincount(leaf, minlength=4)]
        worth, share = np.abs(flat(after.dense)), float(fraction(t))
        fresh = np.abs(flat(grads)) if rule == "rigl" else chances(t, old.size)
        expected = oracle(old, worth, fresh, leaf, share, zeros)
        np.testing.assert_array_equal(new, expected)
        assert (~new).sum() == np.sum(zeros)
        moved.append((new & ~old).sum())
        if level == levels[t // 2 - 1]:  # constant: as many of every leaf
            np.testing.assert_array_equal(np.bincount(leaf, old), np.bincount(leaf, new))
    assert min(moved[:2]) >= 8
    assert int(after.num_nan) == 0


@pytest.mark.parametrize("rule", RULES)
def test_the_first_mask_is_by_magnitude(rule):
    """With nothing masked, at step 0 and later, and whatever the gradients."""
    params, rule = make_params(), RULES[rule](0.5)
    full = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
    for grads in (None, make_grads(1, params)):
        found = order(rule, seen(params, full, grads))
        jax.tree.map(lambda x, w: np.testing.assert_array_equal(x, jnp.abs(w)), found, params)


@pytest.mark.parametrize("rule", RULES)
def test_jit_is_eager(rule):
    params, rule = make_params(), RULES[rule](0.3)
    mask = jax.tree.map(lambda x: jnp.abs(x) > 0.6, params)
    args = params, mask, make_grads(1, params)
    found = jax.jit(lambda *args: order(rule, seen(*args)))(*args)
    np.testing.assert_allclose(flat(found), flat(order(rule, seen(*args))), rtol=1e-6)


@pytest.mark.parametrize(
    ("fraction", "moves"), [(0, False), (1, True), (lambda t: -1.0, False), (lambda t: 7.0, True)]
)
def test_nothing_and_everything_is_replaced(fraction, moves):
    """As much as there are zeros: of 6 kept and 2 zeros no more than 2 may go."""
    params = {"a": jnp.array([[8.0, 7.0, 6.0, 5.0], [4.0, 3.0, 2.0, 1.0]])}
    for sparsity, kept in [(0.25, [1, 1, 1, 1, 0, 0, 1, 1]), (0.5, [0, 0, 0, 0, 1, 1, 1, 1])]:
        tx = hj.prune(optax.sgd(0.0), hj.saliencies.rigl(fraction), sparsity, every=1)
        ((_, _, before, after, _),) = train(tx, params, 1, jit=False)
        np.testing.assert_array_equal(masks(after), np.array(kept, bool) if moves else masks(before))


def test_what_comes_back_at_random_is_uniform():
    """Whatever the weight, and wherever it lies."""
    dense = {"a": jnp.linspace(1.0, 2.0, 12000).reshape(4, 3000)}
    mask = {"a": jnp.arange(12000).reshape(4, 3000) % 3 == 0}
    rule = hj.saliencies.sparse_evolution(0.5, KEY)
    scores = np.asarray(order(rule, seen(dense, mask))["a"]).ravel()
    back = (scores >= -1) & (scores < 0)
    assert back.sum() == 2000
    assert not back[::3].any()
    shares = back.reshape(8, 500, 3)[..., 1:].mean(axis=1)
    np.testing.assert_allclose(shares, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 500))


def test_the_key_decides_and_every_step_draws_anew():
    rule, same, other = (hj.saliencies.sparse_evolution(0.3, key) for key in (KEY, KEY, jax.random.key(6)))
    dense = make_params()
    mask = jax.tree.map(lambda x: jnp.abs(x) > 0.6, dense)
    scores = flat(order(rule, seen(dense, mask)))
    np.testing.assert_array_equal(scores, flat(order(same, seen(dense, mask))))
    assert not np.array_equal(scores, flat(order(other, seen(dense, mask))))
    assert not np.array_equal(scores, flat(order(rule, seen(dense, mask, step=2))))


def test_patterns_stay_and_move():
    """Rows by their mean |w| and gradient; two of every four by what the gradient is there."""
    rng = np.random.default_rng(1)
    params = {k: jnp.asarray(rng.normal(size=(8, 3)), jnp.float32) for k in ("four", "rows")}
    four = hj.patterns.n_of_m(2, 4)
    pattern, chosen = {"four": four, "rows": hj.patterns.rows()}, hj.allocations.uniform()
    tx = hj.prune(optax.sgd(0.3), hj.saliencies.rigl(0.3), 0.5, pattern=pattern, allocation=chosen, every=1)
    for _, grads, before, after, _ in train(tx, params, 3):
        trees = before.mask, after.mask, after.dense, grads
        old, new, worth, fresh = (np.asarray(x["rows"]) for x in trees)
        assert (new == new[:, :1]).all()
        means = abs(worth).mean(axis=1), abs(fresh).mean(axis=1)
        np.testing.assert_array_equal(new[:, 0], oracle(old[:, 0], *means, np.zeros(8, int), 0.3, 4))
        old, new, worth, fresh = (np.asarray(four.group(jnp.asarray(x["four"]))) for x in trees)
        gone = np.zeros(old.shape, bool)
        gone.flat[np.argsort(np.where(old, abs(worth), np.inf), axis=None)[:4]] = True
        order = np.argsort(np.where(old, np.inf, -abs(fresh)), axis=1)
        for group, went, first, found in zip(old, gone, order, new, strict=True):
            expected = group & ~went
            expected[first[: went.sum()]] = True
            np.testing.assert_array_equal(found, expected)


def test_gradients_that_are_not_numbers_are_counted_and_bring_nothing_back():
    dense = {"a": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    grads, mask = {"a": jnp.array([[0.0, 0.0, jnp.nan, 0.5]])}, {"a": jnp.array([[True, True, False, False]])}
    rule = hj.saliencies.rigl(0.5)
    scores = order(rule, seen(dense, mask, grads))["a"]
    np.testing.assert_allclose(scores, [[4.0, -3 + 0.375, jnp.nan, -0.5]])
    tx = hj.prune(optax.sgd(0.1), rule, 0.5, every=1)
    _, state = tx.update(grads, tx.init(dense), dense)
    assert int(state.num_nan) == 1
    assert state.mask["a"].tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("container", oracles.CONTAINERS)
def test_any_container(container):
    make = oracles.CONTAINERS[container]
    params = make(oracles.leaves())
    rules = [
        hj.saliencies.static(make(oracles.leaves(1))),
        hj.saliencies.sparse_evolution(0.4, KEY),
        hj.saliencies.rigl(0.4),
    ]
    for rule in rules:
        tx = hj.prune(optax.sgd(0.1), rule, 0.5, every=1, where=EVERYWHERE)
        *_, (*_, found) = train(tx, params, 2, jit=False)
        assert int((flat(found) == 0).sum()) == 5
        assert jax.tree.structure(found) == jax.tree.structure(params)


@pytest.mark.parametrize("rule", [*RULES, "static"])
def test_no_array_stands_twice(rule):
    """So that a loop may donate params, gradients and state."""
    given = make_params()
    tx = hj.prune(optax.sgd(0.1), hj.saliencies.static(given) if rule == "static" else RULES[rule](0.5), 0.5)
    params, grads, state = make_params(), make_grads(1, given), tx.init(given)
    _, state = tx.update(grads, state, params)
    held = [x for x in jax.tree.leaves((given, params, grads, state)) if x.size]
    assert len({x.unsafe_buffer_pointer() for x in held}) == len(held)


def test_memory_beside_that_of_magnitude():
    params = {"w": jnp.ones((8, 4), jnp.bfloat16), "bias": jnp.ones(4)}

    def held(rule):
        state = jax.eval_shape(hj.prune(optax.sgd(0.1), rule, 0.5).init, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    base = held(hj.saliencies.magnitude())
    assert held(hj.saliencies.static({"w": jnp.ones((8, 4), bool)})) == base + 32
    assert held(RULES["set"](0.5)) == base
    assert held(hj.saliencies.rigl(0.5)) == base


# -- other scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda s: hj.saliencies.sparse_evolution(0.4, KEY, score=s),
                                  lambda s: hj.saliencies.rigl(0.4, score=s)], ids=RULES)  # fmt: skip
def test_drop_and_grow_by_any_score(make):
    """By movement, whose scores have both signs: the mask steps are those of the oracle."""
    score = hj.saliencies.movement(optax.sgd(1.0), start=hj.saliencies.from_magnitudes)
    tx = hj.prune(optax.sgd(0.1), make(score), 0.5, allocation=hj.allocations.uniform(), every=2)
    params = {"a": make_params()["a"]}
    leaf = np.zeros(30, int)
    for t, grads, before, after, _ in train(tx, params, 8):
        if t % 2 == 0:
            worth = flat(after.saliency.scores)
            fresh = np.abs(flat(grads)) if "rigl" in repr(make(score)) else chances(t, 30)
            np.testing.assert_array_equal(masks(after), oracle(masks(before), worth, fresh, leaf, 0.4, 15))
    assert (worth < 0).any()


@pytest.mark.parametrize("score", [hj.saliencies.obs(num_grads=4), hj.saliencies.gradient()])
def test_what_the_score_says_of_itself_holds(score):
    rule = hj.saliencies.rigl(0.3, score=score)
    assert (rule.needs_grads, rule.compensates) == (score.needs_grads, score.compensates)
    tx = hj.prune(optax.sgd(0.1), rule, 0.5, where="a", start=1, every=1)
    states = list(train(tx, make_params(), 3, jit=False))
    assert [int((now["a"] == 0).sum()) for *_, now in states] == [15] * 3
    assert (states[-1][3].predicted_increase is None) != score.compensates


def test_gates_and_moves_go_with_drop_and_grow():
    gated = hj.saliencies.hard_concrete(1.0, KEY, stop=3)
    rule = hj.saliencies.rigl(0.3, score=gated)
    assert rule.gated
    both = hj.saliencies.compensated(hj.saliencies.rigl(0.3), by=hj.saliencies.obs(num_grads=4))
    assert both.change == hj.saliencies.rigl(0.3).change
    tx = hj.prune(optax.sgd(0.1), rule, 0.5, where="a", start=3, every=1)
    *_, (*_, after, now) = train(tx, make_params(), 4, jit=False)
    np.testing.assert_array_equal(after.mask["a"] & (after.saliency.open["a"] != 0), now["a"] != 0)


# -- static ---------------------------------------------------------------------------------------


def test_a_mask_found_elsewhere_never_changes():
    """A lottery ticket: the mask of one training on the weights another begins with."""
    params = make_params()
    state = hj.prune(optax.sgd(0.5), hj.saliencies.magnitude(), 0.6).init(make_params(1))
    ticket = hj.mask_of(state)
    tx = hj.prune(optax.sgd(0.5, momentum=0.9), hj.saliencies.static(ticket), 0.6, every=1)
    for *_, after, now in train(tx, params, 4):
        np.testing.assert_array_equal(masks(after), masks(state))
        np.testing.assert_array_equal(now["a"] != 0, ticket["a"])


def test_numbers_rank_whatever_the_weights():
    ranks = {"w": np.array([[3, 1, 2, 4]]), "not pruned": "ignored"}
    for sparsity, kept in [(0.25, [1, 0, 1, 1]), (0.75, [0, 0, 0, 1])]:
        found = hj.prune_once({"w": jnp.array([[1.0, 9.0, 8.0, 7.0]])}, hj.saliencies.static(ranks), sparsity)
        np.testing.assert_array_equal(found.mask["w"][0], kept)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ({"w": jnp.ones(3)}, ValueError, r"w: shape \(3,\), must be \(2, 2\)"),
        ({"v": jnp.ones((2, 2))}, ValueError, "`scores` must have the structure.*\n  w: missing"),
        ({"w": jnp.ones((2, 2), complex)}, TypeError, r"`scores` must be real, got complex64\[2, 2\]"),
    ],
)
def test_scores_that_do_not_fit(scores, error, message):
    params = {"w": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    with pytest.raises(error, match=message):
        hj.prune(optax.sgd(0.1), hj.saliencies.static(scores), 0.5).init(params)


@pytest.mark.parametrize("fraction", [-0.1, 30, float("nan")])
@pytest.mark.parametrize("rule", RULES)
def test_fraction_outside_its_range(rule, fraction):
    with pytest.raises(ValueError, match=r"`fraction` must be in \[0, 1\]"):
        RULES[rule](fraction)


@pytest.mark.parametrize("key", [0, jax.random.PRNGKey(0), jax.random.split(jax.random.key(0))])
def test_what_is_no_key(key):
    with pytest.raises(TypeError, match="`key` must be one random key"):
        hj.saliencies.sparse_evolution(0.3, key)
