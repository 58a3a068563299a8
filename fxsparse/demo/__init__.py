"""The main job on real data: ``fxsparse demo``."""
