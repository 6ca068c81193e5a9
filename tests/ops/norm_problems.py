"""Problems of the norms."""

import torch
from problem import Inner, Problem

RMS_NORM = Problem(
    "rms_norm",
    "rms_norm",
    ((3, 5, 7), (7,)),
    lambda room, x, w: room.rms_norm(x, w, eps=1e-4),
    lambda x, w: (x, w, None, 1e-4),
)
ADD_RMS_NORM = Problem(
    "rms_norm-residual",
    "rms_norm",
    ((3, 5, 7), (7,), (3, 5, 7)),
    lambda room, x, w, r: room.rms_norm(x, w, residual=r),
    lambda x, w, r: (x, w, r, 1e-5),
)
LAYER_NORMS = [
    Problem(
        "layer_norm",
        "layer_norm",
        ((3, 5, 7), (7,)),
        lambda room, x, w: room.layer_norm(x, w, eps=1e-4),
        lambda x, w: (x, w, None, None, 1e-4),
    ),
    Problem(
        "layer_norm-bias",
        "layer_norm",
        ((3, 5, 7), (7,), (7,)),
        lambda room, x, w, b: room.layer_norm(x, w, b),
        lambda x, w, b: (x, w, b, None, 1e-5),
    ),
    Problem(
        "layer_norm-bias-residual",
        "layer_norm",
        ((3, 5, 7), (7,), (7,), (3, 5, 7)),
        lambda room, x, w, b, r: room.layer_norm(x, w, b, residual=r),
        lambda x, w, b, r: (x, w, b, r, 1e-5),
    ),
]
NORMS = [RMS_NORM, ADD_RMS_NORM, *LAYER_NORMS]


def _backward_arguments(op: str, stream: bool, need: bool) -> tuple:
    generator = torch.Generator().manual_seed(13)
    dnormed, dh, h = (torch.randn(3, 5, 7, generator=generator) for _ in range(3))
    mean, rstd = (torch.rand(3, 5, 1, generator=generator) for _ in range(2))
    statistics, needs = ((mean, rstd), (need, need)) if op == "layer_norm" else ((rstd,), (need,))
    return dnormed, dh if stream else None, h, torch.ones(7), *statistics, *needs


INNER = [
    Inner(
        f"{op}_backward{'-stream' * stream}{'-input alone' * (not need)}",
        f"{op}_backward",
        lambda o=op, s=stream, n=need: _backward_arguments(o, s, n),
    )
    for op in ("rms_norm", "layer_norm")
    for stream, need in ((False, True), (True, True), (True, False))
]
