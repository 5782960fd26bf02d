"""Learning: families, training, distillation, data files, export.

The only package that imports torch, onnx and onnxruntime, and it does so inside functions: importing
it, or any module of it, costs a device without torch nothing.

- `dataset.py` (numpy only): read a file of the data contract.
- `families/`: a family's name and parameters -> structure, initial weights, cost, smaller members.
- `statistics.py`: running statistics of batch norms, measured anew.
- `training.py`: supervised training of a flat weight vector; predictions.
- `distillation.py`: a teacher's outputs on unlabeled data -> a student's weights.
- `export.py`: safetensors and ONNX; `quantised_onnx.py`: ONNX in int8.
"""
