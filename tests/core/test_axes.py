"""Which axes mean what, in the layouts that people bring."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hessjax._core._axes import layers_of, stacked
from hessjax._core._layout import kernels, selected, tree_axes

S = jax.ShapeDtypeStruct


def shapes(tree):
    """A tree of shapes as arrays without numbers."""
    return jax.tree.map(lambda s: S(s, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple))


def read(tree, **words):
    return {found.path: found for found in tree_axes(tree, **words)}


def linear(ins, outs):
    return {"kernel": (ins, outs), "bias": (outs,)}


ATTENTION = {
    **{name: {"kernel": (8, 4, 2), "bias": (4, 2)} for name in ("query", "key", "value")},
    "out": {"kernel": (4, 2, 8), "bias": (8,)},
}
BLOCK = {
    "LayerNorm_0": {"scale": (8,), "bias": (8,)},
    "attn": ATTENTION,
    "Dense_0": linear(8, 16),
    "Dense_1": linear(16, 8),
}


def each(names, module):
    """The same under every name."""
    return dict.fromkeys(names, module)


def put(n, tree):
    """Every leaf stacked n times."""
    return jax.tree.map(lambda s: (n, *s), tree, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize(
    ("module", "kind", "spatial", "inputs", "outputs"),
    [
        ({"kernel": (6, 4)}, "kernel", (), (0,), (1,)),
        ({"kernel": (3, 5, 6, 4)}, "kernel", (0, 1), (2,), (3,)),
        ({"kernel": (3, 6, 4), "bias": (4,)}, "kernel", (0,), (1,), (2,)),
        ({"kernel": (3, 3, 4, 6), "bias": (4,)}, "kernel", (0, 1), (3,), (2,)),  # transpose_kernel
        ({"kernel": (6, 4, 2), "bias": (4, 2)}, "kernel", (), (0,), (1, 2)),  # DenseGeneral
        ({"weight": (4, 6)}, "kernel", (), (1,), (0,)),  # Equinox, PyTorch
        ({"weight": (4, 6, 3, 3), "bias": (4, 1, 1)}, "kernel", (2, 3), (1,), (0,)),
        ({"weight": (6, 4), "bias": (4,)}, "kernel", (), (0,), (1,)),  # the bias says otherwise
        ({"weight": (6, 4, 3, 3), "bias": (4,)}, "kernel", (2, 3), (0,), (1,)),  # PyTorch's ConvTranspose
        ({"weight": (6, 4, 3), "bias": (4,)}, "kernel", (2,), (0,), (1,)),
        ({"weight_ih": (12, 6), "bias_ih": (12,)}, "kernel", (), (1,), (0,)),  # cells
        ({"weight_hh_l0_reverse": (12, 12), "bias_hh_l0_reverse": (12,)}, "kernel", (), (1,), (0,)),
        ({"w": (6, 4), "b": (4,)}, "kernel", (), (0,), (1,)),
        ({"embedding": (9, 4)}, "embedding", (), (0,), (1,)),
        ({"scale": (4,)}, "vector", (), (), (0,)),
        ({"scale": (1, 1, 1, 4), "offset": (1, 1, 1, 4)}, "vector", (), (), (0, 1, 2, 3)),  # Haiku
        ({"pos_embedding": (1, 9, 4)}, "embedding", (0,), (1,), (2,)),
        ({"cls": (1, 1, 4)}, "vector", (), (), (0, 1, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_one_module(module, kind, spatial, inputs, outputs):
    """Alone, and stacked once and twice, each layer is read as if it stood alone."""
    name = next(iter(module))
    found = read(shapes({"m": module}))[f"m/{name}"]
    assert (found.kind, found.stack) == (kind, ())
    assert (found.spatial, found.input, found.output) == (spatial, inputs, outputs)
    if kind == "kernel" and set(module) & {"bias", "b"}:
        for n, tree in enumerate((put(5, module), put(2, put(5, module))), start=1):
            again = read(shapes({"m": tree}))[f"m/{name}"]
            assert (again.stack, again.layer) == (tuple(range(n)), found.layer)
            assert (again.spatial, again.input, again.output) == (spatial, inputs, outputs)


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: put(3, t), lambda t: put(8, t), lambda t: put(2, put(3, t))]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_scanned_block_beside_what_is_not(wrap, bias):
    tree = {
        "blocks": wrap(BLOCK),
        "embed": {"embedding": (8, 8)},
        "final": {"scale": (8,)},
        "head": linear(8, 8),
    }
    tree = {k: v for k, v in read(shapes(tree)).items() if bias or not k.endswith("bias")}
    alone = read(shapes(BLOCK))
    depth = len(tree["blocks/Dense_0/kernel"].shape) - 2
    for path, found in alone.items():
        if path in tree:
            again = tree[f"blocks/{path}"]
            assert again.stack == tuple(range(depth)), path
            assert again[3:7] == found[3:7], path
            attention = found.attention and found.attention._replace(root="blocks/attn")
            assert again.attention == attention
    assert all(not found.stack for path, found in tree.items() if not path.startswith("blocks"))


@pytest.mark.parametrize(
    ("tree", "depth"),
    [
        ({"norm": {"scale": (4, 8)}, "dense": {"kernel": (4, 8, 8)}}, 1),
        ({"up_proj": {"kernel": (4, 8, 32)}, "down_proj": {"kernel": (4, 32, 8)}}, 1),
        ({"norm": {"weight": (4, 8)}, "mlp": {"weight": (4, 32, 8)}}, 1),
        ({"w": (4, 8, 8), "b": (4, 8), "gain": (4, 8)}, 1),
        ({"norm": {"scale": (4, 8)}, "experts": {"wi": (4, 2, 8, 8)}}, (1, 2)),
        ({"a": (4, 8, 8)}, 1),  # by no other name: matrices side by side
        ({"kernel": (4, 8, 8)}, 0),  # a convolution of one dimension
        ({"conv1": (4, 8, 8)}, 0),
        ({"conv": {"kernel": (4, 8, 8)}, "norm": {"scale": (8,)}}, 0),
        ({"experts": {"wi": {"kernel": (4, 8, 16)}, "wo": {"kernel": (4, 16, 8)}}}, 1),
        ({"0": {"weight": (4, 8), "bias": (4, 8)}, "1": {"weight": (4, 6, 8)}}, 1),  # PyTorch's Sequential
        (each(("base_layer", "lora_A"), {"weight": (4, 8, 8)}), 1),
        ({"norm": {"weight": (4, 8)}, "normal_head": {"weight": (4, 8, 8)}}, 1),
        ({"w": (3, 3, 8, 8)}, 0),
        (each(("q", "k", "v", "o"), {"kernel": (4, 8, 8)}), 1),
        ({**each(("query", "key", "value"), {"kernel": (8, 4, 8)}), "out": {"kernel": (4, 8, 8)}}, 0),
    ],
    ids=str,
)  # fmt: skip
def test_stacks_without_biases(tree, depth):
    for found in tree_axes(shapes(tree)):
        # A norm's scale, or a bias, of one axis has no say.
        if len(found.shape) > 2 or depth:
            wanted = depth if isinstance(depth, int) else depth["experts" in found.path]
            assert len(found.stack) == wanted, found
    if "gain" in tree:
        assert read(shapes(tree))["gain"].kind == "vector"


def init(module, *inputs):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]


@pytest.mark.parametrize(
    ("module", "name", "axes"),
    [
        ({"conv2_d_transpose": {"w": (3, 3, 8, 8), "b": (8,)}}, "w", ((0, 1), (3,), (2,))),  # Haiku's
        ({"conv2_d_transpose": {"w": (3, 3, 4, 8)}}, "w", ((0, 1), (3,), (2,))),
        ({"conv2_d": {"w": (3, 3, 8, 8), "b": (8,)}}, "w", ((0, 1), (2,), (3,))),
    ],
)
def test_a_module_that_says_what_its_shape_does_not(module, name, axes):
    (path,) = module
    found = read(shapes(module))[f"{path}/{name}"]
    assert (found.spatial, found.input, found.output) == axes


def test_a_router_beside_stacked_experts():
    """It shares the stack of the layers, not that of the experts."""
    tree = {"router": {"kernel": (6, 8, 4)}, "up": {"kernel": (6, 4, 8, 16), "bias": (6, 4, 16)}}
    for name in ("router", "choose"):
        found = read(shapes({"moe": {name: tree["router"], "up": tree["up"]}}))
        assert found[f"moe/{name}/kernel"].stack == (0,)
        assert found["moe/up/kernel"].stack == (0, 1)


def test_keys_and_values_in_one():
    tree = {
        "attn": {"q": {"kernel": (8, 4, 3)}, "kv": {"kernel": (8, 2, 2, 3)}, "out": {"kernel": (4, 3, 8)}}
    }
    found = read(shapes(tree))["attn/kv/kernel"]
    assert (found.input, found.output, found.attention.head) == ((0,), (1, 2, 3), 2)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.RMSNorm()(x))
        return x + nn.Dense(6, use_bias=False)(nn.Dense(12, use_bias=False)(nn.LayerNorm()(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=6)
        x, _ = scanned()(nn.Embed(6, 6)(x), None)
        return nn.Dense(6)(nn.LayerNorm()(x))


def test_linen_scan():
    """Even with as many layers as features."""
    found = read(init(Stack(), jnp.zeros((1, 6), int)))
    alone = read(init(Block(), jnp.zeros((1, 6, 6)), None))
    for path, one in alone.items():
        again = found[f"ScanBlock_0/{path}"]
        assert (again.stack, again.layer, again.kind) == ((0,), one.shape, one.kind)
        assert again[3:6] == one[3:6]
    assert not any(one.stack for path, one in found.items() if not path.startswith("Scan"))


class Dressed(nn.Module):
    """A block with all that a transformer has."""

    bias: bool = True
    has_norm: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        normed = nn.LayerNorm()(x) if self.has_norm else x
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=self.bias, normalize_qk=self.bias)(normed)
        x = nn.Conv(6, (3,), use_bias=self.bias)(x)
        return x + nn.Dense(6, use_bias=self.bias)(nn.Dense(12, use_bias=self.bias)(x)), None


class Framed(nn.Module):
    """A stack of them along some axis, between what is not stacked."""

    block: nn.Module
    axis: int

    @nn.compact
    def __call__(self, x):
        stack = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        x = nn.Embed(9, 6)(x)
        x, _ = nn.scan(nn.remat(type(self.block)), **stack, length=4)(
            self.block.bias, self.block.has_norm, name="stack"
        )(x, None)
        return nn.Dense(6)(nn.LayerNorm()(x))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("block", [Dressed(), Dressed(bias=False), Dressed(has_norm=False)], ids=str)
def test_a_stack_along_another_axis(axis, block):
    """As `variable_axes={"params": 1}` makes it: each layer is read as it is alone."""
    found = read(init(Framed(block, axis), jnp.zeros((1, 5), int)))
    for path, alone in read(init(block, jnp.zeros((1, 5, 6)))).items():
        again = found[f"stack/{path}"]
        assert again.stack == (axis % len(again.shape),), path
        assert (again.layer, again.kind) == (alone.shape, alone.kind)
        assert again[3:6] == alone[3:6], path
        if alone.attention is not None:
            assert again.attention[1:] == alone.attention[1:]
    assert not any(one.stack for path, one in found.items() if not path.startswith("stack"))


def test_users_word_counts_where_the_stack_is_found_too():
    tree = {"norm": {"scale": (8, 3)}, "fc": {"kernel": (8, 6, 3), "bias": (6, 3)}}
    assert {found.stack for found in tree_axes(shapes(tree))} == {(1,), (2,)}
    found = read(shapes(tree), axes={"fc/kernel": "in head entry"})
    assert (found["fc/kernel"].stack, found["fc/kernel"].output) == ((), (1, 2))


def test_nnx_vmap():
    make = nnx.vmap(lambda key: nnx.MultiHeadAttention(2, 6, 6, decode=False, rngs=nnx.Rngs(key)))
    state = jax.eval_shape(lambda: nnx.state(make(jax.random.split(jax.random.key(0), 3)), nnx.Param))
    one = jax.eval_shape(
        lambda: nnx.state(nnx.MultiHeadAttention(2, 6, 6, decode=False, rngs=nnx.Rngs(0)), nnx.Param)
    )
    for found, alone in zip(tree_axes(state), tree_axes(one), strict=True):
        assert (found.stack, found.layer, found[3:]) == ((0,), alone.shape, alone[3:])


def by_role(tree):
    found = {}
    for one in tree_axes(shapes(tree)):
        if one.attention is not None and one.kind == "kernel":
            found[one.path] = (
                one.attention.role,
                one.attention.head,
                one.attention.root,
                one.attention.has_output,
            )
    return found


SQUARE = {"kernel": (8, 8), "bias": (8,)}


@pytest.mark.parametrize(
    ("tree", "output", "root"),
    [
        ({"attention": {"self": each(("query", "key", "value"), SQUARE), "output": {"dense": SQUARE}}},
         "attention/output/dense/kernel", "attention/self"),
        ({"self_attn": each(("q_proj", "k_proj", "v_proj", "o_proj"), {"kernel": (8, 8)})},
         "self_attn/o_proj/kernel", "self_attn"),
        ({"SelfAttention": each("qkvo", {"kernel": (8, 8)})}, "SelfAttention/o/kernel", "SelfAttention"),
        ({"readout": each(("query", "key", "value", "out"), {"kernel": (8, 8)})},
         "readout/out/kernel", "readout"),
        ({"mha": each(("query", "key", "value", "linear"), {"w": (8, 8), "b": (8,)})}, "mha/linear/w", "mha"),
        ({"attn": {f"{n}_proj": {"weight": (8, 8)} for n in ("query", "key", "value", "output")}},
         "attn/output_proj/weight", "attn"),
        ({"layer": each(("wq", "wk", "wv", "wo"), (8, 8))}, "layer/wo", "layer"),
    ],
)  # fmt: skip
def test_attentions_by_their_names(tree, output, root):
    found = by_role(tree)
    assert len(found) == 4
    first = "weight" in output
    for path, (role, head, where, has_output) in found.items():
        assert (where, has_output) == (root, True)
        assert (role == "output") == (path == output)
        assert head == ((1 if first else 0) if path == output else (0 if first else 1))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_three_projections_in_one(flip, bias):
    """GPT-2's as (in, out), and as its Flax port keeps it, (out, in), the square output alike."""
    kernel = (24, 8) if flip else (8, 24)
    tree = {"attn": {"c_attn": {"kernel": kernel}, "c_proj": {"kernel": (8, 8)}}}
    if bias:
        tree["attn"]["c_attn"]["bias"], tree["attn"]["c_proj"]["bias"] = (24,), (8,)
    found = by_role(tree)
    assert found["attn/c_attn/kernel"][:2] == ("query, key and value", 0 if flip else 1)
    assert found["attn/c_proj/kernel"][:2] == ("output", 1 if flip else 0)


def test_other_modules_are_no_attentions():
    mamba = {"mixer": {"in_proj": {"kernel": (8, 32)}, "out_proj": {"kernel": (16, 8)}}}
    pattern = {"pattern_block": {"in_proj": {"kernel": (8, 32)}, "out_proj": {"kernel": (16, 8)}}}
    lstm = {"cell": {"i": {"kernel": (8, 8)}, "o": {"kernel": (8, 8)}, "q": {"kernel": (8, 8)}}}
    assert not by_role(mamba)
    assert not by_role(pattern)
    assert not by_role(lstm)


@pytest.mark.parametrize(
    ("tree", "kernels"),
    [
        ({"wte": {"embedding": (9, 4)}, "wpe": {"embedding": (5, 4)}, "fc": linear(4, 4)}, {"fc/kernel"}),
        ({"embed": {"embeddings": (9, 4)}, "linear": {"w": (4, 4), "b": (4,)}}, {"linear/w"}),
        ({"token_embedding": {"weight": (9, 4)}, "norm": {"weight": (4,)}, "mlp": {"weight": (4, 4)}},
         {"mlp/weight"}),
        ({"embedding": {"kernel": (4, 4, 3, 8), "bias": (8,)}, "cls": (1, 1, 8)}, {"embedding/kernel"}),
        ({"patch_embeddings": {"projection": {"kernel": (4, 4, 3, 8)}}},
         {"patch_embeddings/projection/kernel"}),
        ({"bn": {"scale": (1, 8), "offset": (1, 8)}, "linear": {"w": (8, 8)}}, {"linear/w"}),
        ({"a": (4, 4), "b": (4, 4)}, {"a", "b"}),
        ({"normal_head": {"weight": (8, 8)}, "norm": {"weight": (8,)}}, {"normal_head/weight"}),
        ({"w1": (4, 4), "b1": (4,), "relative_attention_bias": {"embedding": (32, 4)}}, {"w1"}),
    ],
    ids=lambda value: str(sorted(value)),
)  # fmt: skip
def test_what_is_pruned_by_default(tree, kernels):
    tree = shapes(tree)
    hits = jax.tree.leaves(selected(tree, kernels))
    assert {found.path for found, hit in zip(tree_axes(tree), hits, strict=True) if hit} == kernels


def test_nothing_to_prune_is_an_error():
    with pytest.raises(
        ValueError, match="`where` must be given for a tree without kernels, .*got bias, scale"
    ):
        selected({"bias": jnp.ones((2, 2)), "scale": jnp.ones(2)}, kernels)


def test_layers_and_back():
    x = jnp.arange(48).reshape(2, 4, 6)
    for words in ("layer in out", "in layer out", "layer in layer"):
        (found,) = tree_axes({"x": x}, {"x": words})
        layers = layers_of(x, found)
        assert len(layers) == len(found.layer_names()) == found.num_layers
        assert (stacked(layers, found) == x).all()


@pytest.mark.parametrize(
    ("words", "stack", "spatial", "inputs", "outputs"),
    [
        ("h w out in", (), (0, 1), (3,), (2,)),
        ("layer ...", (0,), (0,), (1,), (2,)),
        ("... layer", (3,), (0,), (1,), (2,)),
        ("in layer head entry", (1,), (), (0,), (1, 2)),
        ("layer head entry out", (0,), (), (0, 1), (2,)),
        ("layer layer vocab out", (0, 1), (), (0,), (1,)),
    ],
)
def test_words(words, stack, spatial, inputs, outputs):
    (found,) = tree_axes({"kernel": jnp.ones((2, 3, 4, 5))}, {"ker*": words})
    assert (found.stack, found.spatial, found.input, found.output) == (stack, spatial, inputs, outputs)


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        (
            {"k*": "in out"},
            ValueError,
            r'"in out" for `k\*` has 2 and kernel of shape \(2, 3, 4\) has 3 axes',
        ),
        ({"k*": "layer ... in"}, ValueError, "only `layer` beside one `...`"),
        ({"k*": "height in out"}, ValueError, 'made of the words layer, in, out, .*got "height in out"'),
        ({"k*": ""}, ValueError, "made of the words"),
        ({}, ValueError, "got an empty mapping"),
        ({"*/kernel": "h in out"}, ValueError, r"`\*/kernel` matches none of: kernel"),
        ({"k*": "head head out"}, ValueError, "name heads once"),
        ({"k*": 3}, TypeError, "must map globs to words|Type-check"),
        ("h in out", TypeError, "must be a mapping|Type-check"),
    ],
)
def test_bad_words(axes, error, message):
    with pytest.raises(error, match=message):
        tree_axes({"kernel": jnp.ones((2, 3, 4))}, axes)
