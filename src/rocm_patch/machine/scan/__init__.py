"""What GPU code the files of a ROCm installation carry, and what of it a card cannot run safely. No GPU is needed."""
