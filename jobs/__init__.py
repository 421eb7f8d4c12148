"""The jobs remember: what a job is and where it lives; no HTTP framework, no torch."""
