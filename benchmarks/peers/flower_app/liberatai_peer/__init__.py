"""The work of benchmarks.peers as a Flower app."""
