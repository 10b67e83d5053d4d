"""What tests share: a small world on disk, and real processes."""
