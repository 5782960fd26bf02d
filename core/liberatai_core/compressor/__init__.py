"""Models that fit a byte budget: `codebook` chooses the codings, `artifact` writes and reads the file."""
