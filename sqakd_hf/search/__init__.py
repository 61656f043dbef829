"""Which parts of a network bear few bits, measured without labels."""
