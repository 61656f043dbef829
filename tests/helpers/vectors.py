"""Reference values of the quantizers' formulas, computed in float64 from the papers."""

import json
from pathlib import Path


VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "quantizer_vectors.json").read_text())["vectors"]
