"""Block by block: a student's ranges, statistics and weights, from its teacher and a few images without labels."""

from .api import Reconstruction, calibrate_model, reconstruct_model
from .state import UnitResult


__all__ = ["Reconstruction", "UnitResult", "calibrate_model", "reconstruct_model"]
