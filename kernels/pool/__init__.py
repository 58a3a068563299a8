"""Pooling for inference."""
