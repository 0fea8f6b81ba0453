"""AutoAttack on the images of all ranks, through its authors' package, resumable."""
