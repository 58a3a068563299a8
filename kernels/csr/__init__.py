"""CSR products, the dense-gradient probe, and moves of the nonzeros."""
