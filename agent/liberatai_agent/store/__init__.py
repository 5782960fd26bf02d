"""What the agent keeps in its state folder."""
