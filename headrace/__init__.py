"""Headrace: durable, batched inference for language models. The face: command line, client, ``up``."""
