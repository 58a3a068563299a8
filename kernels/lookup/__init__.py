"""Small batches by table lookups in registers."""
