"""From a float model to its student: what to quantize, the plan, the conversion, the calibration."""
