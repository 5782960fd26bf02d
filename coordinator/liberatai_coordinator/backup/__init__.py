"""A coordinator in one file: taken while it runs, put back on another machine."""
