"""The same federated work through LiberatAI, Flower and NVIDIA FLARE: `python -m benchmarks.peers`."""
