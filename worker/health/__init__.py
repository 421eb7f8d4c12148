"""The health check of a worker's container: see ``__main__``."""
