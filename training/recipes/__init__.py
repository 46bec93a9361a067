"""Recipes: functions that return one complete run configuration."""
