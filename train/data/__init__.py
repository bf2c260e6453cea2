"""What is trained on: sources of documents, tokenizers, the token cache, rows, and synthetic tasks."""
