"""What a checkpoint file holds, and reading and writing it safely."""
