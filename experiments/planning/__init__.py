"""What a training step will take, computed without taking it: tensors have shapes here, and no numbers."""
