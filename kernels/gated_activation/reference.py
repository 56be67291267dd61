"""The meaning of the gated activation: torch's two operators."""

from torch import Tensor

from weft.kernels.activations import Activation, activate


def gated_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """See `weft.kernels.gated_activation.gated_activation`."""
    return activate(gate, activation) * up
