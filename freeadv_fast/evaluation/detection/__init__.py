"""How well a detector finds objects: clean, attacked and corrupted; COCO's numbers."""
