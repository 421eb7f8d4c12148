"""A small program that ties a process to its parent: see ``__main__``."""
