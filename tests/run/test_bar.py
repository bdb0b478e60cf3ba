"""The progress bar: what it shows, in which width, and that it ends whatever happens."""

import io

import jax
import jax.numpy as jnp
import pytest
import rich
from rich.cells import cell_len

import hessjax as hj

A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 11.0))


def run(bar, **options):
    return hj.trace(A, jax.random.key(0), jnp.zeros(10), 20, callbacks=[bar], **options)


@pytest.fixture
def console():
    """The console that bars are drawn on, to be set up by a test, and as it was afterwards."""
    kept = vars(rich.get_console()).copy()
    yield rich.reconfigure
    vars(rich.get_console()).update(kept)


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


@pytest.mark.parametrize("width", [16, 25, 40, 60, 80, 200])
@pytest.mark.parametrize("description", ["t", "a long description of the run", "層の曲率"])
def test_numbers_are_whole_in_any_width(width, description, console):
    console(file=(out := io.StringIO()), width=width)
    run(hj.progress_bar(description), tol=1e-9)
    (line,) = out.getvalue().splitlines()
    assert cell_len(line) <= width
    assert "20/20" in line.split()
    assert line.startswith(description[:1])
    assert ("(goal 1e-09)" in line) == (width >= 60)


def test_a_stream_in_ascii(console):
    raw = io.BytesIO()
    console(file=(out := io.TextIOWrapper(raw, encoding="ascii")), width=80)
    run(hj.progress_bar("層", unit="Прод."))
    out.flush()
    assert b"\\u5c64" in raw.getvalue()
    assert b"20/20 \\u041f" in raw.getvalue()


def test_a_run_within_a_run_with_the_same_bar(console):
    console(file=(out := io.StringIO()), width=80)
    bar = hj.progress_bar("both")

    def metric(params):
        return run(bar).mean

    hj.sensitivity(metric, {"w": jnp.ones((2, 2))}, [0.25, 0.5], callbacks=[bar])
    (line,) = out.getvalue().splitlines()
    assert "2/2" in line.split()


def test_a_bar_within_another_display(console):
    console(file=(out := io.StringIO()), width=80)
    for _ in rich.progress.track(range(2), "epochs"):
        run(hj.progress_bar("trace"))
    assert out.getvalue().count("20/20 products") == 2
    assert "epochs" in out.getvalue()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_the_cursor_is_back_after_an_interruption(error, console):
    console(file=(out := io.StringIO()), width=80, force_terminal=True)

    def interrupted(progress):
        raise error

    with pytest.raises(error):
        hj.trace(A, jax.random.key(0), jnp.zeros(10), 20, callbacks=[hj.progress_bar(), interrupted])
    text = out.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize("streams", [True, False])
def test_the_landscape_of_a_stream_of_unknown_length(streams, console):
    console(file=(out := io.StringIO()), width=50)
    batches = [jnp.ones(3), jnp.ones(3)]

    class Stream:
        def __iter__(self):
            return iter(batches)

    def loss_fn(w, x):
        return jnp.mean(x * w) ** 2

    hj.landscape(
        loss_fn, jnp.ones(3), batches=Stream() if streams else batches, directions=jnp.ones(3), progress=True
    )
    assert f"{'102/?' if streams else '102/102'} evaluations" in " ".join(out.getvalue().split())
