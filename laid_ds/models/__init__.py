"""What we need of a transformers vision-language model; the only place besides data/batch that knows transformers."""
