"""What we need of a transformers vision-language model; the only place that imports transformers."""
