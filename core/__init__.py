"""The core thinks: models, batching, caches and sampling; it knows no Redis, no RQ and no HTTP."""
