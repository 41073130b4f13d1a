"""What existing scripts import, answered with the kernels of this library."""
