"""What the machine is and does: measured, watched, and whether training may happen now."""
