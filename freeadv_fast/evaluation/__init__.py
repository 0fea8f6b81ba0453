"""What a trained network is worth: attacks, exact accuracy over the ranks, pictures."""
