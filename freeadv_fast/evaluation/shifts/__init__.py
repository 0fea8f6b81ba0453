"""Clean accuracy on images that have shifted: ImageNet-C, -R, Stylized, corruptions made here."""
