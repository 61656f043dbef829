"""Students outside of PyTorch: ONNX files with the same integers, and the proof that they are the same.

Needs `pip install sqakd-hf[onnx]`.
"""

from . import requirements  # noqa: F401
from .exporter import ExportReport, export_onnx
from .verification import ExportCheck, verify_export


__all__ = ["ExportCheck", "ExportReport", "export_onnx", "verify_export"]
