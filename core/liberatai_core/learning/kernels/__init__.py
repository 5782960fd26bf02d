"""Forward and backward passes of every layer of built-in families, in numpy alone.

For devices without torch: the whole small network is trained with what the base install brings. Arrays are
float32 and lie with the batch last: (channels, height, width, n), (channels, length, n) or (features, n). So
a convolution is one matrix product whose result needs no reordering, what belongs to one channel is one run
of memory, and a shift by a position moves whole runs.

- `layer.py`: what a layer is; `network.py`: layers of a description, put together over one flat vector.
- One file per kind of layer; `loss.py`: what is learnt from; `optimizer.py`: how.

A layer may overwrite its input where the layer before has made it anew and needs it no more, and the gradient
that it is given.
"""
