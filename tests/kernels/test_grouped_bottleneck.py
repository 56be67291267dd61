import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.activations import Activation, activate
from weft.kernels.grouped_bottleneck import Bottlenecks, Input, grouped_bottleneck, reference, triton
from weft.kernels.groups import RowGroups
from weft.kernels.testing import TOLERANCES, assert_close, random_rows

SLOTS = 4
KINDS = st.tuples(st.sampled_from(list(Input)), st.sampled_from(list(Activation)))


def random_bottlenecks(
    units: list[int], kinds: list[tuple[Input, Activation]], width: int, dtype: torch.dtype
) -> Bottlenecks:
    """Bottlenecks with so many units per slot; none where that is 0."""
    used = [kind if count else None for kind, count in zip(kinds, units, strict=True)]
    return Bottlenecks(
        random_rows(units, width, dtype, scale=width**-0.5, seed=3),
        random_rows([-(-count // width) for count in units], width, dtype, seed=4),
        random_rows(units, width, dtype, scale=max([*units, 1]) ** -0.5, seed=5),
        random_rows([int(count > 0) for count in units], width, dtype, seed=6),
        torch.tensor([kind[0] for kind in kinds], dtype=torch.int32),
        torch.tensor([kind[1] for kind in kinds], dtype=torch.int32),
        tuple(used),
    )


@pytest.mark.parametrize("implementation", [grouped_bottleneck, triton.grouped_bottleneck])
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), max_size=40),
    units=st.lists(st.sampled_from([0, 1, 7, 48, 130]), min_size=SLOTS, max_size=SLOTS),
    kinds=st.lists(KINDS, min_size=SLOTS, max_size=SLOTS),
    width=st.integers(1, 300),
    dtype=st.sampled_from(list(TOLERANCES)),
    strided=st.booleans(),
    gated=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_it_agrees_with_the_reference(implementation, slots, units, kinds, width, dtype, strided, gated) -> None:
    f = rows_of(width, len(slots), dtype, strided=strided, seed=1)
    r = rows_of(width, len(slots), dtype, strided=strided, seed=2)
    bottlenecks = random_bottlenecks(units, kinds, width, dtype)
    groups = RowGroups.build(slots, "cpu", block_rows=32 if strided else 16)
    gates = torch.rand(len(slots), 2, generator=torch.Generator().manual_seed(7)) if gated else None
    before, expected = f.clone(), f.clone()
    reference.grouped_bottleneck(expected, r, bottlenecks, groups, gates)
    implementation(f, r, bottlenecks, groups, gates)
    assert_close(f, expected)
    untouched = [t for t, slot in enumerate(slots) if slot < 0 or not units[slot]]
    assert torch.equal(bits(f[untouched]), bits(before[untouched]))


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("given_input", Input)
def test_the_reference_is_the_formula(given_input: Input, activation: Activation) -> None:
    gates = torch.tensor([[0.5, 9.0], [0.3, 9.0], [0.25, 9.0]])
    kind = (given_input, activation)
    bottlenecks = random_bottlenecks([0, 9], [kind, kind], 5, torch.float32)
    f, r = (rows_of(5, 3, torch.float32, strided=False, seed=seed) for seed in (1, 2))
    x = {Input.OUTPUT: f, Input.RESIDUAL: r, Input.SUM: f + r}[given_input].double()

    def whole(rows) -> Tensor:  # type: ignore[no-untyped-def]
        return rows.of(1).double()

    bias = whole(bottlenecks.down_bias).flatten()[:9]
    z = activate(x @ whole(bottlenecks.down).T + bias, activation)
    expected = f.double() + gates[:, :1] * (z @ whole(bottlenecks.up) + whole(bottlenecks.up_bias))
    expected[1] = f[1].double()
    reference.grouped_bottleneck(f, r, bottlenecks, RowGroups.build([1, 0, 1], "cpu"), gates)
    assert_close(f, expected.float())


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_every_activation_on_a_gpu(activation: Activation, size: float) -> None:
    """Large and small arguments: the exponentials neither overflow nor cancel."""
    bottlenecks = random_bottlenecks([48], [(Input.OUTPUT, activation)], 16, torch.float32)
    f = rows_of(16, 8, torch.float32, strided=False, seed=1) * size
    expected, r, groups = f.clone(), torch.zeros_like(f), RowGroups.build([0] * 8, "cpu")
    reference.grouped_bottleneck(expected, r, bottlenecks, groups)
    triton.grouped_bottleneck(f, r, bottlenecks, groups)
    torch.testing.assert_close(f, expected, rtol=1e-5, atol=1e-5 * size)


def test_what_does_not_fit_is_refused() -> None:
    kind = (Input.SUM, Activation.RELU)
    groups, bottlenecks = RowGroups.build([0, 0], "cpu"), random_bottlenecks([4], [kind], 3, torch.float32)
    f = torch.zeros(2, 3)
    for wrong in ((f[:1], f[:1]), (f, f[:1]), (torch.zeros(2, 4), torch.zeros(2, 4))):
        with pytest.raises(ValueError, match="do not fit"):
            grouped_bottleneck(*wrong, bottlenecks, groups)
    for gates in (torch.ones(1, 1), torch.ones(2, 1).double()):
        with pytest.raises(ValueError, match="do not fit"):
            grouped_bottleneck(f, f, bottlenecks, groups, gates)
    with pytest.raises(ValueError, match="dtypes must be equal"):
        grouped_bottleneck(f.half(), f, bottlenecks, groups)
