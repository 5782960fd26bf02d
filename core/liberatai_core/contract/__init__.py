"""What crosses the broker: topics, messages, frames, chunks, limits. No I/O."""
