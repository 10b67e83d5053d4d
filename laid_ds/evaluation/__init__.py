"""Measuring a window: tasks (what is asked), asking and evaluate, answers and results (what is kept), window and scores (numbers)."""
