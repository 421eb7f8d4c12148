"""The courier: tells whoever asked for it that a job has ended. Knows the outbox and HTTP; computes nothing."""
