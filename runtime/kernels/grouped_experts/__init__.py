"""The experts as vLLM and SGLang run them: two grouped products with one tile, the activation between them."""
