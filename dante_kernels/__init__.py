"""Custom kernels that train neural networks by DANTE."""
