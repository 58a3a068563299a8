"""Block-sparse kernels."""
