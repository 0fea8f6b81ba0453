"""Images with boxes: COCO's files, minibatches of one shape, an embedded toy set."""
