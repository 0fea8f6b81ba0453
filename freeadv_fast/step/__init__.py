"""One update on the device: the network in training, its optimizer, sums and recording."""
