"""What the notebooks' studies make of their rows."""

import generated
import jax.numpy as jnp
import numpy as np
import pytest
from studies import batch_norm_claims as claims
from studies import small_samples

import hessjax as hj


def density(nodes, weights):
    nodes, weights = (jnp.asarray([x], jnp.float32) for x in (nodes, weights))
    return hj.SpectralDensity(nodes, weights, jnp.int32(1), jnp.int32(2), jnp.float32(100))


def test_the_distance_of_densities_is_what_has_to_move_over_the_mean_size():
    one, other = density([-1.0, 3.0], [0.5, 0.5]), density([-2.0, 3.0], [0.25, 0.75])
    # A quarter goes from −2 to −1, a quarter from 3 to −1: 5/4, over a mean of |λ| of 11/4.
    assert small_samples.distance(one, other) == pytest.approx(5 / 11)
    assert small_samples.distance(one, one) == 0


def test_the_samples_kept_are_all_there_and_the_truth_first():
    rows, settings = small_samples.read(), small_samples.Settings()
    assert [row["epoch"] for row in rows[:2]] == list(settings.epochs)
    assert all(row["repeat"] < 0 for row in rows[:2])
    found = {(row["repeat"], row["epoch"], row["size"]) for row in rows[2:]}
    assert len(found) == len(rows) - 2 == settings.repeats * len(settings.epochs) * len(settings.sizes)


def test_a_small_sample_is_measured_with_bars_and_put_to_others():
    draw = np.random.default_rng(0)
    data = draw.standard_normal((64, 5)).astype(np.float32), draw.integers(10, size=64)
    settings = small_samples.Settings((1,), num_batches=2, num_probes=2, num_lanczos=4, hidden=3)
    params = small_samples.train(data, settings)[1]
    row, vectors, _ = small_samples.measure(params, data, settings)
    assert min(row["trace_data"], row["top_data"]) > 0
    assert small_samples.held_out(params, vectors, data) == pytest.approx(row["top"], rel=1e-4)


def rows_of(traces, norms, shortcuts=True, depth=8, accuracy=1.0):
    """A row at the end of training for each seed."""
    base = {"depth": depth, "norms": norms, "shortcuts": shortcuts, "epoch": 9, "accuracy": accuracy}
    return [
        {**base, "seed": seed, "trace": [trace, 0.1], "ends": [trace / 2, -1], "loss": 0.1}
        for seed, trace in enumerate(traces)
    ]


def verdicts(rows):
    return {(x.claim.split(":")[0], x.where): x.verdict for x in claims.findings(rows)}


def test_a_claim_is_repeated_where_the_interval_over_the_seeds_is_on_its_side():
    base = rows_of([10.0, 12.0, 9.0], claims.ALL)
    flatter = rows_of([5.0, 6.0, 4.4], claims.NONE)
    assert verdicts(base + flatter)["Shallow without BatchNorm", "ResNet-8"] == "repeated"
    sharper = rows_of([20.0, 25.0, 17.0], claims.NONE)
    assert verdicts(base + sharper)["Shallow without BatchNorm", "ResNet-8"] == "not repeated"
    either = rows_of([5.0, 25.0, 9.0], claims.NONE)
    assert verdicts(base + either)["Shallow without BatchNorm", "ResNet-8"] == "undecided"


def test_the_interval_is_students_on_the_logarithms_of_ratios_seed_by_seed():
    pair = [10.0, 12.0, 9.0], [20.0, 18.0, 27.0]
    rows = rows_of(pair[0], claims.ALL) + rows_of(pair[1], claims.NONE)
    (found,) = (x for x in claims.findings(rows) if x.claim.startswith("Shallow"))
    logs = np.log(np.divide(*pair[::-1]))
    half = 4.3027 * logs.std(ddof=1) / 3**0.5
    expected = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
    np.testing.assert_allclose(found.trace[:3], expected, rtol=1e-3)


def test_a_network_that_has_learned_nothing_takes_no_part():
    rows = rows_of([10.0, 12.0, 9.0], claims.ALL) + rows_of([1.0, 1.0, 1.0], claims.NONE, accuracy=0.1)
    (found,) = (x for x in claims.findings(rows) if x.claim.startswith("Shallow"))
    assert found.verdict == "undecided"
    assert str(found.trace) == "does not learn"


def test_the_front_page_has_the_table_of_claims():
    table = [line for line in generated.claims().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + len(claims.findings(claims.read()))
    assert "{include} _generated/claims.md" in (generated.DOCS / "index.md").read_text()
