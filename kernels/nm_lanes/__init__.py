"""N:M weights with 16 rows side by side."""
