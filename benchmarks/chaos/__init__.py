"""``python -m benchmarks.chaos``: a whole Headrace under load, while everything in it is killed, frozen and cut."""
