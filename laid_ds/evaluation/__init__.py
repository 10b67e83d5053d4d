"""Measuring a window: haystack (asks a model), window (numbers from answers), report (pictures from results files)."""
