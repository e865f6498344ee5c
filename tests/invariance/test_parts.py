"""Parts of packed parameters that scale differently, whatever the layout; each is checked by rescaling it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.invariance.checks import assert_same_space
from tests.invariance.networks import tokens
from torch import Tensor, nn

import normwise as nw
from normwise.invariance import joint, parameter_of
from normwise.invariance.parts import Part, UnitRecord
from normwise.invariance.scale_gradients import ScaleGradients, UnitSums
from normwise.invariance.verdicts import Thresholds

D, HEADS, SIZE = 8, 2, 4


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention of q, k, v of shape (batch, tokens, heads, size)."""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2).flatten(2)


class Rows(nn.Module):
    """nn.Linear and chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, SIZE)) for t in self.qkv(x).chunk(3, -1))
        out: Tensor = self.o(attend(q, k, v))
        return out


class Ordered(Rows):
    """Another order of queries, keys and values, for all heads at once or head by head."""

    def __init__(self, order: str, interleaved: bool = False) -> None:
        super().__init__()
        self.order, self.interleaved = order, interleaved

    def forward(self, x: Tensor) -> Tensor:
        if self.interleaved:
            parts = self.qkv(x).unflatten(-1, (HEADS, 3, SIZE)).unbind(-2)
        else:
            parts = tuple(t.unflatten(-1, (HEADS, SIZE)) for t in self.qkv(x).chunk(3, -1))
        q, k, v = (parts[self.order.index(letter)] for letter in "qkv")
        out: Tensor = self.o(attend(q, k, v))
        return out


class Fused(Rows):
    """As vision transformers write it."""

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * SIZE**-0.5).softmax(-1) @ v
        out: Tensor = self.o(y.transpose(1, 2).reshape(batch, count, D))
        return out


class Interleaved(Rows):
    """q, k, v of the first head, then of the second, …."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, SIZE)).unbind(-2)
        out: Tensor = self.o(attend(q, k, v))
        return out


class Columns(nn.Module):
    """The transposed layout of GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Module(), nn.Linear(D, D)
        self.qkv.weight = nn.Parameter(torch.randn(D, 3 * D) / D**0.5)
        self.qkv.bias = nn.Parameter(torch.zeros(3 * D))

    def forward(self, x: Tensor) -> Tensor:
        parameters = dict(self.qkv.named_parameters())
        packed = torch.addmm(parameters["bias"], x.flatten(0, 1), parameters["weight"]).view(*x.shape[:2], -1)
        q, k, v = (t.unflatten(-1, (HEADS, SIZE)) for t in packed.split(D, -1))
        out: Tensor = self.o(attend(q, k, v))
        return out


class Grouped(nn.Module):
    """Two heads of queries share one of keys and values: the parts differ in size."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, D + 2 * SIZE), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([D, SIZE, SIZE], -1)
        k, v = (t.unsqueeze(2).expand(-1, -1, HEADS, -1) for t in (k, v))
        out: Tensor = self.o(attend(q.unflatten(-1, (HEADS, SIZE)), k, v))
        return out


class MultiheadAttention(nn.Module):
    """torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(D, HEADS, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mha(x, x, x, need_weights=False)[0]
        return out


class Net(nn.Module):
    """head(n2(x + block(n1(x)))) with x from an embedding."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.emb, self.n1, self.block = nn.Embedding(11, D), nn.LayerNorm(D), block
        self.n2, self.head = nn.LayerNorm(D), nn.Linear(D, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        out: Tensor = self.head(self.n2(x + self.block(self.n1(x))))
        return out


def derived(packed: tuple[str, str], o: str, parts: list[str]) -> list[dict[str, int]]:
    """The stream, both norms, q against k, v against the output.

    ``parts``: q, k, v of the weight and q, v of the bias.
    """
    weight, bias = packed
    q, k, v, bq, bv = parts
    return [
        {"emb.weight": 1, f"{o}.weight": 1, f"{o}.bias": 1},
        {"n1.weight": 1, "n1.bias": 1, weight: -1},
        {"n2.weight": 1, "n2.bias": 1, "head.weight": -1},
        {weight + q: 1, bias + bq: 1, weight + k: -1},
        {weight + v: 1, bias + bv: 1, f"{o}.weight": -1},
    ]


def rows(*ends: int) -> list[str]:
    a, b, c, d = ends
    q, k, v = f"[{a}:{b}]", f"[{b}:{c}]", f"[{c}:{d}]"
    return [q, k, v, q, v]


def ordered(order: str, interleaved: bool = False) -> list[dict[str, int]]:
    keys = HEADWISE if interleaved else ["[0:8]", "[8:16]", "[16:24]"]
    q, k, v = (keys[order.index(letter)] for letter in "qkv")
    return derived(QKV, "block.o", [q, k, v, q, v])


QKV = ("block.qkv.weight", "block.qkv.bias")
HEADWISE = [f".unflatten(0, (-1, 12))[:, {a}:{a + 4}]" for a in (0, 4, 8)]
LAYOUTS: dict[str, tuple[Callable[[], nn.Module], list[dict[str, int]]]] = {
    "rows": (Rows, derived(QKV, "block.o", rows(0, 8, 16, 24))),
    "fused": (Fused, derived(QKV, "block.o", rows(0, 8, 16, 24))),
    "interleaved": (Interleaved, derived(QKV, "block.o", [*HEADWISE, HEADWISE[0], HEADWISE[2]])),
    "columns": (
        Columns,
        derived(QKV, "block.o", ["[:, 0:8]", "[:, 8:16]", "[:, 16:24]", "[0:8]", "[16:24]"]),
    ),
    "q v k": (lambda: Ordered("qvk"), ordered("qvk")),
    "k v q": (lambda: Ordered("kvq"), ordered("kvq")),
    "v q k": (lambda: Ordered("vqk"), ordered("vqk")),
    "q v k, head by head": (lambda: Ordered("qvk", True), ordered("qvk", True)),
    "v k q, head by head": (lambda: Ordered("vkq", True), ordered("vkq", True)),
    "grouped": (Grouped, derived(QKV, "block.o", rows(0, 8, 12, 16))),
    "nn.MultiheadAttention": (
        MultiheadAttention,
        derived(
            ("block.mha.in_proj_weight", "block.mha.in_proj_bias"), "block.mha.out_proj", rows(0, 8, 16, 24)
        ),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_keys_and_values_in_one_tensor(layout: str) -> None:
    torch.manual_seed(0)
    block, expected = LAYOUTS[layout]
    net = Net(block())
    inv = nw.find_invariances(net, tokens())
    assert inv.undetermined == {}
    assert inv.scale_invariant == {}
    assert inv.unconfirmed_joint == []
    assert_same_space(inv.joint, expected, inv.names, inv.parts)
    assert inv.stats.rows <= inv.stats.rank + 16
    changed_by_each(net, inv.joint)


def changed_by_each(net: nn.Module, symmetries: list[dict[str, int]]) -> None:
    """Assert that rescaling by keys, read as the expressions that they are, changes no output."""
    ids = tokens()[0]
    net = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        for p in net.parameters():  # biases and gains at values that count
            p.add_(torch.rand_like(p) * 0.3)
        for module in net.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 0.0
        for symmetry in symmetries:
            changed = copy.deepcopy(net)
            parameters = dict(changed.named_parameters())
            for key, exponent in symmetry.items():
                name = parameter_of(key)
                eval("p" + key.removeprefix(name), {"p": parameters[name]}).mul_(3.0**exponent)
            torch.testing.assert_close(changed(ids), net(ids))


class GLU(nn.Module):
    """Gate and linear half in one; the gate is not homogeneous."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(D, 24), nn.Linear(12, D)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


def test_the_linear_half_of_a_gated_unit_against_what_reads_it() -> None:
    torch.manual_seed(0)
    net = Net(GLU())
    inv = nw.find_invariances(net, tokens())
    expected = [
        {"emb.weight": 1, "block.down.weight": 1, "block.down.bias": 1},
        {"n1.weight": 1, "n1.bias": 1, "block.both.weight": -1},
        {"n2.weight": 1, "n2.bias": 1, "head.weight": -1},
        {"block.both.weight[12:24]": 1, "block.both.bias[12:24]": 1, "block.down.weight": -1},
    ]
    assert_same_space(inv.joint, expected, inv.names, inv.parts)
    changed_by_each(net, inv.joint)


class ReadsBoth(nn.Module):
    """One layer reads two branches side by side: its columns divide where they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 7), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], -1))
        return out


def test_the_columns_that_read_two_branches() -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(ReadsBoth(), [torch.randn(16, 6)])
    expected = [
        {"a.weight": 1, "a.bias": 1, "c.weight[:, 0:5]": -1},
        {"b.weight": 1, "b.bias": 1, "c.weight[:, 5:12]": -1},
    ]
    assert_same_space(inv.joint, expected, inv.names, inv.parts)
    assert inv.parts == {"c.weight": ["c.weight[:, 0:5]", "c.weight[:, 5:12]"]}


def test_square_weights_with_a_bias_and_vectors_of_gates() -> None:
    class Square(ReadsBoth):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.gates = nn.Linear(12, 12), nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([F.relu(self.a(x)), torch.tanh(self.b(x))], -1) * self.gates
            out: Tensor = torch.tanh(self.c(x))
            return out

    torch.manual_seed(0)
    inv = nw.find_invariances(Square(), [torch.randn(16, 6)])
    expected = [
        {"a.weight": 1, "a.bias": 1, "gates[0:5]": -1},
        {"gates[0:5]": 1, "c.weight[:, 0:5]": -1},
        {"gates[5:12]": 1, "c.weight[:, 5:12]": -1},
    ]
    assert_same_space(inv.joint, expected, inv.names, inv.parts)


class ReadsSums(nn.Module):
    """A layer reads a residual stream beside another branch, as the shortcut of a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r1, self.r2 = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 5)
        self.b, self.c = nn.Linear(6, 7), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.a(x)
        stream = F.relu(stream + self.r2(F.relu(self.r1(stream))))
        out: Tensor = self.c(torch.cat([stream, F.relu(self.b(x))], -1))
        return out


def test_columns_that_read_a_sum_beside_another_branch() -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(ReadsSums(), [torch.randn(16, 6)])
    stream = {"a.weight": 1, "a.bias": 1, "r2.weight": 1, "r2.bias": 1, "c.weight[:, 0:5]": -1}
    expected = [
        {**stream, "r1.weight": -1},
        {"r1.weight": 1, "r1.bias": 1, "r2.weight": -1},
        {"b.weight": 1, "b.bias": 1, "c.weight[:, 5:12]": -1},
    ]
    assert_same_space(inv.joint, expected, inv.names, inv.parts)


class Halves(nn.Module):
    """Half of the units have a ReLU, the others a GELU; no whole parameter balances either half."""

    def __init__(self, relu: slice, gelu: slice) -> None:
        super().__init__()
        self.a, self.b, self.relu, self.gelu = nn.Linear(6, 12), nn.Linear(12, 3), relu, gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        out: Tensor = self.b(torch.cat([F.relu(x[:, self.relu]), F.gelu(x[:, self.gelu])], 1))
        return out


@pytest.mark.parametrize(
    ("relu", "gelu", "rows"), [((0, 5), (5, 12), "[0:5]"), ((7, 12), (0, 7), "[7:12]")], ids=["first", "last"]
)
def test_parts_of_two_projections_against_each_other(
    relu: tuple[int, int], gelu: tuple[int, int], rows: str
) -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(Halves(slice(*relu), slice(*gelu)), [torch.randn(16, 6)])
    assert inv.joint == [{f"a.weight{rows}": 1, f"a.bias{rows}": 1, "b.weight[:, 0:5]": -1}]


class Latent(nn.Module):
    """Multi-head latent attention: rotated and other parts of q, k and v come from four projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down = nn.Linear(D, HEADS * 2 * SIZE, bias=False), nn.Linear(D, D + SIZE, bias=False)
        self.norm, self.up = nn.RMSNorm(D), nn.Linear(D, HEADS * 2 * SIZE, bias=False)
        self.o = nn.Linear(HEADS * SIZE, D)

    def forward(self, x: Tensor) -> Tensor:
        q, turned_q = self.q(x).unflatten(-1, (HEADS, 2 * SIZE)).split(SIZE, -1)
        latent, turned_k = self.down(x).split([D, SIZE], -1)
        k, v = self.up(self.norm(latent)).unflatten(-1, (HEADS, 2 * SIZE)).split(SIZE, -1)
        place = torch.arange(x.shape[1], dtype=x.dtype).cos()[:, None, None] + 2  # stands for a rotation
        turned_k = (turned_k[:, :, None] * place).expand(-1, -1, HEADS, -1)
        q, k = torch.cat([q, turned_q * place], -1), torch.cat([k, turned_k], -1)
        out: Tensor = self.o(attend(q, k, v))
        return out


def test_latent_attention() -> None:
    torch.manual_seed(0)
    net = Net(Latent())
    inv = nw.find_invariances(net, tokens())
    first, second = (f".unflatten(0, (-1, 8))[:, {a}:{a + 4}]" for a in (0, 4))
    assert inv.partial.keys() == {"block.down.weight"}  # before the norm, the latent rows
    expected = [
        {"emb.weight": 1, "block.o.weight": 1, "block.o.bias": 1},
        {"n1.weight": 1, "n1.bias": 1, "block.q.weight": -1, "block.down.weight": -1},
        {"n2.weight": 1, "n2.bias": 1, "head.weight": -1},
        {"block.norm.weight": 1, "block.up.weight": -1},
        {f"block.q.weight{first}": 1, f"block.up.weight{first}": -1},
        {f"block.q.weight{second}": 1, "block.down.weight": -1},
        {f"block.up.weight{second}": 1, "block.o.weight": -1},
    ]
    assert_same_space(inv.joint, expected, inv.names, inv.parts)
    changed_by_each(net, inv.joint)


def test_single_precision_and_layers_that_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block, expected = LAYOUTS["rows"]
    monkeypatch.setattr("normwise.invariance.find.DOUBLE_UP_TO", 0)
    inv = nw.find_invariances(Net(block()), tokens())
    assert inv.stats.dtype == "float32"
    assert_same_space(inv.joint, expected, inv.names, inv.parts)
    plain = nw.find_invariances(
        nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9)), [torch.randn(16, 6)]
    )
    assert plain.parts == {}


@pytest.mark.parametrize(("tied", "count"), [(True, 17), (False, 18)])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.one_in(2)
def test_gpt2_of_four_layers(tied: bool, count: int) -> None:
    """Per layer two norms, q·k, v·o; stream and last norm, which are one where the head is the embedding."""
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=4, n_head=2, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(config)
    batches = [torch.randint(0, 50, (4, 9)) for _ in range(3)]
    inv = nw.find_invariances(model, batches, lambda m, b: m(b).logits)
    assert len(inv.joint) == 4 * 4 + (1 if tied else 2) == count
    name = "transformer.h.3.attn.c_attn"
    assert inv.parts[f"{name}.weight"] == [f"{name}.weight[:, {a}:{a + 16}]" for a in (0, 16, 32)]
    pair = {f"{name}.weight[:, 0:16]": 1, f"{name}.bias[0:16]": 1, f"{name}.weight[:, 16:32]": -1}
    assert pair in inv.joint


def test_sums_of_columns_are_those_of_the_record_and_residuals_those_of_their_definition() -> None:
    rng = np.random.default_rng(0)
    rows, record = [], UnitRecord([(1, 0)])
    for _ in range(3):
        units = UnitSums(rng.normal(size=6), rng.random(6))
        row = ScaleGradients(np.array([rng.normal(), units.scale.sum()]), rng.random(2), np.ones(2, bool))
        row.units[1, 0] = units
        rows.append(row)
        record.add(row)
    columns = [joint._Column(0), joint._Column(1, Part(1, 0, 0, 1, 3, 6)), joint._Column(1)]
    sums = joint._sums(columns, rows)
    assert np.allclose(sums, np.stack([c.values(record) for c in columns], axis=1), rtol=1e-14)
    assert sums[0, 1] == pytest.approx(rows[0].units[1, 0].scale[[0, 3]].sum())
    exponents = np.array([1, -2, 3])
    squares = np.array([[c.squares_of(row) for c in columns] for row in rows])
    expected = np.sqrt(np.mean((sums @ exponents) ** 2) / np.mean(squares @ exponents**2))
    assert joint._residuals([exponents], columns, rows) == [pytest.approx(expected)]


@pytest.mark.parametrize(("share", "visible"), [(1e-8, False), (1e-5, True)])
def test_a_nearly_dead_channel_is_no_column_of_its_own(share: float, visible: bool) -> None:
    """Its sums are next to rounding errors, and blur the exponents of every other symmetry."""
    rng, part = np.random.default_rng(0), Part(0, 0, 1, 2, period=4, size=4)
    sums = rng.normal(size=(8, 4)) * np.array([1.0, share, 1.0, 1.0])
    record: Any = SimpleNamespace(
        wholes=[np.ones(1)] * 8,
        squares=lambda place, divisors: (sums**2).mean(0),
        sums_of=lambda part: sums[:, 1],
    )
    assert joint._Column(0, part).has_own_scale(record, Thresholds.of(torch.float64)) is visible
