"""Modules that compute with codes, and how they find their place in a model."""
