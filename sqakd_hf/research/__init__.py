"""What serves the comparison with papers, and is off by default.

Importing it registers its extensions of a training and its quantizers.
"""

from . import ewgs_delta, objective, oscillation, statsq  # noqa: F401
