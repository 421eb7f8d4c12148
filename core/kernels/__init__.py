"""Code of our own for processors, compiled where it runs; see ``core.kernels.build``."""
