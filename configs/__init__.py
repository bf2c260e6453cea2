"""Configurations of runs; each file defines `get_config(size)`, and all of them build on configs/base.py."""
