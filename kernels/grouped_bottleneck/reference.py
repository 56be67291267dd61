"""The meaning of the grouped bottleneck: one slot after the other in fp32."""

from torch import Tensor

from weft.kernels.activations import activate
from weft.kernels.groups import RowGroups

from . import Bottlenecks


def grouped_bottleneck(
    f: Tensor, r: Tensor, bottlenecks: Bottlenecks, groups: RowGroups, gates: Tensor | None = None
) -> None:
    """See `weft.kernels.grouped_bottleneck.grouped_bottleneck`."""
    for slot, start, stop in groups.segments:
        kind = bottlenecks.host_kinds[slot]
        if kind is None:
            continue
        rows = groups.order[start:stop].long()
        x = kind[0].of(f[rows], r[rows]).float()
        down = bottlenecks.down.of(slot).float()
        bias = bottlenecks.down_bias.of(slot).flatten()[: len(down)].float()
        z = activate(x @ down.T + bias, kind[1]).to(f.dtype).float()
        change = z @ bottlenecks.up.of(slot).float() + bottlenecks.up_bias.of(slot).float()
        if gates is not None:
            change = change * gates[rows, :1]
        f[rows] = (f[rows].float() + change).to(f.dtype)
