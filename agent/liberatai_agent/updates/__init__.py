"""Self-update: two folders for releases, a trial of each new one, and the way back."""
