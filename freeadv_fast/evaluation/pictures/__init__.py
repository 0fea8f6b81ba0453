"""The papers' pictures of trained networks: loss surface, large-eps images, saliency, curves."""
