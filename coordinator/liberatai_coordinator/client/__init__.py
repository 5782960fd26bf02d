"""What any client of the API imports."""
