"""From a student and its teacher to a trained student."""
