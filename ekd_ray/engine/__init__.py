"""One training run, without Ray: plan, loop, teacher, metrics, checkpoint."""
