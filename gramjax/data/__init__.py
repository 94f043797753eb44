"""Data sets, tokenizers, audio preprocessing and input pipelines. Knows nothing of models."""
