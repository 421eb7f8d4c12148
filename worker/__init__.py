"""The worker carries: one process, one engine, many jobs; it knows no HTTP."""
