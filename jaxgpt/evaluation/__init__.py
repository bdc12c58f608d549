"""Evaluation: metrics, plots and reports, which objectives and commands share."""
