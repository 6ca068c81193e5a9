"""Problems of ops.glu."""

import torch
from problem import Inner, Problem


def _glu(activation: str) -> Problem:
    return Problem(
        f"glu-{activation}",
        "glu",
        ((3, 5, 7), (3, 5, 7)),
        lambda room, gate, up: room.glu(gate, up, activation=activation),
        lambda gate, up: (gate, up, activation),
    )


def _backward_arguments() -> tuple:
    generator = torch.Generator().manual_seed(14)
    return (*(torch.randn(3, 5, 7, generator=generator) for _ in range(3)), "silu")


GLUS = [_glu(a) for a in ("silu", "gelu", "gelu_tanh")]
INNER = [Inner("glu_backward", "glu_backward", _backward_arguments)]
