"""CUDA kernels, each with a NumPy reference. They know pointers and shapes, never models."""
