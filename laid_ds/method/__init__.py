"""What is learned: alignment, losses, schedules, and one distillation step."""
