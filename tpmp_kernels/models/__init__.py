"""Models assembled from the rooms below, and the plain-torch references they are proved against."""

from tpmp_kernels.models.config import ModelConfig
from tpmp_kernels.models.decoder import Decoder
from tpmp_kernels.models.initialize import initialize
from tpmp_kernels.models.reference import ReferenceDecoder

__all__ = ["Decoder", "ModelConfig", "ReferenceDecoder", "initialize"]
