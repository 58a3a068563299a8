"""The dense ops of oneDNN, asked for by name: PyTorch itself takes another library for some of them."""
