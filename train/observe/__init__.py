"""What shows of a run: speed and memory, metrics and trackers, progress, profiles, samples and plots."""
