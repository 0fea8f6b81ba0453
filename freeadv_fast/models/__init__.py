"""Networks by name, their batch norms in groups, and the layers between pixels and network."""
