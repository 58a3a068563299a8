"""Large batches by stripes of columns that stay in L1."""
