"""Sources of images, transforms on the host, and the pipeline that feeds the devices.

Import the modules: this package imports nothing, so that a notebook that wants one transform does
not pay for Grain, and one that wants a source does not pay for JAX.
"""
