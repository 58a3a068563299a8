"""Constant fan-in products."""
