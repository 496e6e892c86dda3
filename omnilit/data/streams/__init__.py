"""Data without a length: read once, in order, in a bounded buffer."""
