"""Students outside of PyTorch: ONNX files with the same integers, and the proof that they are the same.

Needs `pip install sqakd-hf[onnx]`.
"""

from . import requirements  # noqa: F401
from .engines import DeployReport, LayerSupport
from .exporter import ExportReport, deploy_report, export_onnx, open_session
from .latency import Latency, LatencyReport, measure_latency
from .verification import ExportCheck, verify_export


__all__ = [
    "DeployReport",
    "ExportCheck",
    "ExportReport",
    "LayerSupport",
    "Latency",
    "LatencyReport",
    "deploy_report",
    "export_onnx",
    "measure_latency",
    "open_session",
    "verify_export",
]
