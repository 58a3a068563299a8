"""The dense product of Intel's MKL on packed weights, which PyTorch's own linear op does not keep."""
