"""Images: where they come from, how they are prepared, in which order and with which random numbers."""
