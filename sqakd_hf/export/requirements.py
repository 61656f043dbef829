"""The packages that exporting needs beside those of the training; imported before everything else here."""

from importlib import import_module

from ..errors import InputError


for _package in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
    try:
        import_module(_package)
    except ImportError as _error:
        raise InputError(
            f"Exporting to ONNX needs the package {_package!r}, which is not installed: pip install sqakd-hf[onnx]"
        ) from _error
