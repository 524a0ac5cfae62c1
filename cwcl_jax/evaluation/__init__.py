"""Zero-shot classification, retrieval and alignment from embeddings."""
