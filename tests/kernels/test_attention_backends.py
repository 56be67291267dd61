"""Which backend attends: how other libraries are called, and that none is used that is wrong.

There is no GPU here. In place of the libraries stand functions that do in torch what their documentation says, and
refuse or spoil what they are known to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention._fa3 import register_flash_attention_fa3
from torch.nn.attention.varlen import varlen_attn

from weft.kernels.paged_attention import AttentionRows, LogSumExp, paged_attention, reference
from weft.kernels.paged_attention.backends import Absent, Layer, Triton, present
from weft.kernels.paged_attention.choice import Chosen, Place, judge, quickest
from weft.kernels.paged_attention.flashinfer import FlashInfer
from weft.kernels.paged_attention.varlen import Varlen, find
from weft.kernels.testing import assert_close, random_attention

CPU = torch.device("cpu")
LAYER = Layer(4, 2, 16, 16, None, None, False)
WINDOW = LAYER._replace(window=100)
EAGER = Place(CPU, torch.bfloat16, 16, 4096, None)
CAPTURED = replace(EAGER, capture=lambda step: step)


def softmax_over(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """One row: q `[queries, heads, d]`, keys and values `[keys, kv_heads, d]`, seen `[queries, keys]`."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (each.float().repeat_interleave(group, 1) for each in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    scores = scores if not softcap else softcap * torch.tanh(scores / softcap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values).to(q.dtype)


def flash_attention(version: str) -> Callable[..., Tensor]:
    """`varlen_attn` on a block table; of version 2 also what is wrong with it."""

    def call(*args: Any, **options: Any) -> Tensor:
        given = inspect.signature(varlen_attn).bind(*args, **options).arguments
        q, k, v, table = (given[name] for name in ("query", "key", "value", "block_table"))
        starts, used, (left, right) = given["cu_seq_q"], given["seqused_k"], given["window_size"]
        assert starts.dtype == used.dtype == table.dtype == torch.int32 and len(used) == len(table)
        assert given["enable_gqa"] == (q.shape[1] != k.shape[2])
        assert (given.get("cu_seq_k") is not None) == (version == "FA2"), "versions differ in what they want"
        assert given["max_k"] >= int(used.max()) and given["max_q"] >= int(starts.diff().max())
        assert version != "FA2" or k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
        folded = given["max_q"] == 1 and q.shape[1] > k.shape[2] and left < 0 and right < 0
        lost = version == "FA2" and given["num_splits"] != 1 and not folded
        out = torch.full_like(q, float("nan"))
        for row, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            total = int(used[row])
            keys, values = (pages[table[row].long()].flatten(0, 1)[:total] for pages in (k, v))
            distance = torch.arange(total) - torch.arange(total - (stop - start), total)[:, None]
            seen = (distance <= (right if right >= 0 else total)) & (-distance <= (left if left >= 0 else total))
            if not (lost and row):
                out[start:stop] = softmax_over(q[start:stop], keys, values, seen, given["scale"])
        return out

    return call


@dataclass
class Wrapper:
    """FlashInfer's `BatchPrefillWithPagedKVCacheWrapper`."""

    workspace: Tensor
    layout: str
    planned: dict[str, Any] = field(default_factory=dict)
    plans: int = 0

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        self.planned = dict(locals())
        self.plans += 1
        lists = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        assert all(each.dtype == torch.int32 and each.is_cpu for each in lists), "what is not on the host is waited for"

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
        plan, size = self.planned, self.planned["page_size"]
        assert self.layout == "NHD" and caches[0].shape[1:] == (size, plan["num_kv_heads"], plan["head_dim_qk"])
        assert q.shape == (plan["qo_indptr"][-1], plan["num_qo_heads"], plan["head_dim_qk"])
        assert q.dtype == plan["q_data_type"] and caches[0].dtype == plan["kv_data_type"] and plan["causal"]
        out, left = torch.empty(q.shape, dtype=q.dtype), plan["window_left"]
        for row, last in enumerate(plan["paged_kv_last_page_len"].tolist()):
            start, stop = plan["qo_indptr"][row : row + 2].tolist()
            first, end = plan["paged_kv_indptr"][row : row + 2].tolist()
            pages = plan["paged_kv_indices"][first:end].long()
            total = (end - first - 1) * size + last
            keys, values = (cache[pages].flatten(0, 1)[:total] for cache in caches)
            distance = torch.arange(total) - torch.arange(total - (stop - start), total)[:, None]
            seen = (distance <= 0) & (-distance <= (left if left >= 0 else total))
            cap = plan["logits_soft_cap"] or 0.0
            out[start:stop] = softmax_over(q[start:stop], keys, values, seen, plan["sm_scale"], cap)
        return out


def flashinfer() -> tuple[FlashInfer, list[Wrapper]]:
    made: list[Wrapper] = []

    def wrapper(workspace: Tensor, layout: str) -> Wrapper:
        made.append(Wrapper(workspace, layout))
        return made[-1]

    return FlashInfer(wrapper, CPU), made


@dataclass(frozen=True)
class Fake:
    """A backend that a test makes up."""

    name: str
    attend: Any
    capturable: bool = True

    def unfit(self, layer: Layer, dtype: torch.dtype, page_size: int) -> str | None:
        return None


def right(q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: AttentionRows, **options: Any) -> Tensor:
    return reference.paged_attention(q, k_cache, v_cache, rows, **options)


def tried(backend: Any, layer: Layer = LAYER, place: Place = EAGER, *, decoding: bool = True) -> str | None:
    """Why a backend alone is left out."""
    (verdict,) = judge([backend], layer, 2, place, decoding=decoding)
    return verdict.unfit or verdict.problem


@pytest.mark.parametrize("decoding", [True, False])
@pytest.mark.parametrize("layer", [LAYER, WINDOW, LAYER._replace(heads=2)])
@pytest.mark.parametrize("version", ["FA2", "FA3"])
def test_flash_attention_is_called_as_documented(version: str, layer: Layer, decoding: bool) -> None:
    """Rows of every kind, pages that end within, and what version 2 loses if it is asked for it."""
    backend = Varlen(version, flash_attention(version))
    place = replace(CAPTURED, page_size=256 if version == "FA2" else 16)
    assert tried(backend, layer, place, decoding=decoding) is None


def test_what_version_2_loses_is_found() -> None:
    """The same function, left to itself: it cuts keys into parts where it must not."""
    whole = flash_attention("FA2")

    def careless(*args: Any, **options: Any) -> Tensor:
        return whole(*args, **{**options, "num_splits": None})

    place = replace(CAPTURED, page_size=256)
    assert "nan" in str(tried(Varlen("FA2", careless), WINDOW, place))
    assert "nan" in str(tried(Varlen("FA2", careless), LAYER, place, decoding=False))


def test_the_installed_torch_takes_the_arguments() -> None:
    """Its own operator, on tensors without values: there is none for CPUs."""
    case = random_attention([1, 3], [5, 20], heads=4, kv_heads=2, head_dim=16, dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = Varlen("FA3", varlen_attn).attend(case.q, case.k_cache, case.v_cache, case.rows, scale=0.25)
    assert out.shape == case.q.shape and out.dtype == torch.bfloat16


@pytest.mark.parametrize("decoding", [True, False])
@pytest.mark.parametrize("layer", [LAYER, WINDOW, LAYER._replace(softcap=30.0, head_dim=64, value_dim=64)])
def test_flashinfer_is_called_as_documented(layer: Layer, decoding: bool) -> None:
    backend, made = flashinfer()
    layer = layer._replace(head_dim=64, value_dim=64)
    assert tried(backend, layer, EAGER, decoding=decoding) is None
    assert made


def test_flashinfer_plans_once_for_the_layers_of_a_step() -> None:
    backend, made = flashinfer()
    first, second = (
        random_attention(lens, [30, 9], heads=2, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
        for lens in ([1, 1], [7, 9])
    )
    for case in (first, first, second, first):
        for window in (None, 5):
            out = backend.attend(case.q, case.k_cache, case.v_cache, case.rows, scale=0.1, window=window)
            inputs = case.q, case.k_cache, case.v_cache, case.rows
            assert_close(out, reference.paged_attention(*inputs, scale=0.1, window=window))
    assert [wrapper.plans for wrapper in made] == [3, 3], "one for each kind of layer, planned anew for other rows"
    assert len({wrapper.workspace.data_ptr() for wrapper in made}) == 1


def test_what_a_backend_cannot_do_is_not_tried() -> None:
    backend, made = flashinfer()
    versions = {version: Varlen(version, flash_attention(version)) for version in ("FA2", "FA3")}
    half = torch.float16
    assert "256" in str(versions["FA2"].unfit(LAYER, half, 16)) and versions["FA2"].unfit(LAYER, half, 512) is None
    assert versions["FA3"].unfit(LAYER, half, 16) is None and "float32" in str(
        versions["FA3"].unfit(LAYER, torch.float32, 16)
    )
    for change in ({"softcap": 3.0}, {"sinks": True}, {"value_dim": 8}, {"head_dim": 20, "value_dim": 20}):
        assert versions["FA3"].unfit(LAYER._replace(**change), half, 16)
    assert backend.unfit(LAYER._replace(head_dim=128, value_dim=128, softcap=3.0), half, 16) is None
    for change in ({"sinks": True}, {"head_dim": 80, "value_dim": 80}, {"value_dim": 64}):
        assert backend.unfit(LAYER._replace(**change), half, 16)
    assert tried(backend, LAYER._replace(head_dim=64, value_dim=64), CAPTURED) == "CUDA graphs cannot hold it"
    assert not made


@pytest.mark.parametrize(
    "layer", [LAYER, LAYER._replace(window=9, softcap=20.0, sinks=True, head_dim=20, value_dim=12)]
)
@pytest.mark.parametrize("decoding", [True, False])
def test_wefts_own_kernel_is_one_of_them(layer: Layer, decoding: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert tried(Triton(), layer, replace(EAGER, dtype=dtype, most=100), decoding=decoding) is None


def off(q: Tensor, *rest: Any, **options: Any) -> Tensor:
    return right(q, *rest, **options) + 0.1


def without_window(*args: Any, **options: Any) -> Tensor:
    return right(*args, **{**options, "window": None})


def window_and_one(*args: Any, **options: Any) -> Tensor:
    return right(*args, **{**options, "window": (options["window"] or 10**6) + 1})


def whole_pages(q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: AttentionRows, **options: Any) -> Tensor:
    """Reads what lies behind a row's tokens and weighs it with zero, which makes NaN of NaN."""
    poisoned = v_cache.isnan().flatten(2).any(2)[rows.page_table.long()].any()
    return right(q, k_cache, v_cache, rows, **options) + (float("nan") if poisoned else 0.0)


def first_row_alone(q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: AttentionRows, **options: Any) -> Tensor:
    whole = right(q, k_cache, v_cache, rows, **options)
    whole[int(rows.query_starts[1]) :] = 0
    return whole


def contiguous_alone(q: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Takes q's memory for `[T, heads, d]` whatever its strides are."""
    flat = q.as_strided(q.shape, torch.empty(q.shape).stride())
    return right(flat, *rest, **options)


def raises(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("CUDA error: no kernel image\nis available")


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (off, "not close"),
        (without_window, "not close"),
        (window_and_one, "not close"),
        (whole_pages, "nan"),
        (first_row_alone, "not close"),
        (contiguous_alone, "not close"),
        (raises, "CUDA error: no kernel image is available"),
    ],
)
@pytest.mark.parametrize("decoding", [True, False])
def test_a_wrong_one_is_found(attend: Any, why: str, decoding: bool) -> None:
    assert why in str(tried(Fake("fake", attend), WINDOW, EAGER, decoding=decoding))
    assert tried(Fake("fake", right), WINDOW, EAGER, decoding=decoding) is None


def test_one_that_goes_by_the_host_is_not_captured() -> None:
    """Lengths that it saw when the step was recorded are not those of the step that is replayed."""

    def by_the_host(q: Tensor, k: Tensor, v: Tensor, rows: AttentionRows, **options: Any) -> Tensor:
        seen = rows.plan("lens", rows.context_lens.clone)
        return right(q, k, v, replace(rows, context_lens=seen, total_lens=tuple(seen.tolist())), **options)

    def by_the_device(q: Tensor, k: Tensor, v: Tensor, rows: AttentionRows, **options: Any) -> Tensor:
        totals = rows.context_lens.tolist()
        return right(
            q, k, v, AttentionRows.build([1] * len(totals), totals, rows.page_table.tolist(), 16, CPU), **options
        )

    def recording(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    place = replace(CAPTURED, capture=recording)
    assert tried(Fake("fake", by_the_device), LAYER, place) is None
    assert tried(Fake("fake", by_the_host), LAYER, place) is not None
    assert tried(Fake("fake", by_the_host), LAYER, EAGER) is None


def test_the_quickest_right_one_is_taken() -> None:
    backends = [Fake("slow", right), Fake("wrong", off), Fake("quick", right)]
    seconds = iter([2.0, 1.0])
    verdicts = judge(backends, LAYER, 3, EAGER, decoding=False, clock=lambda step: next(seconds))
    assert [(verdict.right, verdict.seconds) for verdict in verdicts] == [(True, 2.0), (False, None), (True, 1.0)]
    chosen = quickest(backends, verdicts)
    assert chosen is not None and chosen.name == "quick"
    assert quickest(backends[1:2], verdicts[1:2]) is None


def test_every_layer_of_a_step_is_timed() -> None:
    """With the plan that the layers share made anew for each step, as in a server."""
    calls: list[int] = []
    built: list[int] = []

    def counting(q: Tensor, k: Tensor, v: Tensor, rows: AttentionRows, **options: Any) -> Tensor:
        rows.plan("fake", lambda: built.append(1))
        calls.append(len(rows.query_lens))
        return right(q, k, v, rows, **options)

    def clock(step: Callable[[], None]) -> float:
        calls.clear()
        built.clear()
        step()
        step()
        return float(len(calls))

    verdicts = judge([Fake("a", counting), Fake("b", counting)], LAYER, 3, EAGER, decoding=True, clock=clock)
    assert [verdict.seconds for verdict in verdicts] == [6.0, 6.0] and len(built) == 2
    verdicts = judge([Triton(), Fake("b", right)], LAYER, 1, replace(EAGER, most=64), decoding=False)
    assert all(verdict.seconds is not None and verdict.seconds > 0 for verdict in verdicts), "by the wall"


def test_layers_and_steps_have_backends_of_their_own() -> None:
    used: list[str] = []

    def named(name: str) -> Fake:
        def attend(*args: Any, **options: Any) -> Tensor:
            used.append(name)
            return right(*args, **options)

        return Fake(name, attend)

    names = {(LAYER, True): "decode", (LAYER, False): "prompt", (WINDOW, False): "window"}
    chosen = Chosen({key: named(name) for key, name in names.items()})
    case = random_attention([1, 1], [9, 30], heads=4, kv_heads=2, head_dim=16)
    prompt = random_attention([1, 4], [9, 30], heads=4, kv_heads=2, head_dim=16)
    for each, window in ((case, None), (prompt, None), (prompt, 100), (case, 100), (case, 3)):
        inputs = each.q, each.k_cache, each.v_cache, each.rows
        out = chosen(*inputs, scale=0.25, window=window)
        assert_close(out, paged_attention(*inputs, scale=0.25, window=window))
    assert used == ["decode", "prompt", "window"], "weft's own kernel does what is not in the table"
    lse = LogSumExp(torch.full((2, 4), float("nan")), (0, 1))
    chosen(case.q, case.k_cache, case.v_cache, case.rows, scale=0.25, lse=lse)
    assert len(used) == 3 and not lse.values.isnan().any(), "and whatever asks for denominators"


def test_what_is_missing_is_said() -> None:
    found, absent = present(torch.device("cpu"))
    assert [backend.name for backend in found] == ["triton"] and set(absent) == {"varlen", "flashinfer"}
    assert all("GPU" in why for why in absent.values())


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device of which torch says that it is an H100."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda")


def test_what_is_installed_is_found(hopper: torch.device) -> None:
    found, absent = present(hopper)
    assert [backend.name for backend in found] == ["triton", "varlen"]
    assert absent == {"flashinfer": "there is no package flashinfer: pip install 'weft[flashinfer]'"}


def test_what_does_not_load_is_not_there(hopper: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flashinfer.py").write_text("raise OSError('libcudart.so.99: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "it does not load: OSError: libcudart.so.99" in present(hopper)[1]["flashinfer"]


def test_flash_attention_3_is_activated_where_it_is(
    hopper: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(hopper).version == "FA2"
    (tmp_path / "flash_attn_interface.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    attention = torch.nn.attention
    try:
        attention.register_flash_attention_impl("FA3", register_fn=lambda: SimpleNamespace(remove=lambda: None))
        assert find(hopper).version == "FA3" == attention.current_flash_attention_impl()
        assert find(hopper).version == "FA3", "whoever activated it"
    finally:
        attention.restore_flash_attention_impl()
        attention.register_flash_attention_impl("FA3", register_fn=register_flash_attention_fa3)


def test_an_older_torch_has_no_pages(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> None: ...

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", older)
    with pytest.raises(Absent, match="no seqused_k, block_table, num_splits"):
        find(hopper)
