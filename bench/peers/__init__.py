"""What the kernels are measured against, each a real implementation of the same work."""
