"""CUDA kernels, each with a NumPy reference, and the devices that they run on. They know pointers, never models.

`devices` is the seam to what computes, `source` the kernels, `build` makes binaries of them, `library` launches
them, and `reference` says in NumPy what each computes.
"""
