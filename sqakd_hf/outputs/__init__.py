"""How models are called, what they return, and which outputs are class distributions."""
