"""Token by token: decoding, sampling, steering, sessions, doses."""
