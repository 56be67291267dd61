"""llama.cpp as a peer, as far as it needs no llama.cpp: whose turn it is, and its order of the weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.models.llama.modeling_llama import rotate_half


@pytest.fixture(autouse=True)
def peers(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of the benchmark."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))


def decode(turns: Any, adapter_of: dict[int, str | None]) -> list[tuple[str | None, list[int], list[int]]]:
    """Batches until all rows have their tokens: whose, which rows, how many tokens of each."""
    batches, held = list[tuple[str | None, list[int], list[int]]](), dict[int, int]()
    while len(adapter_of) > sum(left == 0 for left in held.values()):
        adapter, rows = turns.next()
        assert {adapter_of[row.index] for row in rows} == {adapter}
        assert len({row.sequence for row in rows}) == len(rows)
        batches.append((adapter, [row.index for row in rows], [len(row.pending) for row in rows]))
        for row in rows:
            row.position, row.pending, row.left = row.position + len(row.pending), [0], row.left - 1
            held[row.index] = row.left
            if row.left == 0:
                turns.end(row, adapter)
    return batches


def test_adapters_take_turns_after_all_prompts() -> None:
    from peers.turns import Row, Turns

    turns, adapter_of = Turns([None, "a", "b"], 6, 100), dict[int, str | None]()
    for index, adapter in enumerate(["a", "b", "a", None]):
        turns.add(Row(index, [1] * 5, 3), adapter)
        adapter_of[index] = adapter
    assert decode(turns, adapter_of) == [
        *[(None, [3], [5]), ("a", [0, 2], [5, 5]), ("b", [1], [5])],
        *[(None, [3], [1]), ("a", [0, 2], [1, 1]), ("b", [1], [1])] * 2,
    ]


def test_prompts_wait_for_sequences_and_for_room_in_a_batch() -> None:
    from peers.turns import Row, Turns

    turns = Turns(["a", "b"], 3, 10)
    adapter_of: dict[int, str | None] = {index: "ab"[index % 2] for index in range(8)}
    for index, adapter in adapter_of.items():
        turns.add(Row(index, [1] * 5, 2), adapter)
    batches = decode(turns, adapter_of)
    assert all(sum(tokens) <= 10 for _, _, tokens in batches)
    assert [rows for _, rows, tokens in batches if 5 in tokens][:2] == [[0, 2], [1]]
    assert sum(sum(tokens) for _, _, tokens in batches) == 8 * (5 + 1)


def test_rows_of_an_adapter_are_neighbours_whenever_they_come() -> None:
    from peers.turns import Row, Turns

    turns, sequences = Turns(["a", "b"], 8, 100), dict[str, list[int]]()
    for index in range(8):
        turns.add(Row(index, [1], 9), "ab"[index % 2])
        adapter, rows = turns.next()
        sequences[adapter] = sequences.get(adapter, []) + [row.sequence for row in rows]
    assert sequences == {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7]}


def test_weights_are_read_as_they_were_saved(tmp_path: Path) -> None:
    from peers.weights import read_safetensors

    saved = {"half": torch.randn(3, 5).bfloat16(), "single": torch.randn(7)}
    save_file(saved, tmp_path / "a.safetensors", metadata={"format": "pt"})
    read = dict(read_safetensors(tmp_path / "a.safetensors"))
    assert set(read) == set(saved)
    for name, values in saved.items():
        assert torch.equal(torch.tensor(read[name]), values.float())
    save_file({"double": torch.randn(2).double()}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="double is of F64"):
        dict(read_safetensors(tmp_path / "b.safetensors"))


def test_neighbours_turned_are_what_halves_turned_were() -> None:
    """Queries of transformers' rotary positions are those of llama.cpp's, of the rows in its order."""
    from peers.weights import paired

    heads, size, position = 2, 8, 3
    config = {"num_attention_heads": heads, "num_key_value_heads": heads}
    weight = np.random.default_rng(0).standard_normal((heads * size, 4)).astype(np.float32)
    angles = torch.arange(1, size // 2 + 1) * float(position)
    halves = torch.tensor(weight).view(heads, size, 4).mT
    cos, sin = angles.cos().repeat(2), angles.sin().repeat(2)
    theirs = halves * cos + rotate_half(halves) * sin
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        pairs = torch.tensor(paired(name, weight, config)).view(heads, size // 2, 2, 4)
        first, second = pairs[:, :, 0].mT, pairs[:, :, 1].mT
        ours = torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )
        torch.testing.assert_close(ours, theirs)
    assert paired("model.layers.0.self_attn.v_proj.weight", weight, config) is weight
