"""What adapters take: sparse updates what their values need, and what could never fit is refused before it is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, ShiraConfig

from tests.adapters.cases import all_cases
from tests.adapters.cases.basic import LINEARS
from tests.adapters.conftest import TinyBase
from tests.support.adapters import make_adapter
from weft.adapters.base import Base, Site
from weft.adapters.errors import AdapterFormatError, AdapterTooLarge
from weft.adapters.methods import compile_adapter
from weft.adapters.methods.places import scattered, sparse_update

CASES = all_cases()
AMPLIFIED = (
    "hira", "randlora", "glora", "miss_bat", "miss_mini", "loha", "loha_dense", "lokr", "gralora", "vera", "pvera",
    "oft_shared", "boft", "fourierft", "c3a", "waveft", "frod", "vblora", "unilora", "psoft",
)  # fmt: skip
"""Cases of methods whose updates are larger than what is saved."""


@pytest.mark.parametrize("case", AMPLIFIED)
def test_what_could_never_fit_is_refused_by_the_setting_to_raise(case: str, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_adapter(llama.folder, tmp_path / "adapter", CASES[case])
    small = dataclasses.replace(llama.base, adapter_memory=512)
    with pytest.raises(AdapterTooLarge, match="adapter-memory") as caught:
        compile_adapter(folder, small, version="v")
    assert caught.value.param == "adapter_memory"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_update_takes_its_values_and_their_places(dtype: torch.dtype, llama: TinyBase, tmp_path: Path) -> None:
    config: PeftConfig = ShiraConfig(r=2, target_modules=LINEARS)
    folder = make_adapter(llama.folder, tmp_path / "adapter", config)
    base = dataclasses.replace(llama.base, dtype=dtype)
    compiled = compile_adapter(folder, base, version="v")
    assert compiled.forms == ("Sparse",)
    for path, forms in compiled.sites.items():
        site, (rows,) = base.sites[path], forms.parts().values()
        values = 2 * (site.in_features + site.out_features)
        # The three parts begin on a row each.
        most = values * (dtype.itemsize + 4) + 4 * (site.out_features + 1) + 3 * site.in_features * dtype.itemsize
        assert rows.dtype == dtype and values * (dtype.itemsize + 4) < rows.nbytes < most


def base_of(site: Site) -> Base:
    return Base("test", 1, {site.path: site}, (site.path,), torch.float32)


def test_values_at_one_place_add_up() -> None:
    site = Site("a", "linear", 30, 20, False)
    places, values = torch.tensor([599, 31, 31, 0, 599]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    sparse = sparse_update(base_of(site), site, places, values, "indices").sparse
    assert sparse is not None and sparse.values.tolist() == [4, 5, 6] and sparse.columns.tolist() == [0, 1, 29]
    outputs = torch.arange(20).repeat_interleave(sparse.starts.diff())
    dense = torch.zeros(20, 30).index_put_((outputs, sparse.columns.long()), sparse.values)
    assert dense.equal(scattered(site, places, values, "indices"))


@pytest.mark.parametrize(("width", "count"), [(31, 5), (30, 300)])
def test_an_odd_width_or_many_values_are_dense(width: int, count: int) -> None:
    site, places = Site("a", "linear", width, 20, False), torch.arange(count)
    forms = sparse_update(base_of(site), site, places, torch.ones(count), "indices")
    assert forms.sparse is None and forms.delta is not None and forms.delta.sum() == count


@pytest.mark.parametrize("place", [-1, 600])
def test_a_place_outside_the_weight_is_refused(place: int) -> None:
    site = Site("a", "linear", 30, 20, False)
    with pytest.raises(AdapterFormatError, match="outside the weight"):
        sparse_update(base_of(site), site, torch.tensor([0, place]), torch.ones(2), "indices")
