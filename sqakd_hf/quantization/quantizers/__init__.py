"""The quantizers, each registered under its name."""

from .base import FakeQuantizer, create_quantizer, list_quantizers, register_quantizer
from .dorefa import DoReFa, DoReFaWeight
from .ewgs import EWGS
from .lsq import LSQ, LSQPlus, LSQPlusWeight
from .pact import PACT
from .range_search import FEW_BITS


__all__ = [
    "EWGS",
    "FEW_BITS",
    "LSQ",
    "PACT",
    "DoReFa",
    "DoReFaWeight",
    "FakeQuantizer",
    "LSQPlus",
    "LSQPlusWeight",
    "create_quantizer",
    "list_quantizers",
    "register_quantizer",
]
