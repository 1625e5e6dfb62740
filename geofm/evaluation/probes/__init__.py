"""What is trained, or looked up, on frozen features."""
