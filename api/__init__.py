"""The API greets: HTTP in front of the queue; it knows no torch and none of RQ's key names."""
