"""The joint search over calibration samples, importance metrics and allocation."""
