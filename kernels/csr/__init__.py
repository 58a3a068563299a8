"""CSR products and the dense-gradient probe."""
