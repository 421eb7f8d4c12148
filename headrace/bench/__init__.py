"""Load on a server or on a bare engine, and what came of it."""
