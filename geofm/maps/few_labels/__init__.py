"""Maps of classes from embeddings and a few labels."""
