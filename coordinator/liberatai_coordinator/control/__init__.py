"""What operators do to a fleet while it runs: doors, questions to devices, shadows, rollouts."""
