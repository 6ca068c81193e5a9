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
NORMS = [RMS_NORM, ADD_RMS_NORM]


def _backward_arguments(stream: bool) -> tuple:
    generator = torch.Generator().manual_seed(13)
    dnormed, dh, h = (torch.randn(3, 5, 7, generator=generator) for _ in range(3))
    return dnormed, dh if stream else None, h, torch.ones(7), torch.rand(3, 5, 1, generator=generator), True


INNER = [
    Inner(f"rms_norm_backward{'-stream' * s}", "rms_norm_backward", lambda s=s: _backward_arguments(s))
    for s in (False, True)
]
