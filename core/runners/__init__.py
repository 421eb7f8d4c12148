"""One file a way of running a loaded model."""
