"""Drawing tokens, and accepting or rejecting drafts, from logits alone."""
