"""The model: geometry, structures, network, training, and `segment`."""
