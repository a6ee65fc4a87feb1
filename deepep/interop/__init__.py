"""Other array libraries: arrays in and out of buffers by DLPack, and JAX under jit with gradients.

from_any, like    an array of numpy, cupy, jax or TensorFlow as a tensor, and a tensor as such an array
ArrayBuffer       a Buffer whose methods take and return arrays
deepep.interop.jax.JaxExchange    dispatch and combine as functions of jax
"""

from deepep.interop.arrays import ArrayBuffer, from_any, like

__all__ = ["ArrayBuffer", "from_any", "like"]
