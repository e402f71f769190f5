"""The joint search over calibration samples and importance metrics."""
